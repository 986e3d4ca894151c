"""What the ranks agree on after a step, exactly."""

from __future__ import annotations

import math

import pytest
import torch

from distrib.engine import StepResult
from distrib.reduction import StepReport, report_step
from distrib.world import World
from tests.worker_pool import WorkerPool

FOLDS = [-1, 2**63 - 1, 0x1234_5678_9ABC_DEF0]


def _report(world: World, norm: float, asked: int | None) -> StepReport:
    result = StepResult(
        loss_sum=torch.tensor(1.25 + world.rank, dtype=torch.float64),
        gradient_norm=torch.tensor(norm),
        skipped=torch.tensor(0.0 if math.isfinite(norm) else 1.0),
        learning_rate=0.5,
    )
    pending = report_step(
        result,
        fold=FOLDS[world.rank],
        stop_requested=world.rank == asked,
        data_wait_seconds=float(world.rank),
        world=world,
    )
    return pending.read()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_are_exact_and_the_same_everywhere(gloo_pool: WorkerPool, world_size: int) -> None:
    reports = gloo_pool.run(_report, world_size, 0.1, None)
    assert all(report == reports[0] for report in reports)
    report = reports[0]
    assert report.loss_sum == sum(1.25 + rank for rank in range(world_size))
    assert report.fold == sum(FOLDS[:world_size]) % 2**64
    assert report.data_wait_seconds == pytest.approx(sum(range(world_size)) / world_size)
    assert report.gradient_norm == torch.tensor(0.1).item()
    assert not report.skipped
    assert not report.stop_requested
    assert report.learning_rate == 0.5


def test_one_rank_that_is_asked_to_stop_stops_all(gloo_pool: WorkerPool) -> None:
    assert all(report.stop_requested for report in gloo_pool.run(_report, 3, 0.1, 2))


def test_a_norm_that_is_not_finite_arrives_as_it_is(gloo_pool: WorkerPool) -> None:
    for report in gloo_pool.run(_report, 2, float("inf"), None):
        assert report.gradient_norm == math.inf
        assert report.skipped


def _vitals(world: World, streams: int) -> StepReport:
    result = StepResult(
        loss_sum=torch.tensor(1.0, dtype=torch.float64),
        gradient_norm=torch.tensor(1.0),
        skipped=torch.tensor(0.0),
        learning_rate=0.5,
        stream_loss_sums=torch.ones(streams, dtype=torch.float64) if streams else None,
    )
    own = [0.1 * (world.rank + 1), math.nan if world.rank == 1 else -3.0, 65535.0]
    vitals = torch.tensor(own, dtype=torch.float64)
    return report_step(result, fold=-1, stop_requested=False, data_wait_seconds=0.0, world=world, vitals=vitals).read()


@pytest.mark.parametrize("streams", [0, 2])
def test_what_each_rank_tells_of_itself_arrives_as_it_is(gloo_pool: WorkerPool, streams: int) -> None:
    for report in gloo_pool.run(_vitals, 3, streams):
        assert [vitals[0] for vitals in report.vitals] == [0.1 * (rank + 1) for rank in range(3)]
        assert [math.isnan(vitals[1]) for vitals in report.vitals] == [False, True, False]
        assert [vitals[2] for vitals in report.vitals] == [65535.0] * 3
        assert report.stream_loss_sums == (3.0,) * streams
        assert report.fold == 2**64 - 3
