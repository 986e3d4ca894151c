"""`sources.json`: the state of a dataset's local sources when it was prepared, to tell whether they have changed since.

It lies beside the manifest and outside of the fingerprint, and nothing that reads samples reads it: a dataset is as good
without.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from data.config import DataConfig, GivenSource
from data.errors import CorruptData
from data.sources import source_state
from data.store import LocalStore, Store, read_manifest
from data.tokenizers import SubwordTokenizer, load_published, open_tokenizer
from data.units import Plan

ORIGIN_NAME = "sources.json"


class OriginEntry(BaseModel):
    """A source as it was given, and a hash of the names, sizes and times of its files; None of a source that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str
    state: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class Origin(BaseModel):
    """What a dataset was prepared from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sources: tuple[OriginEntry, ...]

    @property
    def hash(self) -> str:
        """What an altered byte is found by."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The one form in which `sources.json` is written."""
        return (json.dumps({"hash": self.hash, **self.model_dump(mode="json")}, indent=1) + "\n").encode()


def origin_of(plan: Plan) -> Origin:
    """The origin of what is prepared by a plan."""
    return Origin(sources=tuple(OriginEntry(source=source.given, state=source.seen) for source in plan.sources))


def read_origin(store: Store) -> Origin | None:
    """What a dataset says it was prepared from; None if it does not say. CorruptData if any byte of that was altered."""
    content = store.read(ORIGIN_NAME)
    if content is None:
        return None
    damaged = CorruptData(f"{store.address}/{ORIGIN_NAME}: altered or damaged; restore or remove it")
    try:
        origin = Origin.model_validate_json(json.dumps({"sources": json.loads(content)["sources"]}))
    except (ValueError, RecursionError, LookupError, TypeError):  # a ValidationError is a ValueError
        raise damaged from None
    if origin.to_bytes() != content:
        raise damaged
    return origin


def changed_sources(directory: Path, config: DataConfig) -> tuple[list[str], dict[str, str]]:
    """The sources that have changed since the dataset was prepared; and those of which nobody can tell, with the reason."""
    origin = read_origin(LocalStore(directory))
    recorded = {entry.source: entry.state for entry in origin.sources} if origin is not None else {}
    changed, unknown = [], {}
    for source in config.sources:
        before = recorded.get(source.given)
        if before is None:
            unknown[source.given] = (
                "only a server knows it" if source.given in recorded else "its state was not recorded"
            )
            continue
        try:
            now = state_of(source)
        except ValueError as error:
            unknown[source.given] = str(error)
            continue
        if now != before:
            changed.append(source.given)
    return changed, unknown


def state_of(source: GivenSource) -> str | None:
    """What `sources.json` records of a source; None of one whose state only its own server knows."""
    if source.address.kind == "hf" and not Path(source.address.location).expanduser().is_dir():
        return None
    return source_state(source.address)


def refuse_other_tokenizer(directory: Path, config: DataConfig) -> None:
    """ValueError where a dataset was prepared with a tokenizer file that holds another tokenizer now."""
    path, manifest = Path(config.tokenizer).expanduser(), read_manifest(LocalStore(directory))
    if manifest.tokenizer is None or manifest.tokenizer.spec != config.tokenizer or not path.is_file():
        return
    # Both as the library writes them now: what it wrote when the dataset was prepared may be another form of the same.
    made_with, given = open_tokenizer(LocalStore(directory), manifest.tokenizer), load_published(config.tokenizer)
    if not isinstance(made_with, SubwordTokenizer) or made_with.to_json() != given.to_json():
        raise ValueError(
            f"{directory}: prepared with another tokenizer than {config.tokenizer} holds now; restore that file, or choose "
            "another data.directory"
        )
