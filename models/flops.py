"""Sizes: parameters, FLOPs of a training sample, and the peak of known accelerators."""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.build import InputShape
from models.tasks import Task

FLOP_CONVENTION = (
    "forward and backward, 2 FLOPs per multiply-add of every matrix multiplication and convolution; attention over the "
    "full square, whatever its causal half and separate documents leave out; nothing for element-wise work, embedding "
    "look-ups or recomputation"
)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen scalars; a tied parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_sample(build: Callable[[], nn.Module], task: Task, shape: InputShape) -> int:
    """FLOPs of the forward and backward pass of one sample, counted operation by operation on the meta device.

    `build` makes the model; nothing is allocated. Divide by `shape.sequence_tokens` for FLOPs per token. The count
    follows FLOP_CONVENTION. A user's model that cannot run on the meta device raises what it raises there.
    """
    # On the meta device attention runs as plain matrix multiplications, which are counted. On the CPU it would run as
    # a fused kernel for which the counter has no formula, and count nothing at all.
    samples = 2  # BatchNorm refuses to train on a single value per channel
    with torch.device("meta"):
        model = build().train()
        batch = task.example(shape, samples, device="meta")
        with FlopCounterMode(display=False) as counter:
            task.loss(model, batch).total.backward()
    return counter.get_total_flops() // samples


_TERA = 1e12
_PEAKS: tuple[tuple[str, dict[torch.dtype, float]], ...] = tuple(
    (pattern, {torch.bfloat16: bf16 * _TERA, torch.float16: fp16 * _TERA, torch.float32: fp32 * _TERA})
    for pattern, bf16, fp16, fp32 in (
        # Dense peaks in TFLOPS from the makers' data sheets, whose figures with sparsity are twice these: bf16 and fp16
        # on tensor cores with fp32 accumulation, fp32 without TF32. 0: the device has no such unit. The whole name must
        # match: a laptop, NVL or MIG variant of a device has another peak.
        (r"NVIDIA B200", 2250, 2250, 75),  # HGX B200, one of eight
        (r"NVIDIA H200", 989.4, 989.4, 66.9),  # H200 SXM
        (r"NVIDIA H200 NVL", 835.5, 835.5, 60),
        (r"NVIDIA GH200 (480GB|144G HBM3e)", 989.4, 989.4, 66.9),
        (r"NVIDIA H100 80GB HBM3", 989.4, 989.4, 66.9),  # H100 SXM
        (r"NVIDIA H100 PCIe", 756, 756, 51),
        (r"NVIDIA H100 NVL", 835.5, 835.5, 60),
        (r"(NVIDIA )?A100-(SXM4|SXM|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312, 312, 19.5),
        (r"NVIDIA A40", 149.7, 149.7, 37.4),
        (r"NVIDIA A10", 125, 125, 31.2),
        (r"NVIDIA L40S", 362, 362, 91.6),
        (r"NVIDIA L40", 181, 181, 90.5),
        (r"NVIDIA L4", 121, 121, 30.3),
        (r"NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8),  # NVIDIA RTX Blackwell architecture paper, appendix
        (r"NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),  # NVIDIA Ada architecture paper, appendix
        (r"NVIDIA GeForce RTX 3090", 71, 71, 35.6),  # NVIDIA GA102 architecture paper, appendix
        (r"Tesla V100-SXM2-(16|32)GB", 0, 125, 15.7),
        (r"Tesla V100-PCIE-(16|32)GB", 0, 112, 14),
        (r"(NVIDIA |Tesla )?T4", 0, 65, 8.1),
        (r"AMD Instinct MI300X", 1307.4, 1307.4, 163.4),
    )
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s of a device, by the name the driver gives it (`torch.cuda.get_device_name`).

    None where the device or the dtype on it is unknown: never another device's peak.
    """
    for pattern, peaks in _PEAKS:
        if re.fullmatch(pattern, device_name):
            return peaks.get(dtype) or None
    return None
