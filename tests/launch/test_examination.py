"""Ranks measure, are compared with one another, and who is slow or wrong is named."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distrib import probes
from distrib.probes import DeviceSpeed, product_is_right
from distrib.world import World
from launch import disk as disks_of_a_host
from launch import examination
from launch.checks import Check, as_table, rate
from launch.disk import Disk, DiskSpeed, existing_part, look_at_disks, measure_disk
from launch.disk_checks import broken_disks, check_rooms
from launch.examination import (
    RankSpeed,
    _devices,
    _disk_speeds,
    _matrix_products,
    _memory,
    examine,
    look_before_training,
)
from launch.exit_codes import DO_NOT_RESTART, FAILED, RunEnded
from tests.worker_pool import WorkerPool

H100 = "NVIDIA H100 80GB HBM3"
SHARED = ("matrix product, fp32", "matrix product, bf16", "memory bandwidth", "disk, write", "disk, read")
GIB = 1 << 30


def rank(host: str, flops: float = 100e9, **device: object) -> RankSpeed:
    facts = {"device": "cpu", "flops": {"fp32": flops, "bf16": 2 * flops}, "memory": 10e9} | device
    return RankSpeed(DeviceSpeed(host, **facts))  # type: ignore[arg-type]


def disk(write: float = 5e8, read: float = 1e9, free: int = 50 * GIB, **more: object) -> Disk:
    facts = {"free_inodes": None, "speed": DiskSpeed(write, read)} | more
    return Disk(Path("/runs"), Path("/runs"), 1, free, **facts)  # type: ignore[arg-type]


def test_a_gpu_that_is_slow_beside_the_others_is_named_with_its_host() -> None:
    ranks = [
        rank(host, flops, device="a GPU") for host, flops in (("a", 100e9), ("a", 95e9), ("b", 60e9), ("b", 105e9))
    ]
    check = _matrix_products(ranks, "fp32")
    assert (check.name, check.state) == ("matrix product, fp32", "slow")
    assert check.figure == "97.5 GFLOP/s, the median of 4 ranks: rank 2 (b) 0.60 of the others'"
    assert check.advice
    assert _matrix_products([rank("a", device="a GPU"), rank("b", 75e9, device="a GPU")], "fp32").state == "ok"


def test_ranks_that_share_a_cpu_are_compared_as_hosts_each_at_its_best() -> None:
    """Who of them is slow only came late to what they share."""
    assert _matrix_products([rank("a"), rank("a", 20e9)], "fp32").state == "ok"
    assert _matrix_products([rank("a"), rank("a", 20e9), rank("b", 20e9), rank("b", 75e9)], "fp32").state == "ok"
    check = _matrix_products([rank("a"), rank("a", 95e9), rank("b", 60e9), rank("b", 65e9)], "fp32")
    assert (check.state, check.figure) == ("slow", "80 GFLOP/s, the median of 4 ranks: host b 0.65 of the others'")


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
    def speeds(**by_host: Disk) -> list[Check]:
        return _disk_speeds("run directory", by_host)

    assert [check.state for check in speeds(a=disk(), b=disk())] == ["ok", "ok"]
    slow = speeds(a=disk(), b=disk(write=1e8))
    assert [(check.name, check.state) for check in slow] == [("disk, write", "slow"), ("disk, read", "ok")]
    assert "host b 0.20 of the others'" in slow[0].figure
    assert speeds(a=disk(write=1e6))[0].state == "slow"
    assert _disk_speeds("cache", {"a": disk()})[0].name == "disk of the cache, write"
    assert _disk_speeds("cache", {"a": disk(speed=None)}) == []
    (broken,) = broken_disks("run directory", {"a": disk(), "b": disk(problem="/runs: No space left on device")})
    assert (broken.name, broken.state, broken.figure) == ("disk", "broken", "/runs: No space left on device (host b)")


def test_the_host_with_the_least_room_is_told() -> None:
    def room(**by_host: Disk) -> Check:
        (check,) = check_rooms({"cache": by_host})
        return check

    assert room(a=disk()).figure == "/runs: 50.0 GiB free, inodes without a limit"
    check = room(a=disk(), b=disk(free=2 * GIB), c=disk())
    assert (check.name, check.state) == ("cache", "ok")
    assert check.figure == "/runs: 2.0 GiB free, inodes without a limit on host b, the fullest of 3"
    assert room(a=disk(), b=disk(free=GIB // 2)).state == "broken"
    check = room(a=disk(free=2 * GIB), b=disk(free_inodes=17))
    assert check.state == "broken"
    assert "17 inodes free on host b" in check.figure


def test_two_directories_on_one_disk_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Path] = []

    def measure(directory: Path, seconds: float) -> DiskSpeed:
        measured.append(directory)
        return DiskSpeed(1.0, 2.0)

    monkeypatch.setattr(disks_of_a_host, "measure_disk", measure)
    found = look_at_disks({"run directory": tmp_path / "runs", "cache": tmp_path, "elsewhere": Path("/dev/shm")}, 0.05)
    assert measured == [tmp_path, Path("/dev/shm")]
    assert [found[name].speed is None for name in found] == [False, True, False]
    assert found["cache"].free_bytes > 0


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


def _examined(world: World, directory: Path, slow_measurements: int, hosts: int) -> tuple[list[Check], int]:
    """As on so many hosts. Rank 1 is slow in whatever it measures in its first measurements. Also how often it measured."""
    patch = pytest.MonkeyPatch()
    measurements = 0

    def slower(measure: Any, by: Callable[[Any], Any]) -> Any:
        return lambda *given: (
            by(measure(*given)) if world.rank == 1 and measurements <= slow_measurements else measure(*given)
        )

    def begin(*given: Any) -> Any:
        nonlocal measurements
        measurements += 1
        return measure_device(*given)

    measure_device = examination.measure_device
    patch.setattr(examination, "measure_device", begin)
    patch.setattr(probes, "_best_seconds", slower(probes._best_seconds, lambda seconds: 100 * seconds))
    patch.setattr(
        disks_of_a_host,
        "measure_disk",
        slower(lambda *_: DiskSpeed(1e9, 1e9), lambda speed: DiskSpeed(speed.write / 10, speed.read / 10)),
    )
    patch.setattr(platform, "node", lambda: f"host-{world.rank % hosts}")
    try:
        return examine(world, {"run directory": directory}), measurements
    finally:
        patch.undo()


def examined(pool: WorkerPool, directory: Path, slow_measurements: int, hosts: int) -> tuple[dict[str, Check], int]:
    first, second = pool.run(_examined, 2, directory, slow_measurements, hosts)
    assert first == second
    return {check.name: check for check in first[0]}, first[1]


def test_ranks_of_one_host_are_not_slow_beside_each_other(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    checks, measurements = examined(gloo_pool, tmp_path, slow_measurements=100, hosts=1)
    assert set(checks) == {"devices", *SHARED, "all-reduce, gloo", "run directory"}
    assert {check.state for check in checks.values()} == {"ok"}
    assert measurements == 1


def test_a_host_that_is_slow_each_time_is_named(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    checks, measurements = examined(gloo_pool, tmp_path, slow_measurements=100, hosts=2)
    for name in SHARED:
        assert checks[name].state == "slow", checks[name]
        assert "host host-1 0." in checks[name].figure
        assert "host-0" not in checks[name].figure
    assert measurements == 3


def test_a_host_that_was_slow_once_is_not_named(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    checks, measurements = examined(gloo_pool, tmp_path, slow_measurements=1, hosts=2)
    named = [check.figure for check in checks.values() if " of the others'" in check.figure]
    # The two share a machine, which may be a busy one: of factors of a hundred and ten nothing is left all the same.
    assert not any(share < 0.2 for figure in named for share in map(float, re.findall(r"host-1 (\d\.\d+) of", figure)))
    assert measurements >= 2


def _before_training(world: World, directory: Path, policy: str) -> tuple[str, int, bool]:
    if world.rank == 1:
        probes.product_is_right, right = lambda device: False, probes.product_is_right
    with pytest.raises(RunEnded) as ended:
        look_before_training(world, {"run directory": directory}, policy)
    if world.rank == 1:
        probes.product_is_right = right
    return str(ended.value), ended.value.exit_code, ended.value.told_by_all


def test_a_broken_rank_ends_the_run_before_training(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    for ended in gloo_pool.run(_before_training, 2, tmp_path, "warn"):
        assert "matrix product, fp32 is broken: wrong on rank 1" in ended[0]
        assert ended[1:] == (DO_NOT_RESTART, True)


def _look_at_slow_disk(world: World, directory: Path, policy: str) -> tuple[str, int] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disks_of_a_host, "measure_disk", lambda *_: DiskSpeed(1e6, 1e9))
        try:
            look_before_training(world, {"run directory": directory}, policy)
        except RunEnded as ended:
            return str(ended), ended.exit_code
    return None


def test_what_is_slow_ends_a_run_only_where_that_is_asked_and_may_be_started_again(
    gloo_pool: WorkerPool, tmp_path: Path
) -> None:
    assert gloo_pool.run(_look_at_slow_disk, 1, tmp_path, "warn") == [None]
    ((told, code),) = gloo_pool.run(_look_at_slow_disk, 1, tmp_path, "stop")
    assert "disk, write is slow: 1 MB/s" in told
    assert code == FAILED


def _look_at_full_disk(world: World, directory: Path) -> tuple[str, int]:
    """The second host has no room there, and the first, which speaks, has."""
    look = disks_of_a_host.look_at_room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: f"host-{world.rank}")
        if world.rank == 1:
            patch.setattr(disks_of_a_host, "look_at_room", lambda place: replace(look(place), free_bytes=1000))
        with pytest.raises(RunEnded) as ended:
            look_before_training(world, {"run directory": directory, "cache": directory / "cache"}, "warn")
    return str(ended.value), ended.value.exit_code


def test_a_host_without_room_ends_the_run_before_training(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    for told, code in gloo_pool.run(_look_at_full_disk, 2, tmp_path):
        assert f"run directory is broken: {tmp_path}: 0.0 GiB free" in told
        assert "cache is broken" in told
        assert "on host host-1, the fullest of 2" in told
        assert code == DO_NOT_RESTART


def test_the_median_of_the_others_is_what_counts() -> None:
    """Beside one fast host of two the other is slow; its own figure does not soften the comparison."""
    check = _memory([rank("a", memory=10e9), rank("b", memory=6e9)])
    assert (check.state, check.advice) == ("slow", "look at that machine's memory")
    assert "host b 0.60 of the others'" in check.figure
    assert "host a" not in check.figure
