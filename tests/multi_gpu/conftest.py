"""The lockstep matrix over NCCL, a GPU per rank. Collected only when it is named: `pytest tests/multi_gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.worker_pool import WorkerPool


def pytest_collection_modifyitems() -> None:
    if torch.cuda.device_count() < 2:
        pytest.exit(
            f"tests/multi_gpu: NOT RUN: torch sees {torch.cuda.device_count()} GPUs, two are needed", returncode=1
        )


@pytest.fixture(scope="session")
def nccl_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(device_kind="cuda")
    yield pool
    pool.close()
