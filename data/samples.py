"""What a dataset is asked for and what it gives: samples by their ids, with a hash of what was read."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

SampleIds = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Fields = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Choices:
    """What the random choices about samples are keyed by, beside each sample's id: `epochs` (n,) goes with the ids."""

    seed: int
    epochs: npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetFacts:
    """What a model or task must know of a dataset; None where it does not apply."""

    kind: Literal["tokens", "images"]
    vocabulary_size: int | None = None
    sequence_tokens: int | None = None
    left_out_tokens: int = 0
    """Targets that are in no sample, because the rest of a shard after its last sample is shorter than one."""
    separate_documents: bool = False
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    channels: int | None = None
    image_size_pixels: int | None = None


class Dataset(Protocol):
    """What the stream needs of a dataset.

    Fields of tokens: `tokens` (n, T + 1); where documents end, also `loss_mask` (n, T) bool, the targets that count; where
    they are kept apart, also `documents` (n, T), a number for each input's document within its sample, rising from 0.
    """

    @property
    def address(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def packing_identity(self) -> str | None:
        """The packing algorithm and the hash of what it made; None where samples follow from the shards alone."""
        ...

    @property
    def facts(self) -> DatasetFacts: ...
    @property
    def sample_bytes(self) -> int: ...
    @property
    def mixes(self) -> bool:
        """Whether training samples are mixed with partners from the same global step, see `mix`."""
        ...

    @property
    def shard_samples(self) -> SampleIds:
        """Samples of each shard, in stored order; ids count through them."""
        ...

    @property
    def shard_bytes(self) -> npt.NDArray[np.int64]:
        """What the files of each shard hold."""
        ...

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        """The fields of samples (n,) and the hash (n,) of each one's stored content; without `choices` as evaluated."""
        ...

    def content_hashes(self, sample_ids: SampleIds) -> Hashes:
        """The hashes (n,) that `gather` gives with samples (n,): their bytes are read and checked, but nothing is decoded."""
        ...

    def mix(self, fields: Fields, partners: SampleIds, words: npt.NDArray[np.uint64]) -> Fields:
        """The first n rows of gathered fields, each mixed with row `partners[k]`, by the random word `words[k]`; both (n,).

        Only where `mixes`. The fields may be others than those that were gathered, and rows from n on are only partners.
        """
        ...

    @property
    def looks_ahead_samples(self) -> int:
        """How far ahead of reading it is worth to call `expect`; 0: not at all, the samples are here."""
        ...

    def expect(self, start: int, stop: int, sample_ids: SampleIds) -> None:
        """Samples (n,) that are read between two positions, or some of them; the positions rise from call to call."""
        ...

    def reached(self, position: int) -> None:
        """The samples before `position` have been read."""
        ...


def check_range(sample_ids: SampleIds, samples: int) -> None:
    """IndexError where an id is not one of so many samples."""
    if sample_ids.size and not (sample_ids.min() >= 0 and sample_ids.max() < samples):
        raise IndexError(f"sample ids reach from {sample_ids.min()} to {sample_ids.max()}; there are {samples} samples")
