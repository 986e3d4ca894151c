"""Saving and loading the canonical form: complete and verified, or not there (law 5)."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from distrib import manifest as manifests
from distrib.config import CheckpointConfig
from distrib.engine import CanonicalState
from distrib.manifest import BadCheckpoint
from distrib.phases import enter
from distrib.safetensors_storage import SafetensorsWriter
from distrib.world import World

log = logging.getLogger("lockstep")
STATE_NAME = "state.json"
# Room asked for beyond the tensors: headers, manifest, the file system's own bookkeeping.
_SPARE_BYTES = 1 << 20


class SaveFailed(ValueError):
    """A checkpoint that could not be written, in one line; earlier ones are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    manifest: dict[str, Any]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that failed verification, and where it lies now."""

    path: Path
    reason: str


def save_checkpoint(
    root: Path,
    state: CanonicalState,
    *,
    step: int,
    scalars: Mapping[str, Any],
    fields: Mapping[str, Any],
    config: CheckpointConfig,
    world: World,
) -> Path:
    """Writes, verifies nothing half-done is visible, publishes, and retires old ones. All ranks call it together, each from
    one thread; `world` must be that thread's (`World.in_save_thread`).

    `scalars` go to state.json beside the engine's; `fields` to the manifest. Raises SaveFailed on every rank.
    """
    temporary = world.broadcast_object(_begin(root, state, step) if world.rank == 0 else None)
    if isinstance(temporary, str):
        raise SaveFailed(temporary)
    writer = SafetensorsWriter(temporary)
    failure: str | None = None
    try:
        _expect_to_be_alone()
        dcp.save(state.tensors, storage_writer=writer, process_group=world.host_group, no_dist=world.size == 1)
    except CheckpointException as error:
        failure = _first_failure(error, root)
    except OSError as error:
        failure = _explain(error, root)
    written = world.gather_objects(writer.files)
    published: Path | str | None = failure
    if world.rank == 0:
        if failure is None:
            files = {name: record for part in written for name, record in part.items()}
            published = _finish(temporary, root, step, state, scalars, fields, files, config)
        if isinstance(published, str):
            shutil.rmtree(temporary, ignore_errors=True)
    published = world.broadcast_object(published)
    if isinstance(published, str):
        raise SaveFailed(published)
    assert isinstance(published, Path)
    return published


def newest_good_checkpoint(root: Path, world: World) -> tuple[Checkpoint | None, list[PassedOver]]:
    """The newest published checkpoint whose every byte verifies, and those that were passed over on the way, renamed so
    that nobody uses them. For the process, or the ranks together, that own the run; others use `read_newest_good`."""
    passed_over: list[PassedOver] = []
    for path in world.broadcast_object(manifests.published_checkpoints(root)):
        try:
            return open_checkpoint(path, world), passed_over
        except BadCheckpoint as error:
            moved = world.broadcast_object(manifests.mark_corrupt(path) if world.rank == 0 else None)
            passed_over.append(PassedOver(moved, str(error)))
    return None, passed_over


def read_newest_good(root: Path, world: World) -> tuple[Checkpoint | None, list[PassedOver]]:
    """As `newest_good_checkpoint`, for one process that only looks: it renames nothing, and the run may go on meanwhile."""
    passed_over: list[PassedOver] = []
    waiting = manifests.published_checkpoints(root)
    while waiting:
        path = waiting.pop(0)
        try:
            return open_checkpoint(path, world), passed_over
        except (BadCheckpoint, FileNotFoundError) as error:
            if path.exists():
                passed_over.append(PassedOver(path, str(error)))
            else:  # retired while it was read, because the run has published newer ones
                seen = {bad.path for bad in passed_over}
                waiting = [path for path in manifests.published_checkpoints(root) if path not in seen]
    return None, passed_over


def open_checkpoint(path: Path, world: World) -> Checkpoint:
    """Verifies a checkpoint, the files shared out among the ranks. Raises BadCheckpoint on every rank alike."""
    reason: str | None = None
    manifest: dict[str, Any] = {}
    newer: str | None = None
    try:
        manifest = manifests.read_manifest(path)
        reason = manifests.verify_files(path, manifest, world.rank, world.size)
    except BadCheckpoint as error:
        reason = str(error)
    except ValueError as error:
        newer = str(error)
    for other_reason, other_newer in world.gather_objects((reason, newer)):
        if other_newer is not None:
            raise ValueError(other_newer)
        if other_reason is not None:
            raise BadCheckpoint(other_reason)
    scalars = json.loads((path / STATE_NAME).read_bytes())
    return Checkpoint(path, manifest, scalars)


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Reads a verified checkpoint into `tensors`, in place, sharded or not. Every name must be there with its shape.

    Raises ValueError that names what differs: the checkpoint is of another model or optimizer; BadCheckpoint where a
    tensor is not whole.
    """
    reader = HuggingFaceStorageReader(str(checkpoint.path))
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in entries.items()}
    # A tensor of which a piece is missing would be read as far as it goes, and nobody told.
    torn = sorted(
        name
        for name, entry in entries.items()
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel()
    )
    if torn:
        raise BadCheckpoint(f"{checkpoint.path}: holds only pieces of {_shorten(torn)}")
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    groups = {name.split(".", 1)[0] for name in wanted}
    difference = _describe_difference(wanted, {n: s for n, s in stored.items() if n.split(".", 1)[0] in groups})
    if difference:
        raise ValueError(f"{checkpoint.path}: not a checkpoint of this model and optimizer: {difference}")
    _expect_to_be_alone()
    dcp.load(tensors, storage_reader=reader, process_group=world.host_group, no_dist=world.size == 1)


