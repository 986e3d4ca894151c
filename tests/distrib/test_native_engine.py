"""The same curve on every world and every micro-batch size, and proof that the comparison would notice if it were not."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from distrib.native import NativeEngine
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import (
    ADAMW_CLIPPED,
    MODEL,
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
from tests.worker_pool import WorkerPool

LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 2e-5
OPTIMIZERS = {"adamw": ADAMW_CLIPPED, "sgd": SGD_UNCLIPPED}


def assert_same_curve(found: Curve, expected: Curve) -> None:
    assert len(found) == len(expected) == STEPS
    for step, ((loss, norm), (expected_loss, expected_norm)) in enumerate(zip(found, expected, strict=True)):
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE), f"loss of step {step}"
        assert norm == pytest.approx(expected_norm, rel=NORM_TOLERANCE), f"gradient norm of step {step}"


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    return {kind: reference_curve(optimizer) for kind, optimizer in OPTIMIZERS.items()}


def test_the_reference_learns_and_clips(references: dict[str, Curve]) -> None:
    for points in references.values():
        assert points[-1][0] < points[0][0]
    assert all(norm > ADAMW_CLIPPED.clip_norm for _, norm in references["adamw"]), "clipping must be active"


@pytest.mark.parametrize("micro_samples", [1, 2, 3, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_world_and_micro_batch_gives_the_reference_curve(
    gloo_pool: WorkerPool, references: dict[str, Curve], kind: str, world_size: int, micro_samples: int
) -> None:
    curves = gloo_pool.run(curve, world_size, OPTIMIZERS[kind], micro_samples)
    assert all(points == curves[0] for points in curves), "ranks must report the same numbers"
    assert_same_curve(curves[0], references[kind])


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(gloo_pool: WorkerPool, references: dict[str, Curve]) -> None:
    one = curve(single_process_world("cpu"), ADAMW_CLIPPED, 7, precision="bf16")
    two = gloo_pool.run(curve, 2, ADAMW_CLIPPED, 7, NativeEngine, MODEL, "bf16")[0]
    for points in (one, two):
        # 8 bits of mantissa: 2**-8 relative per operation. Well apart from fp32, close to it all the same.
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in references["adamw"]], rel=2**-7)
        assert points != references["adamw"]
    engine = make_engine(single_process_world("cpu"), ADAMW_CLIPPED, precision="bf16")
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}


def _gradient_communications(world: World, micro_samples: int) -> list[int]:
    """Bytes of each all-reduce of gradients during one step."""
    engine = make_engine(world, SGD_UNCLIPPED)
    sizes: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(world.data_group, bucket)

    engine._forward_module.register_comm_hook(None, count)
    engine.step(share_of(global_batch(0), 0, world.data_rank, world.data_size, micro_samples), 40)
    return sizes


def test_gradients_travel_once_per_step_however_many_micro_batches(gloo_pool: WorkerPool) -> None:
    for sizes in (*gloo_pool.run(_gradient_communications, 2, 7), *gloo_pool.run(_gradient_communications, 2, 1)):
        engine = make_engine(single_process_world("cpu"), SGD_UNCLIPPED)
        assert sum(sizes) == sum(4 * parameter.numel() for parameter in engine.module.parameters())


def _poisoned_run(world: World) -> tuple[list[bool], list[bool], float]:
    """A step whose loss is not finite on the last rank alone, between two good ones."""
    engine = make_engine(world, ADAMW_CLIPPED)
    skipped, changed = [], []
    for step in range(3):
        before = [tensor.clone() for tensor in engine.canonical_state().tensors.values()]
        micro_batches = share_of(global_batch(step), step, world.data_rank, world.data_size, 7)
        if step == 1 and world.rank == world.size - 1:
            micro_batches = [Batch(micro_batches[0].tensors, micro_batches[0].first_position, weight=float("nan"))]
        result = engine.step(micro_batches, 40)
        skipped.append(bool(result.skipped))
        after = engine.canonical_state().tensors.values()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return skipped, changed, engine.canonical_state().scalars["optimizer_updates"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(gloo_pool: WorkerPool, world_size: int) -> None:
    for skipped, changed, updates in gloo_pool.run(_poisoned_run, world_size):
        assert skipped == [False, True, False]
        assert changed == [True, False, True]
        assert updates == 2


def test_dropout_depends_on_seed_step_and_position_alone() -> None:
    world = single_process_world("cpu")
    dropped = MODEL.model_copy(update={"dropout": 0.2})
    plain = curve(world, ADAMW_CLIPPED, 7, model=dropped)
    engine = make_engine(world, ADAMW_CLIPPED, model=dropped)
    points = []
    for step in range(STEPS):
        torch.rand(step + 1)  # what others draw between steps must not matter
        evaluated = engine.evaluate(
            lambda model, batch: {"x": model(batch["tokens"][:, :-1]).sum()}, [Batch(global_batch(0), 0)]
        )
        assert torch.isfinite(evaluated["x"])
        points.append(take_step(engine, step, 7))
    assert points == plain
    assert plain != curve(world, ADAMW_CLIPPED, 7)
