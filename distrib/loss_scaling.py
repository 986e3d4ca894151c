"""Dynamic loss scaling for fp16, where small gradients would vanish (Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_FIRST_SCALE = 2.0**16
_GROWTH_STEPS = 2000


class LossScaler:
    """A power of two that losses are multiplied by: halved after a step whose gradient overflowed, doubled after 2,000 steps
    in a row without. It lives on the device, so that a step never waits on the host, and is the same on every rank."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _FIRST_SCALE, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: torch.Tensor) -> None:
        """`skipped`: scalar, nonzero where the step's gradient was not finite."""
        bad = skipped.bool()
        counted = torch.where(bad, 0, self._good_steps + 1)
        grown = counted == _GROWTH_STEPS
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0)))
        self._good_steps.copy_(torch.where(grown, 0, counted))

    def as_scalars(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self.scale.item(), "good_steps": int(self._good_steps.item())}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.scale.fill_(float(scalars["scale"]))
        self._good_steps.fill_(int(scalars["good_steps"]))
