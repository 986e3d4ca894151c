"""The learning rate of a step."""

from __future__ import annotations

import math

from distrib.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The rate for optimizer step `step` (0-based) of a run of `steps` steps.

    Warm-up is linear and reaches `peak` at its last step. Then `linear` and `cosine` (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1608.03983, without restarts) fall to `final_fraction * peak` at the run's last step.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    decay_steps = max(1, steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    remaining = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * remaining)
