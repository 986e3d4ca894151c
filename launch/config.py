"""A whole recipe as one frozen, typed configuration, composed of the sections that each room owns. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.config import DataConfig
from distrib.capabilities import refuse_unsupported
from distrib.config import CheckpointConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from launch.health_config import HealthConfig
from launch.tracking.config import TrackingConfig
from models.config import ModelConfig, TaskConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(_Section):
    """The run itself."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    directory: Path | None = None
    """Where the run is kept; null: a new numbered directory under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_restarts: int = Field(default=3, ge=0)
    """Under `lockstep train`: how often workers that died or hung are started again without a later checkpoint in between."""
    restart_backoff_seconds: float = Field(default=1.0, ge=0)
    """The wait before the second restart without a later checkpoint, doubled for each further one, up to a minute; the
    first is immediate."""
    hang_timeout_seconds: float | None = Field(default=30.0, gt=0)
    """Under `lockstep train`: how long a rank may at least stay in one phase of a step before it counts as hung. The limit
    itself is five times what the phase took lately. Evaluations, saves and data that is fetched may take ten times as long;
    the start and what happens for the first time three times parallel.timeout_seconds. null: for ever."""
    deterministic: bool = False
    """Deterministic kernels, for the same bytes on a GPU; on a CPU they are deterministic anyway."""


class BatchConfig(_Section):
    """The batch is global: accumulation is derived from it, the number of ranks and `micro_samples`."""

    global_samples: int = Field(ge=1)
    micro_samples: int = Field(ge=1)
    """The most samples that one rank takes through one forward pass."""

    @model_validator(mode="after")
    def _fits(self) -> BatchConfig:
        if self.micro_samples > self.global_samples:
            raise ValueError(
                f"micro_samples {self.micro_samples} is larger than global_samples {self.global_samples}; "
                "lower micro_samples or raise global_samples"
            )
        return self


class EvaluationConfig(_Section):
    """Evaluation on the validation split: before the first step, every `every_steps`, and after the last."""

    every_steps: int | None = Field(default=None, ge=1)
    samples: int | None = Field(default=None, ge=1)
    """How many validation samples to use; null: all."""
    prompt: str = "\n"
    """Language models: what the text sample at the end continues."""
    generated_tokens: int = Field(default=0, ge=0)
    """Language models: length of that sample; 0: none."""
    temperature: float = Field(default=0.8, ge=0)


class RunConfig(_Section):
    """Everything that a run depends on, besides code and machine."""

    run: RunSection
    model: ModelConfig
    task: TaskConfig
    data: DataConfig = DataConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _possible_as_a_whole(self) -> RunConfig:
        refuse_unsupported(self.parallel)
        if self.schedule.warmup_steps > self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than run.steps {self.run.steps}; "
                "lower the warm-up or run longer"
            )
        for data in self.data.by_stream().values():
            missing = sorted({"train", "validation"} - set(data.splits))
            if missing:
                raise ValueError(
                    f"data.source={data.source_text}: gives no split {' and no split '.join(missing)}, and training needs "
                    f"both train and validation; add a source for it, such as {missing[0]}=ADDRESS"
                )
        if self.data.streaming and self.evaluation.samples is None:
            raise ValueError(
                "evaluation.samples is not set; with data.streaming=true it says how many validation samples to collect from "
                "the beginning of the stream"
            )
        if self.data.streaming and self.batch.global_samples < (self.data.streaming_parts or 1):
            raise ValueError(
                f"data.streaming_parts {self.data.streaming_parts} is more than batch.global_samples "
                f"{self.batch.global_samples}: some parts would never be read; lower it"
            )
        if self.evaluation.generated_tokens and self.task.kind == "classification":
            raise ValueError("evaluation.generated_tokens has no effect with task.kind classification; remove it")
        return self
