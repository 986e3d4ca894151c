"""The deepspeed engine: the curve of every other engine, checkpoints that pass between them, and steps that are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib.config import OptimizerConfig
from distrib.deepspeed_engine import DeepSpeedEngine
from distrib.engine import EngineSetup
from distrib.world import World, single_process_world
from tests.distrib.conftest import Ranks
from tests.distrib.engine_runs import (
    ADAMW_CLIPPED,
    SGD_UNCLIPPED,
    STEPS,
    Batch,
    Curve,
    curve,
    global_batch,
    make_engine,
    reference_curve,
    share_of,
    take_step,
)
from tests.distrib.lockstep_runs import SMALL_PARTS
from tests.distrib.test_native_engine import assert_same_curve
from tests.distrib.test_sharding import load_step, mesh_of, save_step, whole_tensors

OPTIMIZERS = {"adamw": ADAMW_CLIPPED, "sgd": SGD_UNCLIPPED}
STAGES = [0, 1, 2, 3]
TWO_RANKS = pytest.mark.parametrize("ranks", [2], indirect=True)


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    return {kind: reference_curve(optimizer) for kind, optimizer in OPTIMIZERS.items()}


def make(world: World, zero_stage: int, optimizer: OptimizerConfig = ADAMW_CLIPPED, **options: Any) -> Any:
    world = mesh_of(world, zero_stage)
    return make_engine(world, optimizer, zero_stage=zero_stage, engine="deepspeed", **options)


def _curve(world: World, zero_stage: int, kind: str, micro_samples: int, options: dict[str, Any]) -> Curve:
    return curve(
        mesh_of(world, zero_stage), OPTIMIZERS[kind], micro_samples, zero_stage=zero_stage,
        **{"engine": "deepspeed", **options},
    )  # fmt: skip


def assert_curve_of_reference(
    ranks: Ranks, references: dict[str, Curve], zero_stage: int, kind: str, micro_samples: int, **options: Any
) -> None:
    curves = ranks.run(_curve, zero_stage, kind, micro_samples, options)
    assert all(points == curves[0] for points in curves), "ranks must report the same numbers"
    assert_same_curve(curves[0], references[kind])


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offload_changes_no_value(ranks: Ranks, references: dict[str, Curve], zero_stage: int, offload: str) -> None:
    assert_curve_of_reference(ranks, references, zero_stage, "adamw", 2, offload=offload)


@pytest.mark.long
@pytest.mark.parametrize("micro_samples", [1, 7])
@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offload_changes_no_value_of_sgd(
    ranks: Ranks, references: dict[str, Curve], zero_stage: int, offload: str, micro_samples: int
) -> None:
    assert_curve_of_reference(
        ranks, references, zero_stage, "sgd", micro_samples, offload=offload, deepspeed_config=SMALL_PARTS
    )


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_change_no_value(
    ranks: Ranks, references: dict[str, Curve], zero_stage: int, how: str
) -> None:
    assert_curve_of_reference(
        ranks, references, zero_stage, "adamw", 2, activation_checkpointing=how, deepspeed_config=SMALL_PARTS
    )


class _HalvedGradient(DeepSpeedEngine):
    """A wrong engine: its gradient is half of what it should be."""

    def step(self, micro_batches, items):  # type: ignore[no-untyped-def]
        return super().step(micro_batches, 2 * items)


def _halved(world: World, zero_stage: int) -> Curve:
    return curve(
        mesh_of(world, zero_stage), SGD_UNCLIPPED, 7, _HalvedGradient, zero_stage=zero_stage, engine="deepspeed"
    )


@TWO_RANKS
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_wrong_gradient_is_noticed(ranks: Ranks, references: dict[str, Curve], zero_stage: int) -> None:
    with pytest.raises(AssertionError, match="of step"):
        assert_same_curve(ranks.run(_halved, zero_stage)[0], references["sgd"])


@TWO_RANKS
def test_bf16_is_the_arithmetic_of_the_native_engine(ranks: Ranks) -> None:
    """Every product is rounded to bf16 alike; what differs is the order in which fp32 gradients are summed."""
    native = ranks.run(_curve, 0, "adamw", 7, {"engine": "native", "precision": "bf16"})[0]
    for stage in STAGES:
        options = {"precision": "bf16", "deepspeed_config": SMALL_PARTS}
        points = ranks.run(_curve, stage, "adamw", 7, options)[0]
        assert points[0][0] == native[0][0]
        # Where a weight's last fp32 bit differs, its bf16 rounding may: 2**-9 of a few weights' share of the loss.
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in native], rel=2**-12)


@TWO_RANKS
@pytest.mark.parametrize("zero_stage", [0, 2, *(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 3))])
def test_the_loss_scale_of_fp16_does_not_reach_the_gradient_norm(
    ranks: Ranks, references: dict[str, Curve], zero_stage: int
) -> None:
    points = ranks.run(_curve, zero_stage, "adamw", 7, {"precision": "fp16"})[0]
    # fp16 rounds to 2**-11: a step's loss and norm average many such roundings.
    assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in references["adamw"]], rel=2**-11)
    assert [norm for _, norm in points] == pytest.approx([norm for _, norm in references["adamw"]], rel=2**-8)


def _overflowing(world: World, zero_stage: int) -> tuple[list[bool], float]:
    """Steps that start from a scale under which half precision overflows: skipped ones, and the last scale."""
    engine = make(world, zero_stage, precision="fp16")
    engine._scaler.scale.fill_(2.0**24)
    skipped = [not torch.isfinite(torch.tensor(take_step(engine, step, 7)[1])).item() for step in range(12)]
    return skipped, engine._scaler.scale.item()


@pytest.mark.long
@TWO_RANKS
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_overflow_skips_steps_until_the_scale_fits(ranks: Ranks, zero_stage: int) -> None:
    answers = ranks.run(_overflowing, zero_stage)
    skipped, scale = answers[0]
    assert answers[1] == answers[0]
    assert skipped[0]
    assert not skipped[-1]
    assert scale == 2.0 ** (24 - sum(skipped))


def _state(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _poisoned(world: World, zero_stage: int, offload: str) -> tuple[list[bool], list[bool], int]:
    """A step whose loss is not finite on the last rank alone, between two good ones."""
    engine = make(world, zero_stage, offload=offload)
    world = engine.world
    skipped, changed = [], []
    for step in range(3):
        before = _state(engine)
        micro_batches = share_of(global_batch(step), step, world.data_rank, world.data_size, 2)
        if step == 1 and world.rank == world.size - 1:
            poisoned = Batch(micro_batches[0].tensors, micro_batches[0].first_position, weight=float("nan"))
            micro_batches = [poisoned, *micro_batches[1:]]
        skipped.append(bool(engine.step(micro_batches, 40).skipped))
        changed.append(not _same(before, _state(engine)))
    return skipped, changed, engine.canonical_state().scalars["optimizer_updates"]


@pytest.mark.parametrize(("zero_stage", "offload"), [(0, "none"), (1, "none"), (2, "optimizer"), (3, "parameters")])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(
    ranks: Ranks, zero_stage: int, offload: str
) -> None:
    for skipped, changed, updates in ranks.run(_poisoned, zero_stage, offload):
        assert skipped == [False, True, False]
        assert changed == [True, False, True]
        assert updates == 2


def _after_dry_runs(world: World, zero_stage: int, dry_runs: int) -> tuple[bool, int, Curve]:
    engine = make(world, zero_stage)
    take_step(engine, 0, 2)
    before = _state(engine)
    for _ in range(dry_runs):
        engine.dry_run(share_of(global_batch(5), 0, 0, 1, 3)[0])
    kept_nothing = _same(before, _state(engine)) and all(p.grad is None for p in engine.module.parameters())
    updates = engine.canonical_state().scalars["optimizer_updates"]
    return kept_nothing, updates, [take_step(engine, step, 2) for step in range(1, 4)]


@TWO_RANKS
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_dry_run_keeps_nothing(ranks: Ranks, zero_stage: int) -> None:
    kept_nothing, updates, points = ranks.run(_after_dry_runs, zero_stage, 2)[0]
    assert kept_nothing
    assert updates == 1
    assert points == ranks.run(_after_dry_runs, zero_stage, 0)[0][2]


def _save_after(world: World, zero_stage: int, engine: str, root: str, steps: int) -> None:
    built = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage, engine=engine)
    for step in range(steps):
        take_step(built, step, 7)
    save_step(built, root, steps)


def _load_and_save(world: World, zero_stage: int, options: dict[str, Any], root: str, again: str) -> bool:
    """Also tells whether the weights of the forward pass are those that were loaded."""
    engine = make(world, zero_stage, **options)
    take_step(engine, 0, 7)  # what was there before must not shine through
    load_step(engine, root, 3)
    save_step(engine, again, 3)
    sharded = _evaluate(engine)
    return sharded == _evaluate(_loaded_native(root))


def _loaded_native(root: str) -> Any:
    engine = make_engine(single_process_world("cpu"), ADAMW_CLIPPED)
    load_step(engine, root, 3)
    return engine


def _evaluate(engine: Any) -> float:
    engine.module.eval()
    with torch.no_grad():
        return engine.module(global_batch(0)["tokens"][:, :-1]).double().sum().item()


def _continue(world: World, zero_stage: int, engine: str, root: str) -> Curve:
    built = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage, engine=engine)
    load_step(built, root, 3)
    return [take_step(built, step, 7) for step in range(3, STEPS)]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_checkpoints_pass_between_engines(ranks: Ranks, tmp_path: Path, zero_stage: int) -> None:
    alone = single_process_world("cpu")
    reference, again, trained = (str(tmp_path / name) for name in ("reference", "again", "trained"))
    _save_after(alone, 0, "native", reference, 3)
    assert all(ranks.run(_load_and_save, zero_stage, {"deepspeed_config": SMALL_PARTS}, reference, again))
    expected, found = whole_tensors(Path(reference)), whole_tensors(Path(again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    ranks.run(_save_after, zero_stage, "deepspeed", trained, 3)
    here = ranks.run(_continue, zero_stage, "deepspeed", trained)[0]
    plain = _continue(alone, 0, "native", trained)
    assert [loss for loss, _ in plain] == pytest.approx([loss for loss, _ in here], rel=2e-6)
    assert [norm for _, norm in plain] == pytest.approx([norm for _, norm in here], rel=2e-5)


@TWO_RANKS
@pytest.mark.parametrize(
    ("zero_stage", "options"),
    [(1, {"offload": "optimizer"}), (3, {"offload": "parameters"}), (3, {})],
)
def test_checkpoints_pass_to_offloaded_and_persistent_parameters(
    ranks: Ranks, tmp_path: Path, zero_stage: int, options: dict[str, Any]
) -> None:
    reference, again = str(tmp_path / "reference"), str(tmp_path / "again")
    _save_after(single_process_world("cpu"), 0, "native", reference, 3)
    assert all(ranks.run(_load_and_save, zero_stage, options, reference, again))
    assert _same(whole_tensors(Path(reference)), whole_tensors(Path(again)))


def _continued_after_saving(world: World, zero_stage: int, root: str) -> Curve:
    engine = make(world, zero_stage)
    for step in range(3):
        take_step(engine, step, 2)
    save_step(engine, root, 3)
    return [take_step(engine, step, 2) for step in range(3, STEPS)]


def _resumed(world: World, zero_stage: int, root: str) -> Curve:
    engine = make(world, zero_stage)
    load_step(engine, root, 3)
    return [take_step(engine, step, 2) for step in range(3, STEPS)]


@pytest.mark.long
@TWO_RANKS
@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_resumed_run_repeats_the_numbers_exactly(ranks: Ranks, tmp_path: Path, zero_stage: int) -> None:
    straight = ranks.run(_continued_after_saving, zero_stage, str(tmp_path))
    assert ranks.run(_resumed, zero_stage, str(tmp_path)) == straight


class Uneven(nn.Module):
    """A stack with a part that nobody uses, a frozen one, tied ones, and one that only some samples go through."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.sometimes = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.output = nn.Linear(16, 61, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    def initialise_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def initialise_buffers(self) -> None:
        self.calls.zero_()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(tokens)).tanh()
        routed = tokens[:, :1, None] % 4 == 0
        if self.route and bool(routed.any()):
            hidden = hidden + self.sometimes(hidden) * routed
        if self.training:
            self.calls += 1
        return self.output(hidden)

    route = False


