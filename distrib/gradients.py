"""Between the backward pass and the update: the global norm, clipping, and leaving out a step that is not finite.

For engines whose gradients are plain tensors of this rank. Nothing here waits on the host.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def clip_gradients(
    gradients: list[torch.Tensor],
    *,
    clip_norm: float | None,
    loss_scale: torch.Tensor | None = None,
    shard_group: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undoes loss scaling and clips to the global norm, in place; returns (norm before clipping, 1.0 if it is not finite),
    both on the device. `shard_group`: the ranks over which the gradients are spread; None where each holds them whole."""
    # What get_total_norm and clip_grads_with_norm_ of torch.nn.utils compute, without their sorting by device and
    # dtype, which on a CPU takes longer than the norms of a small model.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if shard_group is not None:
        squared = norm.square()
        dist.all_reduce(squared, group=shard_group)
        norm = squared.sqrt()
    factor: torch.Tensor | None = None
    if loss_scale is not None:
        norm = norm / loss_scale
        factor = loss_scale.reciprocal()
    if clip_norm is not None:
        clipping = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clipping if factor is None else factor * clipping
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    return norm, torch.isfinite(norm).logical_not().float()


def leave_out(optimizer: torch.optim.Optimizer, skipped: torch.Tensor) -> None:
    """Makes the optimizer's next step leave weights, state and update count alone where `skipped` is 1."""
    # What the fused kernels read: a skip without a host sync.
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
