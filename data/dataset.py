"""Opening a prepared dataset for reading."""

from typing import TYPE_CHECKING

from data.config import DataConfig
from data.manifest import Split
from data.store import Store, read_manifest
from data.token_dataset import TokenDataset

if TYPE_CHECKING:
    from data.image_dataset import ImageDataset


def open_dataset(store: Store, config: DataConfig, split: Split) -> "TokenDataset | ImageDataset":
    """Open one split of a prepared dataset.

    ValueError (CorruptData where the stored bytes are at fault): not a dataset, of a newer format, damaged, too short
    for `config.sequence_tokens`, not packed as the recipe asks, of images whose shape the recipe leaves open, or not of
    what the recipe's keys are about.
    """
    manifest = read_manifest(store)
    config.refuse_options_of_other_data("text" if manifest.kind == "tokens" else "images", store.address)
    if manifest.kind == "tokens":
        return TokenDataset(store, manifest, split, config)
    from data.image_dataset import ImageDataset  # takes Arrow and Pillow along, which tokens do without

    return ImageDataset(store, manifest, split, config)
