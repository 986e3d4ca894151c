"""Shared by all tests: a session-wide pool of worker processes, so that a distributed test costs no interpreter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Several processes share two cores: without this each would start a thread per core. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach for a hub or a tracker's servers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from tests.worker_pool import WorkerPool

# How long an example takes says what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Nor may it read what whoever runs the tests told `accelerate config`. The folder goes with this process.
_HOME = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = _HOME.name


def pytest_report_header() -> str:
    """What a green run does not prove."""
    return "not run unless named: tests/gpu (needs a GPU), tests/multi_gpu (needs several)"


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()
