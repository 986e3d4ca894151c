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


def pytest_report_header() -> str:
    """The layouts that need more GPUs than there are."""
    missing = [size for size in (2, 3, 4) if size > torch.cuda.device_count()]
    return f"NOT RUN, for want of GPUs: worlds of {', '.join(map(str, missing))}" if missing else "all worlds run"


@pytest.fixture(scope="session")
def nccl_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(device_kind="cuda")
    yield pool
    pool.close()