class RoutedUneven(Uneven):
    route = True


def _uneven_engine(world: World, kind: type[nn.Module], zero_stage: int, engine: str) -> Any:
    def build(setup: EngineSetup) -> Any:
        from dataclasses import replace

        from distrib.engines import make_engine as engine_of

        return engine_of(replace(setup, make_model=kind))

    # Without momentum and decay a gradient of zero, which DeepSpeed takes for none, changes nothing.
    optimizer = OptimizerConfig(kind="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    return make_engine(mesh_of(world, zero_stage), optimizer, build, zero_stage=zero_stage, engine=engine)


def _odd_batch() -> Batch:
    tokens = torch.tensor([[1, 3, 5], [7, 9, 11]])
    return Batch({"tokens": tokens, "loss_mask": torch.ones(2, 2, dtype=torch.bool)}, 0)


def _uneven_run(
    world: World, kind: type[nn.Module], zero_stage: int, engine: str
) -> tuple[Curve, dict[str, torch.Tensor]]:
    built = _uneven_engine(world, kind, zero_stage, engine)
    built.dry_run(_odd_batch())
    points = [take_step(built, step, 2) for step in range(6)]
    return points, _state(built)


@TWO_RANKS
@pytest.mark.parametrize(
    ("zero_stage", "kind"), [(0, RoutedUneven), (1, RoutedUneven), (2, RoutedUneven), (2, Uneven), (3, Uneven)]
)
def test_unused_frozen_and_tied_parameters(ranks: Ranks, zero_stage: int, kind: type[nn.Module]) -> None:
    """Those of a rank's own choice too; at stage 3 the ranks must gather the same weights in the same order."""
    routed = [global_batch(step)["tokens"][:, 0] % 4 == 0 for step in range(6)]
    assert any(bool(samples[:3].any()) != bool(samples[3:].any()) for samples in routed), "ranks must disagree"
    expected, state = _uneven_run(single_process_world("cpu"), kind, 0, "native")
    for points, found in ranks.run(_uneven_run, kind, zero_stage, "deepspeed"):
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in expected], rel=2e-6)
        assert [norm for _, norm in points] == pytest.approx([norm for _, norm in expected], rel=2e-5)
        assert found.keys() == state.keys()
        assert torch.equal(found["model.frozen.weight"], state["model.frozen.weight"])
        assert torch.equal(found["model.unused.weight"], state["model.unused.weight"])
        assert found["model.calls"] == 6 * 2


