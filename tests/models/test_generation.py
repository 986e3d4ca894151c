"""Generation: what is drawn, and that the run it belongs to does not notice."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from models.generation import generate
from tests.models.model_helpers import TEXT_SHAPE, TINY_GPT, make

PLAIN = {"new_tokens": 10, "context_tokens": 12, "temperature": 1.0, "top_k": None, "seed": 0, "stop_token": None}


class Successor(nn.Module):
    """Thinks that t+1 follows t, and that t+2 might; remembers how much it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        self.longest = max(self.longest, tokens.shape[1])
        one = nn.functional.one_hot((tokens + 1) % 50, 50).float()
        two = nn.functional.one_hot((tokens + 2) % 50, 50).float()
        return self.scale * (one + 0.9 * two)


def test_greedy_takes_the_likeliest_and_slides_its_window():
    model = Successor()
    assert generate(model, [7], **PLAIN | {"temperature": 0.0, "context_tokens": 4}) == list(range(7, 18))
    assert model.longest == 4


def test_the_stop_token_ends_the_text():
    assert generate(Successor(), [7], **PLAIN | {"temperature": 0.0, "stop_token": 10}) == [7, 8, 9]
    assert generate(Successor(), [7], **PLAIN | {"new_tokens": 0}) == [7]


def test_top_k_keeps_to_the_likeliest_and_temperature_spreads():
    hot = PLAIN | {"new_tokens": 200, "temperature": 100.0}
    two_kept = generate(Successor(), [0], **hot | {"top_k": 2})
    assert {(after - before) % 50 for before, after in pairwise(two_kept)} == {1, 2}
    all_kept = generate(Successor(), [0], **hot)
    assert len({(after - before) % 50 for before, after in pairwise(all_kept)}) > 20


def test_the_seed_decides_and_nothing_else():
    model = make(TINY_GPT, TEXT_SHAPE)
    first = generate(model, [1, 2, 3], **PLAIN)
    torch.manual_seed(1234)
    assert generate(model, [1, 2, 3], **PLAIN) == first
    assert generate(model, [1, 2, 3], **PLAIN | {"seed": 1}) != first
    assert first[:3] == [1, 2, 3]
    assert len(first) == 13


def test_the_run_does_not_notice():
    model = make(TINY_GPT | {"dropout": 0.5}, TEXT_SHAPE).train()
    model.layers[0].eval()  # a part that its owner keeps frozen
    before = torch.random.get_rng_state()
    generate(model, [1, 2, 3], **PLAIN)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert model.layers[1].dropout.training
    assert not model.layers[0].training
    assert not model.layers[0].dropout.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error():
    model = make(TINY_GPT, TEXT_SHAPE).train()
    with pytest.raises(ValueError, match="longer than the model's 12"):
        generate(model, [1] * 13, **PLAIN | {"context_tokens": 13})
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "the prompt has no tokens"),
        ({"new_tokens": -1}, "new_tokens -1"),
        ({"context_tokens": 0}, "context_tokens 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(Successor(), **{"tokens": [1]} | PLAIN | changes)
