"""What a recipe's data, model and task sections stand for: the objects that training, evaluating and generating share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from data.dataset import open_dataset
from data.samples import Dataset
from data.store import Store, read_manifest
from data.tokenizers import Tokenizer, load_tokenizer
from launch.config import RunConfig
from models.build import InputShape, build_model
from models.tasks import Task, build_task


@dataclass(frozen=True)
class Materials:
    """Opened data and the makers of model and task that fit it."""

    training: Mapping[str, Dataset]
    """By the name of the stream, which is empty where there is only one."""
    validation: Mapping[str, Dataset]
    tokenizer: Tokenizer | None
    shape: InputShape
    task: Task
    make_model: Callable[[], nn.Module]

    @property
    def item_name(self) -> str:
        return "sample" if self.tokenizer is None else "token"


def open_materials(config: RunConfig, stores: Mapping[str, Store]) -> Materials:
    """Opens the prepared datasets of all streams and fits model and task to them. Raises ValueError, in one line, where
    they do not fit."""
    configs = config.data.by_stream()
    training = {name: open_dataset(store, configs[name], "train") for name, store in stores.items()}
    validation = {name: open_dataset(store, configs[name], "validation") for name, store in stores.items()}
    _refuse_unlike(training)
    facts = next(iter(training.values())).facts
    shape = InputShape(
        vocabulary_size=facts.vocabulary_size,
        sequence_tokens=facts.sequence_tokens,
        separate_documents=facts.separate_documents,
        channels=facts.channels,
        image_size_pixels=facts.image_size_pixels,
        classes=facts.classes,
    )
    tokenizer = _common_tokenizer(stores) if facts.kind == "tokens" else None
    task = build_task(
        config.task, token_bytes=None if tokenizer is None else tokenizer.token_bytes(), classes=facts.classes
    )
    task.example(shape, 1)  # a task of another kind of data says so, before a run is begun
    return Materials(training, validation, tokenizer, shape, task, lambda: build_model(config.model, shape))


def _refuse_unlike(datasets: Mapping[str, Dataset]) -> None:
    """ValueError where streams do not give the same kind of sample."""
    (first_name, first), *others = datasets.items()
    for name, dataset in others:
        for key, value in asdict(dataset.facts).items():
            if value != getattr(first.facts, key):
                raise ValueError(
                    f"data.streams: {key} is {getattr(first.facts, key)!r} in {first_name} and {value!r} in {name}; "
                    "streams that are mixed must agree"
                )


def _common_tokenizer(stores: Mapping[str, Store]) -> Tokenizer:
    (first_name, first), *others = stores.items()
    wanted = read_manifest(first).tokenizer
    for name, store in others:
        found = read_manifest(store).tokenizer
        if (wanted and wanted.file and wanted.file.sha256) != (found and found.file and found.file.sha256):
            raise ValueError(
                f"data.streams: {first_name} and {name} were prepared with different tokenizers; "
                "prepare them with the same tokenizer.json"
            )
    return load_tokenizer(first)
