"""Opening a prepared dataset for reading."""

from data.config import DataConfig
from data.image_dataset import ImageDataset
from data.manifest import Split
from data.packing import refuse_images
from data.store import Store, read_manifest
from data.token_dataset import TokenDataset


def open_dataset(store: Store, config: DataConfig, split: Split) -> TokenDataset | ImageDataset:
    """Open one split of a prepared dataset.

    ValueError (CorruptData where the stored bytes are at fault): not a dataset, of a newer format, damaged, too short
    for `config.sequence_tokens`, not packed as the recipe asks, or of images whose shape the recipe leaves open.
    """
    manifest = read_manifest(store)
    if manifest.kind == "tokens":
        return TokenDataset(store, manifest, split, config)
    refuse_images(manifest, config, store.address)
    return ImageDataset(store, manifest, split, config)
