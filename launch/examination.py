"""The ranks of a world measure their devices, memory, exchange and disks, and are compared with one another: by `lockstep
doctor`, and before training where the recipe says `health.preflight`.

What the ranks of a host share (its CPU, memory and disks) is compared between hosts, each at its best: among ranks that share
it one is slow because another was quicker to take it. GPUs are compared one by one. Who seems slow measures again, and so
do all the others; what else runs on a machine only ever makes it slower, so the best of its measurements is judged.
"""

from __future__ import annotations

import logging
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distrib.probes import DeviceSpeed, measure_all_reduce, measure_device
from distrib.world import World
from launch.checks import Check, rate
from launch.disk import Disk, look_at_disks
from launch.disk_checks import broken_disks, check_rooms
from launch.exit_codes import DO_NOT_RESTART, FAILED, RunEnded
from models.flops import peak_flops

log = logging.getLogger("lockstep")
# What reaches less than this share of what the others of its kind reach is named as slow.
_SLOW_SHARE = 0.7
# And so is a GPU that all alike reach less than this share of what its maker says: they may be slowed by heat or power.
_SLOW_PEAK_SHARE = 0.5
_SLOW_DISK_BYTES = 20e6
# For each of a handful of measurements, so that all of them take some seconds.
_SECONDS = 0.3
# How often what seems slow is measured again.
_REPEATS = 2
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RankSpeed:
    """What a rank measured."""

    device: DeviceSpeed
    disks: Mapping[str, Disk] = field(default_factory=dict)
    """By the name of the place; empty where another rank of the host looks."""

    def at_its_best(self, again: RankSpeed) -> RankSpeed:
        disks = {name: disk.at_its_best(again.disks[name]) for name, disk in self.disks.items()}
        return RankSpeed(self.device.at_its_best(again.device), disks)


def examine(world: World, places: Mapping[str, Path]) -> list[Check]:
    """Every rank measures, at the same time as the others, and hears what all have found. places: the directories that are, or
    will be, used, by their names; one rank of each host looks at their disks."""
    hosts = world.gather_objects(platform.node())
    looks_at_disks = hosts.index(hosts[world.rank]) == world.rank
    ranks = _measure(world, places if looks_at_disks else {})
    checks = _judge(ranks, places)
    for _ in range(_REPEATS):
        if not any(check.state == "slow" for check in checks):
            break
        again = _measure(world, places if looks_at_disks else {})
        ranks = [rank.at_its_best(other) for rank, other in zip(ranks, again, strict=True)]
        checks = _judge(ranks, places)
    exchange = [
        Check(f"all-reduce, {backend}", "ok", f"{rate(bandwidth, 'B')} bus bandwidth between {world.size} ranks")
        for backend, bandwidth in measure_all_reduce(world, _SECONDS).items()
    ]
    return [*checks, *exchange]


