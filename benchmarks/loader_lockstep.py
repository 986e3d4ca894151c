"""This project's own contender of `loaders.py`, and its two corpora."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data.config import DataConfig
from data.dataset import open_dataset
from data.digest import EMPTY_DIGEST, chain
from data.image_config import AugmentationConfig, RandomResizedCropConfig
from data.plan import Plan, Segment, StreamPart
from data.samples import Dataset
from data.store import LocalStore
from data.stream import Stream

SEQUENCE_TOKENS = 1024
BATCH_SAMPLES = 32
IMAGE_SIZE_PIXELS = 64
STOP_POSITION = 10**9


def config_of(root: Path, kind: str, workers: int = 0) -> DataConfig:
    """The recipe of a corpus below `root`."""
    if kind == "tokens":
        source = f"jsonl:{root / 'corpus.jsonl'}#text"
        return DataConfig(source=source, directory=root / "lockstep-tokens", sequence_tokens=SEQUENCE_TOKENS)
    return DataConfig(
        source=f"images:{root / 'jpegs'}",
        directory=root / "lockstep-images",
        image_size_pixels=IMAGE_SIZE_PIXELS,
        augmentation=AugmentationConfig(random_resized_crop=RandomResizedCropConfig(), flip=0.5),
        workers=workers,
    )


def prepare_corpus(root: Path, kind: str) -> None:
    """Prepare a corpus as `lockstep prepare` does."""
    from data.prepare import prepare  # takes libraries along that a contender reads without

    prepare(config_of(root, kind))


def opened(root: Path, kind: str, workers: int = 0) -> Dataset:
    """The training split of a prepared corpus."""
    config = config_of(root, kind, workers)
    assert isinstance(config.directory, Path)
    return open_dataset(LocalStore(config.directory), config, "train")


def write_blocks(root: Path, blocks: int) -> None:
    """The first samples of the tokens as rows of one flat file, which the others' formats are made from."""
    dataset = opened(root, "tokens")
    with (root / "blocks.bin").open("wb") as file:
        for start in range(0, min(blocks, dataset.samples), 4096):
            rows = np.arange(start, min(start + 4096, blocks, dataset.samples))
            file.write(np.ascontiguousarray(dataset.gather(rows)[0]["tokens"]).data)


class LockstepBatches:
    """The stream as a training run reads it, with every check on and the digest of each step chained.

    It shuffles over all samples, and has one thread whatever `workers` says where it reads tokens.
    """

    def __init__(self, root: Path, kind: str, workers: int) -> None:
        self.position, self.digest = 0, EMPTY_DIGEST
        self._dataset, self._field = opened(root, kind, workers), "tokens" if kind == "tokens" else "images"

    def __iter__(self) -> Iterator[torch.Tensor]:
        facts = self._dataset.facts
        part = StreamPart(fingerprint=self._dataset.fingerprint, sequence_tokens=facts.sequence_tokens)
        segment = Segment(start_position=0, streams=(part,), seed=1, global_samples=BATCH_SAMPLES)
        stream = Stream(
            {"": self._dataset},
            Plan.of([segment]),
            rank=0,
            world_size=1,
            micro_samples=BATCH_SAMPLES,
            position=self.position,
            stop_position=STOP_POSITION,
            count_items=lambda batch: batch[self._field].shape[0],
        )
        try:
            for step in stream:
                self.digest = chain(self.digest, step.fold)
                self.position = step.first_position + step.samples
                yield step.micro_batches[0].tensors[self._field]
        finally:
            stream.close()
