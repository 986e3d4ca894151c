"""Images of a prepared dataset: random access by sample id, checked as they are read, decoded and augmented."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from data.augment import augmentation_words, augmented, evaluated
from data.config import DataConfig
from data.errors import CorruptData
from data.image_shards import ImageShard
from data.manifest import RESTORE, ImagesEntry, Manifest, Split
from data.mixing import mix
from data.open_shards import OpenShards
from data.pictures import Mode, decode
from data.samples import Choices, DatasetFacts, Fields, Hashes, SampleIds, check_range
from data.store import Store


class ImageDataset:
    """Images of one split, brought to one size and number of channels."""

    def __init__(self, store: Store, manifest: Manifest, split: Split, config: DataConfig) -> None:
        assert manifest.images is not None
        self.address = store.address
        self._store = store
        self.fingerprint = manifest.fingerprint
        self.packing_identity: str | None = None
        self._entries = manifest.split(split, store.address).shards
        classes = len(manifest.images.class_names)
        self._shards = OpenShards(
            store,
            [[*entry.files()] for entry in self._entries],
            lambda number: ImageShard(store, self._entries[number], classes),
        )
        self._ends = np.cumsum([entry.documents for entry in self._entries], dtype=np.int64)
        self.shard_samples = np.diff(self._ends, prepend=0)
        self.samples = int(self._ends[-1])
        self.shard_bytes = self._shards.bytes
        self.looks_ahead_samples = self._shards.looks_ahead_samples(self.samples)
        channels, size = _image_shape(store, manifest.images, config)
        self._mode: Mode = "L" if channels == 1 else "RGB"
        self._size, self._shorter_side = size, config.shorter_side_pixels
        self._resample = Image.Resampling[config.interpolation.upper()]
        self._augmentation, self._workers = config.augmentation, config.workers
        self.mixes = config.augmentation is not None and config.augmentation.mixes
        _refuse_colour_choices(store, config, channels)
        self.sample_bytes = channels * size * size
        self.facts = DatasetFacts(
            kind="images",
            classes=len(manifest.images.class_names),
            class_names=manifest.images.class_names,
            channels=channels,
            image_size_pixels=size,
        )

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        """`images` uint8 (n, C, H, W), `labels` int64 (n,), and the hash (n,) of each sample's bytes and label.

        With `choices` the images are augmented where the recipe asks for it; without, they are as evaluation sees them.
        CorruptData names the first of the samples that cannot be read.
        """
        check_range(sample_ids, self.samples)
        self._shards.close_some(lambda: np.searchsorted(self._ends, sample_ids, side="right"))
        count = len(sample_ids)
        encoded: list[memoryview] = []
        labels = np.empty(count, dtype=np.int64)
        hashes = np.empty(count, dtype=np.uint64)
        stored = self._shards.read(lambda: [*self._stored(sample_ids)])
        for slot, (content, label, content_hash) in enumerate(stored):
            labels[slot], hashes[slot] = label, content_hash
            encoded.append(content)
        return {"images": self._decode(encoded, sample_ids, choices), "labels": labels}, hashes

    def content_hashes(self, sample_ids: SampleIds) -> Hashes:
        """The hash (n,) of the bytes and the label of samples (n,)."""
        check_range(sample_ids, self.samples)
        return self._shards.read(
            lambda: np.fromiter((found for _, _, found in self._stored(sample_ids)), np.uint64, len(sample_ids))
        )

    def _stored(self, sample_ids: SampleIds) -> Iterator[tuple[memoryview, int, int]]:
        """The encoded bytes, the label and the hash of each sample."""
        for sample_id, number in zip(
            sample_ids, np.searchsorted(self._ends, sample_ids, side="right").tolist(), strict=True
        ):
            shard = self._shards[number]
            encoded, label = shard.read(int(sample_id - (self._ends[number] - shard.rows)))
            # The label is the seed, so that an altered label changes the hash too.
            yield encoded, label, xxhash.xxh3_64_intdigest(encoded, seed=label)

    def mix(self, fields: Fields, partners: SampleIds, words: npt.NDArray[np.uint64]) -> Fields:
        """Gathered fields mixed as `data/mixing.py` says: with `partner_labels` int64 (n,) and `label_weights` float32 (n,)."""
        assert self._augmentation is not None
        assert self.mixes
        return mix(fields, partners, words, self._augmentation)

    def _decode(
        self, encoded: list[memoryview], sample_ids: SampleIds, choices: Choices | None
    ) -> npt.NDArray[np.uint8]:
        """The images' pixels (n, C, H, W), each put in its slot by whoever decoded it.

        With workers that is a pool of threads that ends with this call. Threads, because Pillow lets go of the interpreter
        while it decodes and resizes, which is nearly all there is to do: pixels need not be passed between processes, and
        no process or shared memory can be left behind.
        """
        altered = choices is not None and self._augmentation is not None
        words = augmentation_words(choices, sample_ids).tolist() if altered and choices is not None else None
        images = np.empty((len(encoded), len(self._mode), self._size, self._size), dtype=np.uint8)

        def make(slot: int) -> None:
            image = self._picture(encoded[slot], int(sample_ids[slot]), None if words is None else words[slot])
            # (H, W, C) or, grey, (H, W) -> (C, H, W)
            images[slot] = np.moveaxis(np.atleast_3d(np.asarray(image)), 2, 0)

        if self._workers == 0:
            for slot in range(len(encoded)):
                make(slot)
        else:
            with ThreadPoolExecutor(self._workers, thread_name_prefix="lockstep-images") as pool:
                for _ in pool.map(make, range(len(encoded))):
                    pass  # an exception of the first slot that had one is raised here
        return images

    def _picture(self, encoded: memoryview, sample_id: int, words: list[int] | None) -> Image.Image:
        try:
            image = decode(encoded, self._mode)
        except ValueError as error:
            raise CorruptData(f"{self.address}: image {sample_id} cannot be decoded ({error}); {RESTORE}") from None
        if words is None:
            return evaluated(image, self._size, self._shorter_side, self._resample)
        assert self._augmentation is not None
        return augmented(image, words, self._augmentation, self._size, self._shorter_side, self._resample)

    def expect(self, start: int, stop: int, sample_ids: SampleIds) -> None:
        self._shards.expect(start, stop, np.searchsorted(self._ends, sample_ids, side="right"))

    def reached(self, position: int) -> None:
        self._store.reached(position)


def _image_shape(store: Store, entry: ImagesEntry, config: DataConfig) -> tuple[int, int]:
    """Channels and side in pixels, from the recipe or, where it leaves them open, as stored."""
    channels = config.image_channels or entry.channels
    if channels is None:
        raise ValueError(f"{store.address}: grey and colour images are mixed; set data.image_channels to 1 or 3")
    if config.image_size_pixels is not None:
        return channels, config.image_size_pixels
    if entry.height_pixels is None or entry.height_pixels != entry.width_pixels:
        raise ValueError(f"{store.address}: images are not squares of one size as stored; set data.image_size_pixels")
    return channels, entry.height_pixels


def _refuse_colour_choices(store: Store, config: DataConfig, channels: int) -> None:
    jitter = config.augmentation and config.augmentation.colour_jitter
    if jitter and channels == 1 and (jitter.saturation or jitter.hue):
        raise ValueError(
            f"{store.address}: data.augmentation.colour_jitter.saturation and hue mean nothing to grey images; remove them"
        )
