"""The lockstep matrix over NCCL: what `make test-all` runs over gloo, on as many GPUs as there are."""

from __future__ import annotations

import pytest
import torch

from tests.distrib.lockstep_runs import DATASETS, Layout, lockstep_curves
from tests.distrib.test_lockstep_matrix import LAYOUTS, SETTINGS, check
from tests.worker_pool import WorkerPool

# What needs more GPUs than there are is told as not run by the header.
FITTING = [layout for layout in LAYOUTS if 1 < layout.world_size <= torch.cuda.device_count()]


@pytest.mark.parametrize(("optimizer", "precision", "accumulations"), SETTINGS)
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("layout", FITTING, ids=lambda layout: f"{layout.name}, world {layout.world_size}")
def test_the_whole_matrix(
    nccl_pool: WorkerPool,
    layout: Layout,
    kind: str,
    optimizer: str,
    precision: str,
    accumulations: tuple[int, ...],
) -> None:
    answers = nccl_pool.run(lockstep_curves, layout.world_size, layout, kind, optimizer, precision, accumulations)
    assert all(curves == answers[0] for curves in answers), "ranks must report the same numbers"
    for curve in answers[0].values():
        check(curve, kind, optimizer, precision)
