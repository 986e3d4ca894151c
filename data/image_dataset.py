"""Images of a prepared dataset: random access by sample id, checked as they are read and decoded with Pillow."""

import io

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from data.config import DataConfig
from data.errors import CorruptData
from data.manifest import RESTORE, ImagesEntry, Manifest, Split
from data.samples import Choices, DatasetFacts, Fields, Hashes, SampleIds, check_range
from data.shards import ImageShard
from data.store import Store


class ImageDataset:
    """Images of one split, decoded with Pillow to one size and number of channels."""

    def __init__(self, store: Store, manifest: Manifest, split: Split, config: DataConfig) -> None:
        assert manifest.images is not None
        self.address = store.address
        self._store = store
        self.fingerprint = manifest.fingerprint
        self.packing_identity: str | None = None
        self._entries = manifest.splits[split].shards
        for entry in self._entries:
            store.check(entry.data)
        self._ends = np.cumsum([entry.documents for entry in self._entries], dtype=np.int64)
        self.shard_samples = np.diff(self._ends, prepend=0)
        self.samples = int(self._ends[-1])
        self.mixes = False
        self._shards: list[ImageShard | None] = [None] * len(self._entries)
        channels, size = _image_shape(store, manifest.images, config)
        self._mode = "L" if channels == 1 else "RGB"
        self._size = size
        self.sample_bytes = channels * size * size
        self.facts = DatasetFacts(
            kind="images",
            classes=len(manifest.images.class_names),
            class_names=manifest.images.class_names,
            channels=channels,
            image_size_pixels=size,
        )

    def gather(self, sample_ids: SampleIds, choices: Choices | None = None) -> tuple[Fields, Hashes]:
        """`images` uint8 (n, C, H, W), `labels` int64 (n,), and the hash (n,) of each sample's bytes and label."""
        check_range(sample_ids, self.samples)
        count, size, channels = len(sample_ids), self._size, len(self._mode)
        images = np.empty((count, size, size, channels), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        hashes = np.empty(count, dtype=np.uint64)
        for slot, number in enumerate(np.searchsorted(self._ends, sample_ids, side="right").tolist()):
            shard = self._shard(number)
            row = int(sample_ids[slot] - (self._ends[number] - shard.rows))
            encoded, labels[slot] = shard.read(row)
            # The label is the seed, so that an altered label changes the hash too.
            hashes[slot] = xxhash.xxh3_64_intdigest(encoded, seed=int(labels[slot]))
            images[slot] = self._decode(encoded, int(sample_ids[slot])).reshape(size, size, channels)
        # (n, H, W, C) -> (n, C, H, W)
        return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2)), "labels": labels}, hashes

    def _decode(self, encoded: memoryview, sample_id: int) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(encoded)) as stored:
                image = stored.convert(self._mode)
        except OSError as error:
            raise CorruptData(f"{self.address}: image {sample_id} cannot be decoded ({error}); {RESTORE}") from None
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def mix(self, fields: Fields, partners: npt.NDArray[np.int64], words: Hashes) -> Fields:
        raise AssertionError("samples are not mixed")

    def _shard(self, number: int) -> ImageShard:
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = ImageShard(self._store, self._entries[number])
        return shard


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