def look_before_training(world: World, places: Mapping[str, Path], policy: str) -> None:
    """`examine`, told in a line. RunEnded on every rank where something is broken, or is slow and the policy is stop.

    What is broken is so at every start: 78. What is slow ends with 1: nothing is wrong with the run, which may be started
    again as it is, elsewhere or once that machine is rid of what slows it; and who starts it again counts how often.
    """
    begun = time.monotonic()
    checks = examine(world, places)
    figures = ", ".join(f"{check.name} {check.figure}" for check in checks)
    log.info("preflight: %s (%.1f s)", figures, time.monotonic() - begun)
    if world.rank == 0:
        print(f"preflight: {figures} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
    bad = [check for check in checks if check.state != "ok"]
    told = "; ".join(f"{check.name} is {check.state}: {check.figure}; {check.advice}" for check in bad)
    if any(check.state == "broken" for check in bad):
        raise RunEnded(f"before training: {told}", DO_NOT_RESTART, told_by_all=True)
    if bad and policy == "stop":
        raise RunEnded(f"before training: {told}", FAILED, told_by_all=True)
    if bad:
        log.warning("before training: %s", told)


def _measure(world: World, places: Mapping[str, Path]) -> list[RankSpeed]:
    """What every rank has measured: of the devices side by side, as they will work, and then of the disks."""
    devices: list[DeviceSpeed] = world.gather_objects(measure_device(world.device, _SECONDS))
    disks: list[dict[str, Disk]] = world.gather_objects(look_at_disks(places, _SECONDS))
    ranks = [RankSpeed(device, of_host) for device, of_host in zip(devices, disks, strict=True)]
    log.info("measured: %s", ranks[world.rank])
    return ranks


def _judge(ranks: Sequence[RankSpeed], places: Mapping[str, Path]) -> list[Check]:
    checks = [_devices(ranks)]
    checks += [_matrix_products(ranks, name) for name in _TYPES if name in ranks[0].device.flops]
    checks.append(_memory(ranks))
    disks = {name: {r.device.host: r.disks[name] for r in ranks if name in r.disks} for name in places}
    for name, by_host in disks.items():
        checks += broken_disks(name, by_host) or _disk_speeds(name, by_host)
    return [*checks, *check_rooms(disks)]


def _devices(ranks: Sequence[RankSpeed]) -> Check:
    kinds = Counter(rank.device.device for rank in ranks)
    hosts = len({rank.device.host for rank in ranks})
    figure = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Check("devices", "ok", f"{figure} on {hosts} host{'s' if hosts > 1 else ''}")


def _matrix_products(ranks: Sequence[RankSpeed], name: str) -> Check:
    wrong = [number for number, rank in enumerate(ranks) if rank.device.wrong]
    check = _compare_devices(
        f"matrix product, {name}",
        ranks,
        lambda device: device.flops.get(name, 0.0),
        "FLOP",
        "see what else runs there, and its clock and heat (nvidia-smi -q -d PERFORMANCE)",
    )
    if wrong and name == "fp32":
        named = ", ".join(f"rank {number} ({ranks[number].device.host})" for number in wrong)
        return Check(check.name, "broken", f"wrong on {named}", "leave that machine out")
    peak = peak_flops(ranks[0].device.device, _TYPES[name])
    if peak is None:
        return check
    share = statistics.median(rank.device.flops[name] for rank in ranks) / peak
    figure = f"{check.figure}, {share:.0%} of the peak of {rate(peak, 'FLOP')}"
    if check.state == "ok" and share < _SLOW_PEAK_SHARE:
        return Check(check.name, "slow", figure, "see what else runs there, and clocks, heat and power (nvidia-smi -q)")
    return Check(check.name, check.state, figure, check.advice)


def _memory(ranks: Sequence[RankSpeed]) -> Check:
    return _compare_devices(
        "memory bandwidth", ranks, lambda device: device.memory, "B", "look at that machine's memory"
    )


def _compare_devices(
    name: str, ranks: Sequence[RankSpeed], speed_of: Callable[[DeviceSpeed], float], unit: str, advice: str
) -> Check:
    """Names the GPUs that are slow beside others of their kind, and the hosts whose CPU is."""
    kinds: dict[str, dict[str, float]] = {}
    for number, rank in enumerate(ranks):
        device = rank.device
        who = f"host {device.host}" if device.device == "cpu" else f"rank {number} ({device.host})"
        alike = kinds.setdefault(device.device, {})
        alike[who] = max(alike.get(who, 0.0), speed_of(device))
    middle = statistics.median(speed_of(rank.device) for rank in ranks)
    figure = rate(middle, unit) + (f", the median of {len(ranks)} ranks" if len(ranks) > 1 else "")
    return _name_slow(name, figure, list(kinds.values()), advice)


def _disk_speeds(name: str, by_host: Mapping[str, Disk]) -> list[Check]:
    """Nothing of a disk that was measured under another name."""
    checks = []
    title = "disk" if name == "run directory" else f"disk of the {name}"
    for what in ("write", "read"):
        speeds = {f"host {host}": getattr(disk.speed, what) for host, disk in by_host.items() if disk.speed}
        if not speeds:
            return []
        several = f", the median of {len(speeds)} hosts" if len(speeds) > 1 else ""
        figure = rate(statistics.median(speeds.values()), "B") + several
        place = next(iter(by_host.values())).place
        advice = f"keep what is used there on a faster file system than that of {place}"
        check = _name_slow(f"{title}, {what}", figure, [speeds], advice)
        if check.state == "ok" and min(speeds.values()) < _SLOW_DISK_BYTES:
            check = Check(check.name, "slow", figure, advice)
        checks.append(check)
    return checks


def _name_slow(name: str, figure: str, kinds: Sequence[Mapping[str, float]], advice: str) -> Check:
    """kinds: who is compared with one another, and how fast they are. Who is alone is not slow."""
    slow: dict[str, float] = {}
    for speeds in kinds:
        for who, speed in speeds.items():
            others = [other for key, other in speeds.items() if key != who]
            share = speed / statistics.median(others) if others else 1.0
            if share < _SLOW_SHARE:
                slow[who] = share
    if not slow:
        return Check(name, "ok", figure)
    named = ", ".join(f"{who} {share:.2f} of the others'" for who, share in slow.items())
    return Check(name, "slow", f"{figure}: {named}", advice)
