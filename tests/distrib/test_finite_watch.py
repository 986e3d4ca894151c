"""The watch for what is not finite names the module or the parameter where it began, and nothing else stops a run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from distrib.finite_watch import FiniteWatch, NonFinite
from distrib.phases import enter


@dataclass
class Sum:
    total: torch.Tensor
    per_sample: torch.Tensor


class Inner(nn.Module):
    """What a test changes: `act` stands between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.second(self.act(self.first(x)))}


class Model(nn.Module):
    def __init__(self, inner: type[Inner]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([inner()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)["hidden"]
        return self.head(x)


def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Sum:
    per_sample = model(batch["image"]).square().sum(dim=1)
    return Sum(per_sample.sum(), per_sample.detach())


def run(model: nn.Module, watch: FiniteWatch, image: torch.Tensor | None = None, loss: Any = loss) -> None:
    watch.watch(model)
    enter("forward", 2)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        result = watch.wrap(loss)(model, {"image": torch.ones(3, 4) if image is None else image})
        enter("backward")
        result.total.backward()


def told(model: nn.Module, **options: Any) -> str:
    with pytest.raises(NonFinite) as caught:
        run(model, FiniteWatch(), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_finite_run_is_left_alone() -> None:
    run(Model(Inner), FiniteWatch())


def test_the_innermost_module_is_named_with_its_shape_and_count() -> None:
    class Bad(Inner):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = super().forward(x)["hidden"]
            return {"hidden": hidden, "weights": torch.where(torch.arange(4) == 1, torch.nan, hidden)}

    assert told(Model(Bad)) == (
        "step 3, forward: the first tensor that is not finite is output['weights'] of blocks.0 (Bad): shape (3, 4), "
        "float32, 3 of 12 values not finite (3 nan); its inputs and parameters are finite"
    )


def test_a_parameter_that_was_not_finite_already_is_named() -> None:
    model = Model(Inner)
    with torch.no_grad():
        model.head.weight[1, 2] = torch.inf
    own = "its own weight is not finite: shape (2, 4), float32, 1 of 8 values not finite (1 inf)"
    # In the third feature of all samples head is given numbers below zero: as a mask would be, until the loss is seen.
    text = told(model)
    assert text.startswith(
        "step 3, forward: the loss is not finite: shape (), float32, 1 of 1 values not finite (1 inf)"
    )
    assert (
        "infinite before it is output of head (Linear): shape (3, 2), float32, 3 of 6 values not finite (3 -inf)"
        in text
    )
    assert text.endswith(own)
    model = Model(Inner)
    with torch.no_grad():
        model.head.weight[1, 2] = -torch.inf
    text = told(model)
    assert "is output of head (Linear): shape (3, 2), float32, 3 of 6 values not finite (3 inf)" in text
    assert text.endswith(own.replace("1 inf", "1 -inf"))


def test_what_is_made_between_modules_is_laid_to_the_forward_around_them() -> None:
    class Bad(Inner):
        def act(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0 - x / 0

    text = told(Model(Bad))
    assert "output of blocks.0.second (Linear)" in text
    assert "no module gave that out: look into the forward of blocks.0 (Bad)" in text


def test_the_way_to_the_forward_around_passes_over_lists() -> None:
    class Bad(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks[0].first(x * torch.nan))

    assert "output of blocks.0.first (Linear)" in told(Bad(Inner))
    assert "look into the forward of blocks.0 (Inner)" in told(Bad(Inner))


def test_the_batch_and_the_loss_are_looked_at_too() -> None:
    image = torch.ones(3, 4)
    image[0, 0] = torch.nan
    assert "step 3, forward: the batch is not finite in its field image: shape (3, 4)" in told(
        Model(Inner), image=image
    )

    def divided(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Sum:
        total = model(batch["image"]).sum() / 0
        return Sum(total, total.detach())

    assert "the loss is not finite: shape (), float32, 1 of 1" in told(Model(Inner), loss=divided)


def test_infinities_of_a_mask_stop_nothing_and_are_told_with_what_they_lead_to() -> None:
    class Masked(Inner):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": x.masked_fill(torch.arange(4) == 0, -torch.inf)}

    class Softmaxed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks[0](x)["hidden"].softmax(dim=1))

    run(Softmaxed(Masked), FiniteWatch())
    text = told(Model(Masked))
    assert "is output of head (Linear)" in text
    assert (
        "; infinite before it is output['hidden'] of blocks.0 (Masked): shape (3, 4), float32, 3 of 12 values not finite"
        in text
    )


class RootOfZero(Inner):
    """Its forward is finite, and its backward infinite at 0."""

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.detach()).sqrt()


def test_a_gradient_is_named_by_its_parameter_and_the_line_that_made_it() -> None:
    text = told(Model(RootOfZero))
    assert text.startswith("step 3, backward: the first gradient that is not finite is that of blocks.0.first.")
    assert "made by SqrtBackward0, whose forward is " in text
    assert "test_finite_watch.py:" in text
    assert "(return (x - x.detach()).sqrt())" in text


def test_gradients_that_overflow_under_fp16_are_told_and_do_not_stop() -> None:
    lines: list[str] = []
    model = Model(RootOfZero)
    run(model, FiniteWatch(tell_gradients=lines.append))
    assert len(lines) == 1, "one of two parameters, once a step"
    assert lines[0].endswith("with fp16 the step is skipped and the loss scale halved")
    assert model.blocks[0].first.weight.grad is not None


def test_a_watched_graph_is_freed() -> None:
    """A hook that kept its node alive would keep every step's activations."""
    model, watch = Model(Inner), FiniteWatch()
    watch.watch(model)
    enter("forward", 0)
    image = torch.ones(3, 4)
    kept: list[weakref.ref[Any]] = []

    def keeping(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Sum:
        hidden = model(batch["image"])
        kept.append(weakref.ref(hidden))
        return Sum(hidden.sum(), hidden.detach())

    gc.disable()
    try:
        result = watch.wrap(keeping)(model, {"image": image})
        result.total.backward()
        del result
        assert kept[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_looked_at(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 2).to(dtype)
    with torch.no_grad():
        model.bias.fill_(-torch.inf)
        model.weight.fill_(torch.nan)
    text = told(model, image=torch.ones(3, 4, dtype=dtype))
    assert f"output of the model itself (Linear): shape (3, 2), {str(dtype).removeprefix('torch.')}" in text
