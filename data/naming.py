"""Where the dataset of a recipe lies, by what that is decided, and whether it is there.

Imports neither NumPy nor Arrow, so that a run which finds all that it needs starts at once.
"""

import hashlib
import json
import re
from pathlib import Path

from data.addresses import is_remote
from data.config import IMAGE_KINDS, DataConfig
from data.manifest import FORMAT_VERSION, MANIFEST_NAME
from data.place import exists
from data.sources import source_state
from data.store import LocalStore, read_manifest


def prepared_directory(config: DataConfig) -> Path:
    """Where the dataset lies or will lie: `config.directory`, or a name made from all that determines its bytes."""
    if is_remote(config.directory):
        raise ValueError(f"{config.directory}: datasets are prepared on a local disk; prepare there, then copy it")
    if config.directory is not None:
        return Path(config.directory)
    state = [source_state(source.address) for source in config.sources]
    identity = identity_of(config) | {"format_version": FORMAT_VERSION, "state": state}
    tokenizer_file = Path(config.tokenizer).expanduser()
    if tokenizer_file.is_file():
        identity["tokenizer_sha256"] = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", config.source_text).strip("-").lower()[-40:].strip("-")
    return Path("prepared") / f"{slug}-{digest}"


def identity_of(config: DataConfig) -> dict[str, object]:
    """What determines the bytes of a dataset, beside the sources' content."""
    images = all(source.address.kind in IMAGE_KINDS for source in config.sources)
    return {
        "source": [source.given for source in config.sources],
        "tokenizer": None if images else config.tokenizer,
        "validation_fraction": fraction_of(config),
        "shard_bytes": config.shard_bytes,
    }


def is_prepared(directory: Path, config: DataConfig) -> bool:
    """Whether the dataset is there already; a ValueError if the directory holds anything else."""
    if not exists(directory):
        return False
    manifest = read_manifest(LocalStore(directory))
    found: dict[str, object] = {
        "source": [source.address for source in manifest.sources],
        "tokenizer": manifest.tokenizer.spec if manifest.tokenizer else None,
        "validation_fraction": manifest.validation_fraction,
        "shard_bytes": manifest.shard_bytes,
    }
    for key, asked in identity_of(config).items():
        if found[key] != asked and not (key == "tokenizer" and found[key] is None):  # images have no tokenizer
            raise ValueError(
                f"{directory}: prepared with data.{key} {found[key]!r}, but the recipe has {asked!r}; "
                "change the recipe or choose another data.directory"
            )
    return True


def fraction_of(config: DataConfig) -> float | None:
    """The validation fraction; None where no source is divided."""
    divided = any(source.into is None for source in config.sources)
    return config.validation_fraction if divided else None


def all_is_there(config: DataConfig) -> bool:
    """Whether nothing is left to do before the data of a recipe is opened, as far as a look at one name tells: false also where
    more than that must be looked at."""
    if config.streaming:
        return True
    plain = not config.streams and config.directory is None and config.packing == "concatenate"
    return plain and (prepared_directory(config) / MANIFEST_NAME).exists()
