"""Preparing a recipe's dataset where somebody watches, and opening it where it lies. Imports no torch."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

from data.addresses import is_remote
from data.config import DataConfig
from data.manifest import Manifest
from data.packing import ensure_packing
from data.prepare import prepare, prepared_directory
from data.store import Store, open_store, read_manifest


def open_streams(config: DataConfig) -> dict[str, Store]:
    """Where the dataset of every stream of a recipe lies, by the stream's name: prepared and packed where that is to be
    done here, and at an address there or not. ValueError where what lies there was prepared otherwise than the recipe says."""
    stores = {name: _open_stream(stream) for name, stream in config.by_stream().items()}
    for name, stream in config.by_stream().items():
        ensure_packing(stores[name], stream, tell=functools.partial(print, flush=True))
    return stores


def _open_stream(config: DataConfig) -> Store:
    if not is_remote(config.directory):
        return open_store(prepare_and_tell(config), config)
    store = open_store(config.directory, config)
    _refuse_other_preparation(read_manifest(store), config)
    return store


def _refuse_other_preparation(manifest: Manifest, config: DataConfig) -> None:
    """Whatever the recipe says of the preparation of a dataset that it only reads must be true of it."""
    found: dict[str, object] = {
        "source": manifest.source.address,
        "tokenizer": manifest.tokenizer.spec if manifest.tokenizer else None,
        "validation_fraction": manifest.validation_fraction,
        "shard_bytes": manifest.shard_bytes,
    }
    for key, value in found.items():
        asked = getattr(config, key)
        if asked not in (value, DataConfig.model_fields[key].default):
            raise ValueError(
                f"{config.directory}: prepared with data.{key} {value!r}, but the recipe has {asked!r}; "
                "change or remove that, or choose another data.directory"
            )


def prepare_and_tell(config: DataConfig) -> Path:
    """`data.prepare.prepare`, with a line before, progress on a terminal, and a line after; silent where all is there."""
    if (prepared_directory(config) / "manifest.json").exists():
        return prepare(config)
    print(f"preparing {config.source} (tokenizer {config.tokenizer}), once", flush=True)
    begun = time.monotonic()
    seen = (0, 0)
    if not sys.stderr.isatty():

        def count(documents: int, size: int) -> None:
            nonlocal seen
            seen = (documents, size)

        directory = prepare(config, progress=count)
    else:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

        columns = (SpinnerColumn(), TextColumn("{task.fields[documents]:,} documents"), TransferSpeedColumn())
        with Progress(*columns, TimeElapsedColumn(), transient=True) as bar:
            task = bar.add_task("preparing", total=None, documents=0)

            def show(documents: int, size: int) -> None:
                nonlocal seen
                seen = (documents, size)
                bar.update(task, completed=size, documents=documents)

            directory = prepare(config, progress=show)
    documents, size = seen
    print(
        f"prepared {directory}: {documents:,} documents, {size / 1e6:.1f} MB in {time.monotonic() - begun:.1f} s",
        flush=True,
    )
    return directory
