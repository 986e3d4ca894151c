"""Health on a GPU: checksums, the pace of a forward pass, and what a device reaches."""

from __future__ import annotations

import time

import torch

from distrib.copies import checksum
from distrib.pace import Pace
from distrib.probes import measure_device
from distrib.world import World


def test_a_flipped_bit_changes_the_checksum(gpu: World) -> None:
    tensors = [torch.randn(1000, 37, device=gpu.device), torch.randn(1 << 23, device=gpu.device)]
    before = checksum(tensors).item()
    for tensor, index in ((tensors[0], 5), (tensors[1], 0), (tensors[1], (1 << 23) - 1)):
        bits = tensor.flatten().view(torch.int32)
        for bit in (0, 22, 30):
            bits[index] ^= 1 << bit
            assert checksum(tensors).item() != before
            bits[index] ^= 1 << bit
    assert checksum(tensors).item() == before


def test_a_pass_is_timed_on_the_device(gpu: World) -> None:
    pace = Pace(gpu.device)
    pace.ask()
    with pace.of_forward(4):
        time.sleep(0.05)  # the host that is slow counts, too
    torch.cuda.synchronize(gpu.device)
    seconds, rows = pace.take()
    assert 0.05 <= seconds < 60
    assert rows == 4


def test_a_device_is_measured_and_computes_right(gpu: World) -> None:
    speed = measure_device(gpu.device, 0.3)
    assert not speed.wrong
    assert speed.memory > 1e10
    assert all(flops > 1e11 for flops in speed.flops.values())
