"""The recipe sections that `distrib` owns: optimizer, schedule, parallel, checkpoint. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimizerConfig(_Section):
    """How weights are updated.

    Weight decay applies to tensors of two or more axes; biases and norm weights are never decayed.
    """

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global L2 norm above which a step's gradient is scaled down; null: no clipping."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW only."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW only."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only."""

    @model_validator(mode="after")
    def _refuse_options_of_the_other_kind(self) -> OptimizerConfig:
        foreign = {"adamw": {"momentum", "nesterov"}, "sgd": {"betas", "epsilon"}}[self.kind]
        # Compared with the defaults, not with what was written: the resolved recipe of a run spells out every key.
        given = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(sorted(given))} means nothing to optimizer.kind={self.kind}; remove it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleConfig(_Section):
    """The learning rate as a function of the optimizer step; one schedule step per optimizer step."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The rate at the end of the run over the peak rate; linear and cosine only."""

    @model_validator(mode="after")
    def _refuse_options_of_another_kind(self) -> ScheduleConfig:
        if self.kind == "constant" and self.final_fraction != type(self).model_fields["final_fraction"].default:
            raise ValueError("final_fraction means nothing to schedule.kind=constant; remove it")
        return self


class ParallelConfig(_Section):
    """Who runs a step, and how its work and state are divided."""

    engine: Literal["native", "deepspeed", "accelerate"] = "native"
    zero_stage: Literal[0, 1, 2, 3] = 0
    replicas: int | None = Field(default=None, ge=1)
    """Copies of the sharded model (hybrid sharding); null: one per rank at stage 0."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in host memory: nothing; the optimizer's state, which is updated there; or that and the weights."""
    compile: bool = False
    deepspeed_config: Path | None = None
    """A DeepSpeed JSON file that tunes ZeRO; engine deepspeed only. What it says of anything else must agree with the recipe."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a collective may wait for a silent rank before the run fails."""


class CheckpointConfig(_Section):
    """When to save, and what to keep. The last two checkpoints are always kept."""

    every_steps: int | None = Field(default=500, ge=1)
    """Steps between checkpoints; null: only at the end and on a request to stop."""
    asynchronous: bool = True
    """Training waits only until its state is copied to host memory, and goes on while a thread writes the copy. It costs
    host memory for one copy of what a rank holds, from the first save on; at ZeRO stage 0 that is the whole state."""
    keep_last: int = Field(default=2, ge=2)
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this are never deleted."""
