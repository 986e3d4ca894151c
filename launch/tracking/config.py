"""The recipe's `tracking` section."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrackingConfig(BaseModel):
    """Where a run's numbers go, besides `metrics.jsonl`, which always gets every step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto",
        description=(
            "Weights & Biases. auto: what WANDB_MODE says where it is set; else online where wandb finds a key "
            "(WANDB_API_KEY, netrc, its own settings), offline where it finds none."
        ),
    )
    wandb_project: str = Field("lockstep", min_length=1)
    wandb_entity: str | None = Field(None, description="The W&B user or team; none: the key's default one.")
    tensorboard: bool = True
    every_steps: int = Field(1, ge=1, description="W&B and TensorBoard get the steps divisible by this.")
    progress: Literal["auto", "bar", "lines", "off"] = Field(
        "auto", description="auto: a bar on a terminal, plain lines elsewhere."
    )
    progress_seconds: float = Field(10.0, gt=0, description="The interval between two plain lines.")
