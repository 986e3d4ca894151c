"""Preparing a recipe's dataset where somebody watches. Imports no torch."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

from data.config import DataConfig
from data.packing import ensure_packing
from data.prepare import prepare, prepared_directory
from data.store import LocalStore, Store


def prepare_streams(config: DataConfig) -> dict[str, Store]:
    """`prepare_and_tell` for every stream of a recipe, and the packing that it asks for; where each one's dataset lies, by
    the stream's name."""
    stores: dict[str, Store] = {}
    for name, stream in config.by_stream().items():
        stores[name] = LocalStore(prepare_and_tell(stream))
        ensure_packing(stores[name], stream, tell=functools.partial(print, flush=True))
    return stores


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
