"""What a checkpoint may not hold is found by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distrib.engine import CanonicalState
from distrib.finite import not_finite
from distrib.world import single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, global_batch, make_engine, share_of


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_is_found(value: float) -> None:
    state: CanonicalState = make_engine(single_process_world("cpu"), ADAMW_CLIPPED).canonical_state()
    trained = {name for name in state.tensors if name.startswith("model.")}
    assert not_finite(state.tensors, trained) == []
    for name in (min(trained), next(name for name in state.tensors if name.startswith("optimizer."))):
        tensor = state.tensors[name].flatten()
        kept, tensor[-1] = tensor[-1].item(), value
        assert not_finite(state.tensors, trained) == [name]
        tensor[-1] = kept


def test_a_mask_may_be_infinite_but_not_no_number() -> None:
    mask = torch.full((3, 3), -math.inf)
    whole, none = torch.arange(3), torch.zeros(0)
    assert not_finite({"model.mask": mask, "model.count": whole, "model.none": none}, trained=()) == []
    mask[1, 1] = math.nan
    assert not_finite({"model.mask": mask}, trained=()) == ["model.mask"]


def test_running_statistics_forget_a_step_that_was_skipped() -> None:
    """They have seen numbers that are none, and a mean with one of those never is a number again."""
    engine = make_engine(single_process_world("cpu"), ADAMW_CLIPPED)
    norm = nn.BatchNorm1d(32)
    engine.module.register_module("norm", norm)
    poison = 1.0
    block = engine.module.blocks()[0]
    block.register_forward_hook(lambda _, __, out: out + 0 * poison * norm(out.transpose(1, 2)).transpose(1, 2))
    block.register_forward_pre_hook(lambda _, given: (given[0] * poison, *given[1:]))
    micro_batches = share_of(global_batch(0), 0, 0, 1, 7)
    engine.dry_run(micro_batches[0])
    engine.step(micro_batches, 10)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    assert before["num_batches_tracked"] == 1
    poison = math.nan
    assert engine.step(micro_batches, 10).skipped.item() == 1
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    poison = 1.0
    assert engine.step(micro_batches, 10).skipped.item() == 0
    assert norm.num_batches_tracked == 2
