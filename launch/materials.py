"""What a recipe's data, model and task sections stand for: the objects that training, evaluating and generating share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from data.dataset import open_dataset
from data.samples import Dataset
from data.store import Store
from data.tokenizers import Tokenizer, load_tokenizer
from launch.config import RunConfig
from models.build import InputShape, build_model
from models.tasks import Task, build_task


@dataclass(frozen=True)
class Materials:
    """Opened data and the makers of model and task that fit it."""

    training: Dataset
    validation: Dataset
    tokenizer: Tokenizer | None
    shape: InputShape
    task: Task
    make_model: Callable[[], nn.Module]

    @property
    def item_name(self) -> str:
        return "sample" if self.tokenizer is None else "token"


def open_materials(config: RunConfig, store: Store) -> Materials:
    """Opens a prepared dataset and fits model and task to it. Raises ValueError, in one line, where they do not fit."""
    training = open_dataset(store, config.data, "train")
    validation = open_dataset(store, config.data, "validation")
    facts = training.facts
    shape = InputShape(
        vocabulary_size=facts.vocabulary_size,
        sequence_tokens=facts.sequence_tokens,
        channels=facts.channels,
        image_size_pixels=facts.image_size_pixels,
        classes=facts.classes,
    )
    tokenizer = load_tokenizer(store) if facts.kind == "tokens" else None
    task = build_task(
        config.task, token_bytes=None if tokenizer is None else tokenizer.token_bytes(), classes=facts.classes
    )
    task.example(shape, 1)  # a task of another kind of data says so, before a run is begun
    return Materials(training, validation, tokenizer, shape, task, lambda: build_model(config.model, shape))
