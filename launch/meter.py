"""What a step cost: time, waiting, throughput, utilisation and memory."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Meter:
    """Turns the clock into the cost columns of a step's record."""

    def __init__(
        self, device: torch.device, *, flops_per_item: float | None, peak_flops: float | None, ranks: int
    ) -> None:
        self._device = device
        # Utilisation of all ranks at one item per second; None where the device's peak or the model's FLOPs are unknown.
        self._mfu_per_rate = (
            None if peak_flops is None or flops_per_item is None else flops_per_item / (peak_flops * ranks)
        )
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Leaves out what happened since the last step: an evaluation or a checkpoint is not the step's time."""
        self._last = time.perf_counter()

    def measure(self, items: int) -> dict[str, float | int | None]:
        """The columns of the step that has just been taken, since the one before."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        items_per_second = items / seconds
        mfu = None if self._mfu_per_rate is None else items_per_second * self._mfu_per_rate
        return {
            "step_seconds": seconds,
            "items_per_second": items_per_second,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: on the device, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
