"""ZeRO stages 1 to 3 and hybrid sharding of the native engine: the same curve, the same checkpoints, less memory."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distrib.capabilities import count_shards
from distrib.checkpoint import load_tensors, open_checkpoint, save_checkpoint
from distrib.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from distrib.engine import CanonicalState, EngineSetup
from distrib.native import NativeEngine
from distrib.sharding import local
from distrib.world import World, single_process_world, world_of_group
from tests.distrib.engine_runs import (
    ADAMW_CLIPPED,
    CONSTANT,
    MODEL,
    SGD_UNCLIPPED,
    STEPS,
    TASK,
    VOCABULARY,
    Batch,
    Curve,
    HalvedGradient,
    curve,
    global_batch,
    make_engine,
    reference_curve,
    share_of,
    take_step,
)
from tests.distrib.test_native_engine import assert_same_curve
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")


def mesh_of(world: World, zero_stage: int, replicas: int = 1) -> World:
    """The same ranks, laid out for a ZeRO stage."""
    if world.size == 1:
        return world
    shards = count_shards(ParallelConfig(zero_stage=zero_stage, replicas=replicas if zero_stage else None), world.size)
    return world_of_group(world.local_rank, world.device, timedelta(seconds=60), shards)


def _curve(
    world: World,
    zero_stage: int,
    replicas: int,
    optimizer: OptimizerConfig,
    micro_samples: int,
    engine_class: type[NativeEngine] = NativeEngine,
    precision: str = "fp32",
) -> Curve:
    world = mesh_of(world, zero_stage, replicas)
    return curve(world, optimizer, micro_samples, engine_class, MODEL, precision, zero_stage)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_wrong_gradient_is_noticed(gloo_pool: WorkerPool, zero_stage: int) -> None:
    points = gloo_pool.run(_curve, 2, zero_stage, 1, SGD_UNCLIPPED, 7, HalvedGradient)[0]
    with pytest.raises(AssertionError, match="of step"):
        assert_same_curve(points, reference_curve(SGD_UNCLIPPED))


def test_bf16_is_the_same_arithmetic_at_every_stage(gloo_pool: WorkerPool) -> None:
    """Every product is rounded to bf16 alike; what differs is the order in which fp32 gradients are summed."""
    replicated, *sharded = (
        gloo_pool.run(_curve, 2, stage, 1, ADAMW_CLIPPED, 7, NativeEngine, "bf16")[0] for stage in (0, 1, 2, 3)
    )
    for points in sharded:
        assert points[0][0] == replicated[0][0]
        # Where a weight's last fp32 bit differs, its bf16 rounding may: 2**-9 of a few weights' share of the loss.
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in replicated], rel=2**-12)


def _held(world: World, zero_stage: int) -> tuple[int, int, int, list[str]]:
    """Elements of weights, gradients and optimizer state on this rank in the middle of a step; names of whole weights."""
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage)
    held: list[int] = []
    update = engine._update

    def count_and_update() -> tuple[torch.Tensor, torch.Tensor]:
        held.append(sum(local(p.grad).numel() for p in engine.module.parameters() if p.grad is not None))
        return update()

    engine._update = count_and_update  # type: ignore[method-assign]
    take_step(engine, 0, 2)
    tensors = engine.canonical_state().tensors
    weights = sum(local(tensor).numel() for name, tensor in tensors.items() if name.startswith("model."))
    state = sum(local(tensor).numel() for name, tensor in tensors.items() if name.startswith("optimizer."))
    whole = [name for name, parameter in engine.module.named_parameters() if not isinstance(parameter, DTensor)]
    return weights, held[0], state, whole


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_weights_gradients_and_optimizer_state_are_shared_out(gloo_pool: WorkerPool, zero_stage: int) -> None:
    total = sum(parameter.numel() for parameter in make_engine(ALONE, ADAMW_CLIPPED).module.parameters())
    parts = gloo_pool.run(_held, 2, zero_stage)
    assert sum(weights for weights, *_ in parts) == total
    assert sum(gradients for _, gradients, *_ in parts) == total
    assert sum(state for *_, state, _ in parts) == 2 * total
    assert all(0.4 * total < weights < 0.6 * total and not whole for weights, _, _, whole in parts)


def _save_after(world: World, zero_stage: int, replicas: int, root: str, steps: int) -> None:
    engine = make_engine(mesh_of(world, zero_stage, replicas), ADAMW_CLIPPED, zero_stage=zero_stage)
    for step in range(steps):
        take_step(engine, step, 7)
    save_step(engine, root, steps)


def save_step(engine: NativeEngine, root: str, step: int) -> None:
    config = CheckpointConfig()
    save_checkpoint(
        Path(root), engine.canonical_state(), step=step, scalars={}, fields={}, config=config, world=engine.world
    )


def load_step(engine: NativeEngine, root: str, step: int) -> None:
    checkpoint = open_checkpoint(Path(root) / f"step-{step:08d}", engine.world)
    tensors = engine.canonical_state().tensors
    load_tensors(checkpoint, tensors, engine.world)
    engine.load_state(CanonicalState(tensors, checkpoint.scalars["engine"]))


def whole_tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of step 3, as one process reads it."""
    engine = make_engine(ALONE, ADAMW_CLIPPED)
    load_step(engine, str(root), 3)
    return {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}


