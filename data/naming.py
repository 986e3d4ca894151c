"""Where the dataset of a recipe lies, and by what that is decided. Imports neither NumPy nor Arrow, so that a run which finds all
that it needs can start at once."""

import hashlib
import json
import re
from pathlib import Path

from data.addresses import is_remote
from data.config import IMAGE_KINDS, DataConfig
from data.manifest import FORMAT_VERSION, MANIFEST_NAME
from data.sources import source_state


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
