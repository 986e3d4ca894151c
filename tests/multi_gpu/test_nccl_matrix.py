"""The lockstep matrix over NCCL: what `make test-all` runs over gloo, on as many GPUs as there are."""

from __future__ import annotations

import pytest
import torch

from tests.distrib.lockstep_runs import DATASETS, Layout
from tests.distrib.test_lockstep_matrix import ACCUMULATIONS, LAYOUTS, SETTINGS, deviations
from tests.worker_pool import WorkerPool

# What needs more GPUs than there are is told as not run by the header.
FITTING = [layout for layout in LAYOUTS if 1 < layout.world_size <= torch.cuda.device_count()]


@pytest.mark.parametrize(("optimizer", "precision"), SETTINGS)
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("layout", FITTING, ids=lambda layout: f"{layout.name}, world {layout.world_size}")
def test_the_whole_matrix(nccl_pool: WorkerPool, layout: Layout, kind: str, optimizer: str, precision: str) -> None:
    assert len(deviations(nccl_pool, layout, kind, optimizer, precision)) == len(ACCUMULATIONS)
