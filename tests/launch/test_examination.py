"""Ranks measure, are compared with one another, and who is slow or wrong is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from distrib import probes
from distrib.probes import DeviceSpeed, product_is_right
from distrib.world import World
from launch.checks import Check, as_table, rate
from launch.disk import DiskSpeed, existing_part, measure_disk
from launch.examination import RankSpeed, _compare, _devices, _disks, _matrix_products, examine, look_before_training
from launch.exit_codes import DO_NOT_RESTART, RunEnded
from tests.worker_pool import WorkerPool

H100 = "NVIDIA H100 80GB HBM3"


GOOD_DISK = DiskSpeed(5e8, 1e9)


def rank(host: str, flops: float = 100e9, disk: DiskSpeed | str = GOOD_DISK, **device: object) -> RankSpeed:
    facts = {"device": "cpu", "flops": {"fp32": flops, "bf16": 2 * flops}, "memory": 10e9} | device
    return RankSpeed(DeviceSpeed(host, **facts), disk)  # type: ignore[arg-type]


def test_a_rank_that_is_slow_beside_the_others_is_named_with_its_host() -> None:
    ranks = [rank("a"), rank("a", 95e9), rank("b", 60e9), rank("b", 105e9)]
    check = _matrix_products(ranks, "fp32")
    assert (check.name, check.state) == ("matrix product, fp32", "slow")
    assert check.figure == "97.5 GFLOP/s, the median of 4 ranks: rank 2 (b) 0.60 of the others'"
    assert check.advice
    assert _matrix_products([rank("a"), rank("b", 75e9)], "fp32").state == "ok"
    assert "rank 1 (b)" in _matrix_products([rank("a"), rank("b", 65e9)], "fp32").figure


def test_other_devices_are_another_kind_and_not_slow() -> None:
    ranks = [rank("a", 100e9), rank("b", 5e9, device="a phone")]
    assert _matrix_products(ranks, "fp32").state == "ok"
    assert _devices(ranks).figure == "1 x cpu, 1 x a phone on 2 hosts"


def test_a_gpu_far_below_its_peak_is_slow_though_all_are_alike() -> None:
    fast, slow = ([rank("a", flops / 2, device=H100)] * 2 for flops in (600e12, 300e12))
    assert _matrix_products(fast, "bf16").state == "ok"
    check = _matrix_products(slow, "bf16")
    assert check.state == "slow"
    assert "30% of the peak of 989 TFLOP/s" in check.figure


def test_a_wrong_product_is_broken_hardware() -> None:
    check = _matrix_products([rank("a"), rank("b", wrong=True)], "fp32")
    assert (check.state, check.figure) == ("broken", "wrong on rank 1 (b)")
    assert product_is_right(torch.device("cpu"))

    def one_wrong_element(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[17, 300] += 1
        return product

    assert not product_is_right(torch.device("cpu"), one_wrong_element)


def test_disks() -> None:
    place = Path("/runs")
    assert [check.state for check in _disks([rank("a"), rank("b")], place)] == ["ok", "ok"]
    slow = _disks([rank("a"), rank("b", disk=DiskSpeed(1e8, 1e9))], place)
    assert [check.state for check in slow] == ["slow", "ok"]
    assert "rank 1 (b) 0.20" in slow[0].figure
    assert _disks([rank("a", disk=DiskSpeed(1e6, 1e9))], place)[0].state == "slow"
    (broken,) = _disks([rank("a"), rank("b", disk="/runs: No space left on device")], place)
    assert (broken.state, broken.figure) == ("broken", "rank 1 (b): /runs: No space left on device")


def test_a_disk_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    assert existing_part(tmp_path / "not" / "there") == tmp_path
    speed = measure_disk(tmp_path, seconds=0.05)
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="/proc"):
        measure_disk(Path("/proc"), seconds=0.05)


def test_a_table_has_a_line_a_check() -> None:
    lines = as_table([Check("disk", "ok", "1 GB/s"), Check("W&B", "broken", "gone", "call them")]).splitlines()
    assert lines == ["check  state   found", "disk   ok      1 GB/s", "W&B    broken  gone; call them"]
    assert [rate(x, "B") for x in (1.234e13, 5e9, 12.0)] == ["12.3 TB/s", "5 GB/s", "12 B/s"]


def _examined(world: World, directory: Path, slow: bool) -> list[Check]:
    if slow and world.rank == 1:
        measured = probes._best_seconds
        probes._best_seconds = lambda *given: 100 * measured(*given)
        try:
            return examine(world, directory)
        finally:
            probes._best_seconds = measured
    return examine(world, directory)


def test_ranks_examine_themselves_and_hear_the_same(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    first, second = gloo_pool.run(_examined, 2, tmp_path, True)
    assert first == second
    checks = {check.name: check for check in first}
    assert set(checks) == {
        "devices", "matrix product, fp32", "matrix product, bf16", "memory bandwidth", "all-reduce, gloo", "disk, write",
        "disk, read",
    }  # fmt: skip
    for name in ("matrix product, fp32", "memory bandwidth"):
        assert checks[name].state == "slow"
        assert f"rank 1 ({os.uname().nodename})" in checks[name].figure


def _before_training(world: World, directory: Path, policy: str) -> tuple[str, int, bool]:
    if world.rank == 1:
        probes.product_is_right, right = lambda device: False, probes.product_is_right
    with pytest.raises(RunEnded) as ended:
        look_before_training(world, directory, policy)
    if world.rank == 1:
        probes.product_is_right = right
    return str(ended.value), ended.value.exit_code, ended.value.told_by_all


def test_a_broken_rank_ends_the_run_before_training(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    for ended in gloo_pool.run(_before_training, 2, tmp_path, "warn"):
        assert "matrix product, fp32 is broken: wrong on rank 1" in ended[0]
        assert ended[1:] == (DO_NOT_RESTART, True)


def test_the_median_of_the_others_is_what_counts() -> None:
    """Beside one fast rank of two the other is slow; its own figure does not soften the comparison."""
    ranks = [rank("a", memory=10e9), rank("b", memory=6e9)]
    check = _compare("memory bandwidth", ranks, lambda one: one.device.memory, "B", "look there")
    assert (check.state, check.advice) == ("slow", "look there")
    assert "rank 1 (b) 0.60 of the others'" in check.figure
    assert "rank 0" not in check.figure
