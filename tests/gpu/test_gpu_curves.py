"""The lockstep curves on one GPU, against the float64 reference and the CPU's own."""

from __future__ import annotations

import pytest
import torch

from distrib.world import World, leave_world
from tests.distrib.lockstep_runs import DATASETS, OPTIMIZERS, Curve, Layout, lockstep_curve
from tests.distrib.test_lockstep_matrix import check, deviation, plain

PLAIN = Layout("native", 0, 1)


@pytest.fixture(autouse=True)
def cleared_memory() -> None:
    torch.cuda.empty_cache()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", DATASETS)
def test_plain(gpu: World, kind: str, optimizer: str, precision: str, accumulation: int) -> None:
    check(lockstep_curve(gpu, PLAIN, kind, optimizer, accumulation, precision), kind, optimizer, precision)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", DATASETS)
def test_fully_shard(gpu_group: World, kind: str, precision: str, zero_stage: int) -> None:
    curve = lockstep_curve(gpu_group, Layout("native", zero_stage, 1), kind, "adamw", 2, precision)
    check(curve, kind, "adamw", precision)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", DATASETS)
def test_deepspeed(gpu: World, kind: str, precision: str, zero_stage: int) -> None:
    pytest.importorskip("deepspeed", reason="NOT RUN: deepspeed is not installed")
    try:
        check(
            lockstep_curve(gpu, Layout("deepspeed", zero_stage, 1), kind, "adamw", 2, precision),
            kind,
            "adamw",
            precision,
        )
    finally:
        leave_world(gpu)  # ends the group of one that DeepSpeed needs


@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
@pytest.mark.parametrize("kind", DATASETS)
def test_activation_checkpointing(gpu: World, kind: str, activation_checkpointing: str) -> None:
    options = {"activation_checkpointing": activation_checkpointing}
    check(lockstep_curve(gpu, PLAIN, kind, "adamw", 2, "fp32", **options), kind, "adamw", "fp32")


@pytest.mark.parametrize("kind", DATASETS)
def test_compile(gpu: World, kind: str) -> None:
    check(lockstep_curve(gpu, PLAIN, kind, "adamw", 2, "fp32", compile=True), kind, "adamw", "fp32")


@pytest.mark.parametrize("kind", DATASETS)
def test_fp16_with_loss_scaling(gpu: World, kind: str) -> None:
    """fp16 rounds more finely than bf16: it has to be at least as close to fp32 as bf16 is."""
    straight = plain(kind, "sgd", "fp32")

    def distance(curve: Curve) -> float:
        return deviation(curve, straight.losses, straight.gradient_norms).loss

    fp16 = lockstep_curve(gpu, PLAIN, kind, "sgd", 2, "fp16")
    assert fp16.digest == straight.digest
    assert distance(fp16) <= distance(lockstep_curve(gpu, PLAIN, kind, "sgd", 2, "bf16"))
