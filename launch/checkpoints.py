"""`lockstep checkpoint verify|list|export`: what a run has saved, for people and other tools. Renames and deletes nothing.

Imports torch only where tensors are read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.manifest import (
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    BadCheckpoint,
    corrupt_checkpoints,
    published_checkpoints,
    read_manifest,
    verify_files,
)
from launch.exit_codes import DO_NOT_RESTART, DONE
from launch.run_directory import NONE_VERIFIES
from launch.tables import format_table

if TYPE_CHECKING:
    from distrib.checkpoint import Checkpoint
    from distrib.world import World

_COLUMNS = ("checkpoint", "step", "position", "world", "engine", "bytes", "date", "state")
_DELETED = "deleted by the run while it was read"


def verify(path: Path) -> int:
    """Reads every byte of a checkpoint, or of all checkpoints of a run, and prints a line for each. Returns an exit code."""
    exit_code = DONE
    for checkpoint in _readable_at(path):
        reason = _why_bad(checkpoint, contents=True)
        if reason is None:
            print(f"{checkpoint}: good")
        elif not checkpoint.exists():
            print(f"{checkpoint}: {_DELETED}")
        else:
            print(f"{checkpoint}: BAD: {reason}")
            exit_code = DO_NOT_RESTART
    return exit_code


def list_run(run_directory: Path) -> int:
    """Prints a table of a run's checkpoints, newest first, without reading their tensors. Returns an exit code."""
    root = run_directory / "checkpoints"
    published = _checkpoints_at(run_directory)
    rows = [_row(path) for path in published]
    rows += [_other_row(path, "put aside: it failed verification") for path in corrupt_checkpoints(root)]
    rows += [_other_row(path, "not published") for path in _unpublished(root)]
    if not rows:
        raise _nothing_saved(run_directory)
    print(format_table([_COLUMNS, *rows]))
    if published:
        print(f"contents were not read; `lockstep checkpoint verify {run_directory}` reads them")
    return DONE


def export(path: Path, out: Path) -> int:
    """Writes the weights of a checkpoint, or of a run's newest good one, for other tools. Returns an exit code."""
    candidates = _readable_at(path)
    from distrib.checkpoint import open_checkpoint
    from distrib.export import export_weights, refuse_occupied
    from distrib.world import single_process_world

    refuse_occupied(out)
    world = single_process_world("cpu")
    while True:
        checkpoint = open_checkpoint(path, world) if candidates == [path] else _newest_good(path, world)
        try:
            exported = export_weights(checkpoint, out)
            break
        except ValueError:
            if candidates == [path] or checkpoint.path.exists():
                raise
            # A live run has retired it meanwhile, for a newer one.
    print(
        f"{out}: {exported.tensors} tensors, {exported.bytes:,} bytes in {len(exported.files)} "
        f"file{'s' if len(exported.files) > 1 else ''}, from {checkpoint.path}"
    )
    return DONE


def _newest_good(run_directory: Path, world: World) -> Checkpoint:
    from distrib.checkpoint import read_newest_good

    found, passed_over = read_newest_good(run_directory / "checkpoints", world)
    for bad in passed_over:
        print(f"passed over a checkpoint: {bad.reason}", file=sys.stderr)
    if found is None:
        raise BadCheckpoint(f"{run_directory}: no good checkpoint; restore one, or train anew")
    return found


def _checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those that the run there has published, newest first. Raises ValueError where neither is."""
    if _is_checkpoint(path):
        return [path]
    if not (path / "run.json").is_file():
        raise ValueError(f"{path}: neither a checkpoint (no {MANIFEST_NAME}) nor a run (no run.json)")
    return published_checkpoints(path / "checkpoints")


def _readable_at(path: Path) -> list[Path]:
    """As `_checkpoints_at`, and there is at least one. Raises BadCheckpoint where all that a run had were put aside."""
    found = _checkpoints_at(path)
    root = path / "checkpoints"
    if not found and corrupt_checkpoints(root):
        raise BadCheckpoint(f"{root}: {NONE_VERIFIES}")
    if not found:
        raise _nothing_saved(path)
    return found


def _unpublished(root: Path) -> list[Path]:
    return sorted(root.glob(f"{TEMPORARY_PREFIX}*"))


def _nothing_saved(run_directory: Path) -> ValueError:
    names = ", ".join(path.name for path in _unpublished(run_directory / "checkpoints"))
    remark = f" (not published: {names})" if names else ""
    return ValueError(f"{run_directory}: no checkpoint was saved yet{remark}; train it further")


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint, or what is left of one, lies at `path`: an empty directory of a checkpoint's name is one, too."""
    if (path / MANIFEST_NAME).is_file() or any(path.glob("*.safetensors")):
        return True
    if not path.is_dir() or (path / "run.json").is_file():  # a run may have such a name, too
        return False
    return path in (*published_checkpoints(path.parent), *corrupt_checkpoints(path.parent))


def _why_bad(checkpoint: Path, *, contents: bool) -> str | None:
    try:
        return verify_files(checkpoint, read_manifest(checkpoint), contents=contents)
    except (ValueError, FileNotFoundError) as error:  # also what a newer version has written
        return str(error)


def _row(checkpoint: Path) -> tuple[str, ...]:
    try:
        manifest = read_manifest(checkpoint)
        saved = time.localtime((checkpoint / MANIFEST_NAME).stat().st_mtime)
    except (ValueError, FileNotFoundError) as error:
        return _other_row(checkpoint, f"BAD: {error}" if checkpoint.exists() else _DELETED)
    reason = _why_bad(checkpoint, contents=False)
    if reason is not None and not checkpoint.exists():
        return _other_row(checkpoint, _DELETED)
    return (
        checkpoint.name,
        *(str(manifest.get(key, "-")) for key in ("step", "position", "world", "engine")),
        f"{sum(file['bytes'] for file in manifest['files'].values()):,}",
        time.strftime("%Y-%m-%d %H:%M:%S", saved),
        "complete" if reason is None else f"BAD: {reason}",
    )


def _other_row(path: Path, state: str) -> tuple[str, ...]:
    return (path.name, *[""] * (len(_COLUMNS) - 2), state)