def _initial_values(world: World, zero_stage: int, engine: str, kind: type[nn.Module]) -> dict[str, torch.Tensor]:
    return _state(_uneven_engine(world, kind, zero_stage, engine))


class WithoutMethods(nn.Module):
    """Draws its initial values itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 16)
        self.output = nn.Linear(16, 61)


@TWO_RANKS
@pytest.mark.parametrize("kind", [Uneven, WithoutMethods])
def test_initial_values_are_those_of_the_native_engine(ranks: Ranks, kind: type[nn.Module]) -> None:
    expected = _initial_values(single_process_world("cpu"), 0, "native", kind)
    for zero_stage in (0, 2, 3):
        for found in ranks.run(_initial_values, zero_stage, "deepspeed", kind):
            assert found.keys() == expected.keys()
            assert _same(found, expected)


def _largest_whole(world: World) -> tuple[int, int, int]:
    """The most elements of weights that a start at stage 3 holds at once on this rank; those of a shard and of the model."""
    most = 0
    whole = torch.empty_like

    def watch(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal most
        made = whole(*arguments, **named)
        most = max(most, made.numel())
        return made

    torch.empty_like = watch
    try:
        engine = make(world, 3, deepspeed_config=SMALL_PARTS)
    finally:
        torch.empty_like = whole
    held = sum(parameter.ds_tensor.numel() for parameter in engine.module.parameters())
    still_whole = sum(parameter.numel() for parameter in engine.module.parameters())
    return most, held + still_whole, engine.parameter_count


@TWO_RANKS
def test_at_stage_3_no_rank_holds_the_model(ranks: Ranks) -> None:
    for most, held, elements in ranks.run(_largest_whole):
        assert most < 0.2 * elements
        assert 0.5 * elements <= held < 0.6 * elements


@pytest.mark.long
@TWO_RANKS
@pytest.mark.parametrize("zero_stage", STAGES)
def test_compiled_blocks_give_the_reference_curve(ranks: Ranks, references: dict[str, Curve], zero_stage: int) -> None:
    assert_curve_of_reference(ranks, references, zero_stage, "adamw", 7, compile=True)
