"""Preparing a recipe's dataset where somebody watches. Imports no torch."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.config import IMAGE_KINDS, DataConfig
from data.manifest import MANIFEST_NAME
from data.naming import prepared_directory
from data.origin import changed_sources, refuse_other_tokenizer
from data.packing import ensure_packing
from data.prepare import Part, merge, prepare
from data.schedule import Progress
from data.store import LocalStore


def prepare_and_tell(config: DataConfig, *, workers: int | None = None, part: Part | None = None) -> Path:
    """`data.prepare.prepare`, with a line before, progress on a terminal, and a line after; silent where all is there."""
    if _was_prepared(config):
        return prepare(config)
    what = config.source_text if part is None else f"part {part.number} of {part.of} of {config.source_text}"
    _say(f"preparing {what}{_with_tokenizer(config)}, once")
    directory, line = _watched(lambda watch: prepare(config, workers=workers, part=part, watch=watch, tell=_say))
    if part is None:
        _say(f"prepared {directory}: {line}")
    else:
        _say(f"prepared part {part.number} of {part.of} of {directory}: {line}")
    return directory


def prepare_or_tell(config: DataConfig, *, workers: int | None = None, part: Part | None = None) -> Path:
    """`prepare_and_tell` for one who asked to prepare: where all is there, says so, and whether the sources are as they were."""
    before = _was_prepared(config)
    directory = prepare_and_tell(config, workers=workers, part=part)
    if before:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime((directory / MANIFEST_NAME).stat().st_mtime))
        _say(
            f"{directory}: was prepared before ({when}), from these sources with these options, and they were not read again; "
            "to prepare anew, remove it or name another directory"
        )
        for source, why in tell_changed_sources(directory, config).items():
            _say(f"{directory}: whether source {source} has changed since cannot be told: {why}")
    return directory


def tell_changed_sources(directory: Path, config: DataConfig) -> dict[str, str]:
    """A warning for each source that has changed since a dataset was prepared from it. Returns those of which nobody can tell,
    with the reason. ValueError where the file of its tokenizer holds another one now."""
    refuse_other_tokenizer(directory, config)
    changed, unknown = changed_sources(directory, config)
    for source in changed:
        _say(
            f"warning: {directory}: source {source} has changed since it was prepared, and the dataset is used as it was made; "
            "prepare it anew for what the source holds now"
        )
    return unknown


def _was_prepared(config: DataConfig) -> bool:
    return (prepared_directory(config) / MANIFEST_NAME).exists()


def _with_tokenizer(config: DataConfig) -> str:
    """Which tokenizer, where one is used: what `datasets` streams may be images, unless a tokenizer was asked for."""
    kinds = {source.address.kind for source in config.sources}
    asked = config.tokenizer != DataConfig.model_fields["tokenizer"].default
    return f" (tokenizer {config.tokenizer})" if asked or not kinds <= {*IMAGE_KINDS, "hf"} else ""


def merge_and_tell(directory: Path, *, workers: int | None = None) -> Path:
    """`data.prepare.merge`, with a line after."""
    begun = time.monotonic()
    if merge(directory, workers=workers):
        _say(f"merged {directory}: every byte verified in {time.monotonic() - begun:.1f} s")
    else:
        _say(f"{directory}: was made before; `lockstep data verify {shlex.quote(str(directory))}` reads its bytes")
    return directory


def pack_and_tell(directory: Path, sequence_tokens: Sequence[int]) -> None:
    """The packing index of a prepared dataset for sequences of each of these lengths."""
    for tokens in sequence_tokens:
        config = DataConfig(packing="best_fit", sequence_tokens=tokens)
        ensure_packing(LocalStore(directory), config, tell=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _watched(work: Callable[[Callable[[Progress], None]], Path]) -> tuple[Path, str]:
    """Do the work, with a bar where somebody sees it. Returns its result, and a line of what was read and how fast."""
    begun = time.monotonic()
    last = Progress(documents=0, empty=0, tokens=0, size_bytes=0, found_bytes=0, read_bytes=0, input_bytes=None)
    with _bar() as show:

        def watch(progress: Progress) -> None:
            nonlocal last
            last = progress
            show(progress)

        directory = work(watch)
    seconds = time.monotonic() - begun
    return directory, f"{_counts(last)}, {last.size_bytes / 1e6:.1f} MB in {seconds:.1f} s ({_speed(last, seconds)})"


def _counts(progress: Progress) -> str:
    tokens = f", {progress.tokens:,} tokens" if progress.tokens else ""
    empty = f" (and {progress.empty:,} empty ones, left out)" if progress.empty else ""
    return f"{progress.documents:,} documents{empty}{tokens}"


def _speed(progress: Progress, seconds: float) -> str:
    return f"{(progress.size_bytes - progress.found_bytes) / 1e6 / max(seconds, 1e-9):.1f} MB/s"


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal: call it with the progress. Nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    begun = time.monotonic()
    text = TextColumn("{task.fields[text]}")
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        text,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, text="starting")

        def show(progress: Progress) -> None:
            text = f"{_counts(progress)}, {_speed(progress, time.monotonic() - begun)}"
            bar.update(task, completed=progress.read_bytes, total=progress.input_bytes, text=text)

        yield show
