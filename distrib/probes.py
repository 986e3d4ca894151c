"""How fast a rank computes, copies and exchanges, measured within seconds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from distrib.world import World

# Large enough to keep the device busy, small enough for a slow one. Edges of the square matrices; bytes that are copied and
# that are exchanged.
_MATRIX = {"cpu": 512, "cuda": 8192}
_COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_REDUCED_BYTES = {"gloo": 4 << 20, "nccl": 256 << 20}
_MOST_REPEATS = 50


@dataclass(frozen=True)
class DeviceSpeed:
    """What one rank measured of its own device, alone or beside the other ranks of its host."""

    host: str
    device: str
    """`cpu`, or the name of the GPU."""
    flops: dict[str, float] = field(default_factory=dict)
    """FLOP/s of a square matrix product by the name of its type, 2 per multiply-add; the best of several."""
    memory: float = 0.0
    """Bytes/s of a copy within the device's memory, what is read and what is written, as STREAM counts them
    (https://www.cs.virginia.edu/stream/ref.html)."""
    wrong: bool = False
    """Whether a matrix product was not what it must be."""

    def at_its_best(self, again: DeviceSpeed) -> DeviceSpeed:
        """Of two measurements of one device: what else runs can only make it slower, and once wrong is wrong."""
        flops = {name: max(speed, again.flops[name]) for name, speed in self.flops.items()}
        memory = max(self.memory, again.memory)
        return DeviceSpeed(self.host, self.device, flops, memory, self.wrong or again.wrong)


def measure_device(device: torch.device, seconds: float) -> DeviceSpeed:
    """Takes at most about `seconds` for each of its measurements, or as long as a single run of one takes."""
    return DeviceSpeed(
        platform.node(),
        device_name(device),
        {name: _matrix_flops(device, dtype, seconds) for name, dtype in _types_of(device).items()},
        _memory_bandwidth(device, seconds),
        not product_is_right(device),
    )


def device_name(device: torch.device) -> str:
    """`cpu`, or what the driver calls the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure_all_reduce(world: World, seconds: float) -> dict[str, float]:
    """Bus bandwidth in bytes/s by backend: gloo between hosts' memories and, with GPUs, NCCL between theirs. Every rank calls
    it together and gets the same; empty for one rank.

    Bus bandwidth is bytes / time x 2 (n - 1) / n for n ranks: what a link must carry, comparable over any number of ranks
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    if world.size == 1:
        return {}
    backends: dict[str, tuple[torch.device, Any]] = {"gloo": (torch.device("cpu"), world.host_group)}
    if world.device.type == "cuda":
        backends["nccl"] = (world.device, world.data_group)
    return {name: _bus_bandwidth(name, device, group, world, seconds) for name, (device, group) in backends.items()}


def product_is_right(device: torch.device, multiply: Callable[..., torch.Tensor] = torch.matmul) -> bool:
    """Whether a product of matrices of small whole numbers is exact, as it must be in any order of summation.

    Checked in float64 by multiplying both sides with eight random vectors: R. Freivalds, "Probabilistic machines can use less
    running time", IFIP 1977; a wrong product passes with a chance of at most 2**-24, one wrong element never.
    """
    edge = _MATRIX[device.type]
    draw = partial(torch.randint, generator=torch.Generator(device).manual_seed(0), device=device)
    # No sum of products reaches 2**24, below which fp32 holds every whole number; TF32 holds the factors.
    left, right = (draw(-8, 9, (edge, edge)).float() for _ in range(2))
    vectors = draw(1, 9, (edge, 8)).double()
    return torch.equal(multiply(left, right).double() @ vectors, left.double() @ (right.double() @ vectors))


def _types_of(device: torch.device) -> dict[str, torch.dtype]:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        types["fp16"] = torch.float16
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            del types["bf16"]
    return types


def _matrix_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    edge = _MATRIX[device.type]
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * edge**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device, seconds)


def _memory_bandwidth(device: torch.device, seconds: float) -> float:
    size = _COPIED_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device, seconds)


def _best_seconds(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`; the first only warms up, unless there is no time for another."""
    ends = time.perf_counter() + seconds
    durations: list[float] = []
    while not durations or (len(durations) < _MOST_REPEATS and time.perf_counter() < ends):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - begun)
    return min(durations[1:] or durations)


def _bus_bandwidth(backend: str, device: torch.device, group: Any, world: World, seconds: float) -> float:
    tensor = torch.zeros(_REDUCED_BYTES[backend] // 4, device=device)

    def slowest(repeats: int) -> float:
        """Seconds of one all-reduce, of the rank that took longest."""
        begun = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return max(world.gather_objects(time.perf_counter() - begun)) / repeats

    slowest(1)  # makes connections
    # The same number on every rank, since they agree on the time of one.
    repeats = max(1, min(_MOST_REPEATS, int(seconds / slowest(1))))
    return _REDUCED_BYTES[backend] / slowest(repeats) * 2 * (world.size - 1) / world.size
