"""Normalisation of feature maps."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm (Ioffe & Szegedy 2015) whose statistics and scale stay fp32 when the rest of the model is bf16 or fp16.

    It mixes the samples of a micro-batch, so a run with it depends on micro-batches and world size; GroupNorm does not.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of the whole model must not reach the running statistics: bf16 would swallow their small updates.
        mean, variance = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        if self.running_mean.dtype != torch.float32:
            self.running_mean = mean.to(self.running_mean.device)
            self.running_var = variance.to(self.running_var.device)
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype."""
        if self.training:
            self.num_batches_tracked.add_(1)
        # torch takes half-precision maps with an fp32 scale on every device, with a half-precision scale not on the CPU.
        return F.batch_norm(
            maps,
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


def make_norm(kind: str, channels: int, groups: int) -> nn.Module:
    """`none`; `batch`, which mixes samples; or `group` (Wu & He 2018), which does not."""
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return BatchNorm(channels)
    return nn.GroupNorm(groups, channels)
