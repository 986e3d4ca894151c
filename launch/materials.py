"""What a recipe's data, model and task sections stand for: the objects that training, evaluating and generating share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from data.dataset import open_dataset
from data.samples import Dataset, DatasetFacts
from data.store import Store, read_manifest
from data.tokenizers import Tokenizer, load_tokenizer
from launch.config import RunConfig
from models.build import InputShape, build_model
from models.tasks import Task, build_task

if TYPE_CHECKING:
    from data.streamed import StreamedSource


@dataclass(frozen=True)
class Materials:
    """Opened data and the makers of model and task that fit it."""

    training: Mapping[str, Dataset]
    """By the name of the stream, which is empty where there is only one. Empty where `streamed` is read instead."""
    validation: Mapping[str, Dataset]
    tokenizer: Tokenizer | None
    shape: InputShape
    task: Task
    make_model: Callable[[], nn.Module]
    streamed: StreamedSource | None = None
    """The source that is read as it comes, where the recipe asks for that."""

    @property
    def sources(self) -> Mapping[str, Dataset | StreamedSource]:
        """What is trained on, by the name of the stream."""
        return self.training if self.streamed is None else {"": self.streamed}

    @property
    def item_name(self) -> str:
        return "sample" if self.tokenizer is None else "token"


def open_materials(config: RunConfig, stores: Mapping[str, Store]) -> Materials:
    """Opens the prepared datasets of all streams, or the source that is read as it comes, and fits model and task to them.
    Raises ValueError, in one line, where they do not fit."""
    if config.data.streaming:
        return _open_streamed(config)
    configs = config.data.by_stream()
    training = {name: open_dataset(store, configs[name], "train") for name, store in stores.items()}
    validation = {name: open_dataset(store, configs[name], "validation") for name, store in stores.items()}
    _refuse_unlike(training)
    facts = next(iter(training.values())).facts
    tokenizer = _common_tokenizer(stores) if facts.kind == "tokens" else None
    return _fit(config, facts, training, validation, tokenizer)


def _open_streamed(config: RunConfig) -> Materials:
    from data.streamed import StreamedSource  # takes `datasets` along, which takes a second

    streamed = StreamedSource(config.data)
    assert config.evaluation.samples is not None
    validation = {"": streamed.validation(config.evaluation.samples)}
    return _fit(config, streamed.facts, {}, validation, streamed.tokenizer, streamed)


def _fit(
    config: RunConfig,
    facts: DatasetFacts,
    training: Mapping[str, Dataset],
    validation: Mapping[str, Dataset],
    tokenizer: Tokenizer | None,
    streamed: StreamedSource | None = None,
) -> Materials:
    shape = InputShape(
        vocabulary_size=facts.vocabulary_size,
        sequence_tokens=facts.sequence_tokens,
        separate_documents=facts.separate_documents,
        channels=facts.channels,
        image_size_pixels=facts.image_size_pixels,
        classes=facts.classes,
    )
    task = build_task(
        config.task, token_bytes=None if tokenizer is None else tokenizer.token_bytes(), classes=facts.classes
    )
    task.example(shape, 1)  # a task of another kind of data says so, before a run is begun
    return Materials(training, validation, tokenizer, shape, task, lambda: build_model(config.model, shape), streamed)


def _refuse_unlike(datasets: Mapping[str, Dataset]) -> None:
    """ValueError where streams do not give the same kind of sample."""
    (first_name, first), *others = datasets.items()
    for name, dataset in others:
        for key, value in asdict(dataset.facts).items():
            # How many tokens a stream leaves out says nothing of its samples.
            if key != "left_out_tokens" and value != getattr(first.facts, key):
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
