"""The ranks of a world measure their devices, memory, exchange and disk, and are compared with one another: by `lockstep
doctor`, and before training where the recipe says `health.preflight`."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from distrib.probes import DeviceSpeed, measure_all_reduce, measure_device
from distrib.world import World
from launch.checks import Check, rate
from launch.disk import DiskSpeed, existing_part, measure_disk
from launch.exit_codes import DO_NOT_RESTART, RunEnded
from models.flops import peak_flops

log = logging.getLogger("lockstep")
# A rank that reaches less than this share of what the others of its kind reach is named as slow.
_SLOW_SHARE = 0.7
# And so is a GPU that all alike reach less than this share of what its maker says: they may be slowed by heat or power.
_SLOW_PEAK_SHARE = 0.5
_SLOW_DISK_BYTES = 20e6
# For each of a handful of measurements, so that all of them take some seconds.
_SECONDS = 0.3
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RankSpeed:
    """What a rank measured."""

    device: DeviceSpeed
    disk: DiskSpeed | str
    """Of the directory that was named, or why it cannot be written."""


def examine(world: World, directory: Path) -> list[Check]:
    """Every rank measures, at the same time as the others, and hears what all have found; `directory` is where the run is, or
    will be, kept."""
    place = existing_part(directory)
    try:
        disk: DiskSpeed | str = measure_disk(place, _SECONDS)
    except OSError as error:
        disk = f"{error.filename or place}: {error.strerror}"
    ranks: list[RankSpeed] = world.gather_objects(RankSpeed(measure_device(world.device, _SECONDS), disk))
    log.info("measured: %s", ranks[world.rank])
    checks = [_devices(ranks)]
    checks += [_matrix_products(ranks, name) for name in _TYPES if name in ranks[0].device.flops]
    checks.append(
        _compare("memory bandwidth", ranks, lambda rank: rank.device.memory, "B", "look at that machine's memory")
    )
    checks += [
        Check(f"all-reduce, {backend}", "ok", f"{rate(bandwidth, 'B')} bus bandwidth between {world.size} ranks")
        for backend, bandwidth in measure_all_reduce(world, _SECONDS).items()
    ]
    return [*checks, *_disks(ranks, place)]


def look_before_training(world: World, directory: Path, policy: str) -> None:
    """`examine`, told in a line. RunEnded on every rank where something is broken, or is slow and the policy is stop."""
    begun = time.monotonic()
    checks = examine(world, directory)
    figures = ", ".join(f"{check.name} {check.figure}" for check in checks)
    log.info("preflight: %s (%.1f s)", figures, time.monotonic() - begun)
    if world.rank == 0:
        print(f"preflight: {figures} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
    bad = [check for check in checks if check.state != "ok"]
    told = "; ".join(f"{check.name} is {check.state}: {check.figure}; {check.advice}" for check in bad)
    if any(check.state == "broken" for check in bad) or (bad and policy == "stop"):
        raise RunEnded(f"before training: {told}", DO_NOT_RESTART, told_by_all=True)
    if bad:
        log.warning("before training: %s", told)


def _devices(ranks: Sequence[RankSpeed]) -> Check:
    kinds = Counter(rank.device.device for rank in ranks)
    hosts = len({rank.device.host for rank in ranks})
    figure = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Check("devices", "ok", f"{figure} on {hosts} host{'s' if hosts > 1 else ''}")


def _matrix_products(ranks: Sequence[RankSpeed], name: str) -> Check:
    wrong = [number for number, rank in enumerate(ranks) if rank.device.wrong]
    check = _compare(
        f"matrix product, {name}",
        ranks,
        lambda rank: rank.device.flops.get(name, 0.0),
        "FLOP",
        "see what else runs there, and its clock and heat (nvidia-smi -q -d PERFORMANCE)",
    )
    if wrong and name == "fp32":
        return Check(check.name, "broken", f"wrong on {_name(ranks, wrong)}", "leave that machine out")
    peak = peak_flops(ranks[0].device.device, _TYPES[name])
    if peak is None:
        return check
    share = statistics.median(rank.device.flops[name] for rank in ranks) / peak
    figure = f"{check.figure}, {share:.0%} of the peak of {rate(peak, 'FLOP')}"
    if check.state == "ok" and share < _SLOW_PEAK_SHARE:
        return Check(check.name, "slow", figure, "see what else runs there, and clocks, heat and power (nvidia-smi -q)")
    return Check(check.name, check.state, figure, check.advice)


def _disks(ranks: Sequence[RankSpeed], place: Path) -> list[Check]:
    broken = [number for number, rank in enumerate(ranks) if isinstance(rank.disk, str)]
    if broken:
        reasons = {str(ranks[number].disk) for number in broken}
        advice = "make room there, or set run.directory to a place that can be written"
        return [Check("disk", "broken", f"{_name(ranks, broken)}: {', '.join(sorted(reasons))}", advice)]
    advice = f"keep runs on a faster file system than that of {place}"
    checks = []
    for what in ("write", "read"):
        speed_of = attrgetter(f"disk.{what}")
        check = _compare(f"disk, {what}", ranks, speed_of, "B", advice)
        slowest = min(map(speed_of, ranks))
        if check.state == "ok" and slowest < _SLOW_DISK_BYTES:
            check = Check(check.name, "slow", check.figure, advice)
        checks.append(check)
    return checks


def _compare(
    name: str, ranks: Sequence[RankSpeed], speed_of: Callable[[RankSpeed], float], unit: str, advice: str
) -> Check:
    """Names the ranks that are slow beside the other ranks with the same device."""
    speeds = [speed_of(rank) for rank in ranks]
    slow: dict[int, float] = {}
    for number, rank in enumerate(ranks):
        others = [s for n, s in enumerate(speeds) if n != number and ranks[n].device.device == rank.device.device]
        share = speeds[number] / statistics.median(others) if others else 1.0
        if share < _SLOW_SHARE:
            slow[number] = share
    figure = rate(statistics.median(speeds), unit) + (f", the median of {len(ranks)} ranks" if len(ranks) > 1 else "")
    if not slow:
        return Check(name, "ok", figure)
    named = ", ".join(f"{_name(ranks, [number])} {share:.2f} of the others'" for number, share in slow.items())
    return Check(name, "slow", f"{figure}: {named}", advice)


def _name(ranks: Sequence[RankSpeed], numbers: Sequence[int]) -> str:
    return ", ".join(f"rank {number} ({ranks[number].device.host})" for number in numbers)
