"""What of a state is not finite: no checkpoint may hold it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from distrib.sharding import local


@torch.no_grad()
def not_finite(tensors: Mapping[str, torch.Tensor], trained: Collection[str]) -> list[str]:
    """Names of the tensors that hold what they must not, in this rank's part of them.

    What is `trained` and the optimizer's state must be finite. Anything else, a mask in a buffer for one, may hold infinities
    of the model's own, but nothing that is not a number. Waits for the device once.
    """
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    floating = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    if not floating:
        return []
    bad = [
        (
            part.isfinite().all().logical_not()
            if name in trained or name.startswith("optimizer.")
            else part.isnan().any()
        )
        for name, part in floating.items()
    ]
    device = bad[0].device
    told = torch.stack([one.to(device) for one in bad]).tolist()
    return [name for name, is_bad in zip(floating, told, strict=True) if is_bad]