def _expect_to_be_alone() -> None:
    """Silences the warning that a single process saves alone, which is what was asked for. For good: to put the filters back
    afterwards, in a thread, would undo what other threads have set meanwhile."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _describe_difference(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> str:
    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(stored.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name])
    parts = []
    if missing:
        parts.append(f"it lacks {_shorten(missing)}")
    if extra:
        parts.append(f"it also has {_shorten(extra)}")
    if reshaped:
        shown = [f"{name} is {list(stored[name])} there and {list(wanted[name])} here" for name in reshaped]
        parts.append(_shorten(shown))
    return "; ".join(parts)


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _begin(root: Path, state: CanonicalState, step: int) -> Path | str:
    """The directory to write into, or why there can be none."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values()) + _SPARE_BYTES
        free = shutil.disk_usage(root).free
        if free < needed:
            return f"{root}: {free} bytes free, a checkpoint needs {needed}; make room (earlier checkpoints are intact)"
        return manifests.new_temporary(root, step)
    except OSError as error:
        return _explain(error, root)


def _finish(
    temporary: Path,
    root: Path,
    step: int,
    state: CanonicalState,
    scalars: Mapping[str, Any],
    fields: Mapping[str, Any],
    files: dict[str, dict[str, Any]],
    config: CheckpointConfig,
) -> Path | str:
    enter("save.manifest")
    try:
        manifests.write_durably(
            temporary / STATE_NAME, json.dumps({**scalars, "engine": state.scalars}, indent=2, sort_keys=True).encode()
        )
        path = temporary / STATE_NAME
        files[STATE_NAME] = {"sha256": manifests.sha256_of_file(path), "bytes": path.stat().st_size}
        manifests.write_manifest(temporary, {"step": step, **fields}, files)
        enter("save.rename")
        published = manifests.publish(temporary, root, step)
    except OSError as error:
        return _explain(error, root)
    try:
        manifests.retire(root, config.keep_last, config.keep_every_steps)
    except OSError as error:
        # The new checkpoint is safe: one that should have gone costs room, not the run.
        log.warning("%s: an old checkpoint could not be deleted (%s)", error.filename or root, error.strerror)
    return published


def _first_failure(error: CheckpointException, root: Path) -> str:
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError):
        return f"{_explain(cause, root)} (rank {rank})"
    raise error


def _explain(error: OSError, root: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{root}: no room for a checkpoint ({error.strerror}); make room (earlier checkpoints are intact)"
    return f"{error.filename or root}: a checkpoint could not be written ({error.strerror}); earlier ones are intact"