def _initial_values(world: World, zero_stage: int) -> dict[str, torch.Tensor]:
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage)
    return {
        name: parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in engine.module.named_parameters()
    }


def test_initial_values_do_not_depend_on_the_layout(gloo_pool: WorkerPool) -> None:
    expected = _initial_values(ALONE, 0)
    for world_size in (2, 3):
        for found in gloo_pool.run(_initial_values, world_size, 3):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _poisoned(world: World, zero_stage: int) -> tuple[list[bool], list[bool]]:
    """A step whose loss is not finite on the last rank alone, between two good ones."""
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage)
    skipped, changed = [], []
    for step in range(3):
        before = [local(tensor).clone() for tensor in engine.canonical_state().tensors.values()]
        micro_batches = share_of(global_batch(step), step, world.data_rank, world.data_size, 7)
        if step == 1 and world.rank == world.size - 1:
            micro_batches = [Batch(micro_batches[0].tensors, micro_batches[0].first_position, weight=float("nan"))]
        skipped.append(bool(engine.step(micro_batches, 40).skipped))
        after = [local(tensor) for tensor in engine.canonical_state().tensors.values()]
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return skipped, changed


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(gloo_pool: WorkerPool, zero_stage: int) -> None:
    for skipped, changed in gloo_pool.run(_poisoned, 2, zero_stage):
        assert skipped == [False, True, False]
        assert changed == [True, False, True]


def test_replicas_must_divide_the_workers() -> None:
    assert count_shards(ParallelConfig(zero_stage=3, replicas=2), 6) == 3
    with pytest.raises(ValueError, match=r"parallel.replicas=2: does not divide the 3 workers"):
        count_shards(ParallelConfig(zero_stage=3, replicas=2), 3)


class Tied(nn.Module):
    """Its embedding is its output layer, in one block or across two."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.middle = nn.Linear(32, 32)
        self.output = nn.Linear(32, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        self.across = across

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.middle(self.embedding(tokens)))

    def blocks(self) -> list[nn.Module]:
        return [self.middle, self.output] if self.across else [self.middle]

    def initialise_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def initialise_buffers(self) -> None:
        pass


def _tied(world: World, zero_stage: int, across: bool) -> tuple[list[str], Curve]:
    world = mesh_of(world, zero_stage)
    parallel = ParallelConfig(zero_stage=zero_stage)
    setup = EngineSetup(lambda: Tied(across), TASK.loss, world, ADAMW_CLIPPED, CONSTANT, parallel, steps=STEPS, seed=1)
    engine = NativeEngine(setup)
    points = [take_step(engine, step, 7) for step in range(STEPS)]
    return [name for name, _ in engine.module.named_parameters()], points


@pytest.mark.parametrize("across", [False, True])
def test_tied_weights_stay_one_weight(gloo_pool: WorkerPool, across: bool) -> None:
    names, expected = _tied(ALONE, 0, across)
    assert names == ["embedding.weight", "middle.weight", "middle.bias"]
    for found, points in gloo_pool.run(_tied, 2, 3, across):
        assert found == names
        assert_same_curve(points, expected)
