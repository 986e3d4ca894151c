"""Checkpoints on disk: which exist, what they hold, and whether every byte is as it was written. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
_PUBLISHED = re.compile(r"step-(\d{8,})")
TEMPORARY_PREFIX = ".tmp-"
_READ_BYTES = 1 << 22


class BadCheckpoint(ValueError):
    """A checkpoint that must not be used, and why, in one line."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def published_checkpoints(root: Path) -> list[Path]:
    """The published checkpoints under `root`, newest step first. Half-written and `.corrupt` ones are not among them."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _PUBLISHED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def corrupt_checkpoints(root: Path) -> list[Path]:
    """Checkpoints that were published once and failed verification."""
    return sorted(root.glob("step-*.corrupt*")) if root.is_dir() else []


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_manifest(directory: Path, fields: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes MANIFEST.json, fsynced. `files`: name -> {"sha256", "bytes"}; its own hash is added."""
    manifest = {"format_version": FORMAT_VERSION, **fields, "files": files}
    manifest["manifest_sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    write_durably(directory / MANIFEST_NAME, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its own hash checked. Raises BadCheckpoint; ValueError for a newer format."""
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        # Hashed as bytes on disk would be: equal values in another spelling are a changed file too.
        if path.read_bytes() != json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n":
            raise ValueError("not as it was written")
    except FileNotFoundError:
        raise BadCheckpoint(f"{directory}: no {MANIFEST_NAME}; it is not a checkpoint of Lockstep") from None
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: unreadable ({error})") from None
    claimed = manifest.pop("manifest_sha256", None)
    if hashlib.sha256(canonical_json(manifest)).hexdigest() != claimed:
        raise BadCheckpoint(f"{path}: does not match its own hash")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version} is newer than this Lockstep reads ({FORMAT_VERSION}); upgrade Lockstep"
        )
    if (named := _PUBLISHED.fullmatch(directory.name)) and manifest.get("step") != int(named[1]):
        raise BadCheckpoint(f"{path}: is of step {manifest.get('step')}; files of two checkpoints were mixed")
    return manifest


def verify_files(
    directory: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1, *, contents: bool = True
) -> str | None:
    """Why the files of `manifest` are not what was written, or None. Checks every `parts`-th file, from `part` on.

    contents: whether the files are read, or only looked at: which there are, and how large.
    """
    listed = manifest["files"]
    if part == 0:
        present = {path.name for path in directory.iterdir()} - {MANIFEST_NAME}
        if extra := sorted(present - set(listed)):
            return f"{directory}: holds files that its manifest does not list: {', '.join(extra)}"
    for name in sorted(listed)[part::parts]:
        path = directory / name
        if Path(name).name != name or path.is_symlink():
            return f"{directory}: the manifest lists {name!r}, which is not a plain file name"
        if not path.is_file():
            return f"{path}: missing"
        size, expected = path.stat().st_size, listed[name]["bytes"]
        if size != expected:
            return f"{path}: {size} bytes, the manifest says {expected}"
        if contents and sha256_of_file(path) != listed[name]["sha256"]:
            return f"{path}: its bytes changed since they were written (sha256 differs)"
    return None


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def new_temporary(root: Path, step: int) -> Path:
    """A directory of its own for a checkpoint that is being written."""
    path = root / f"{TEMPORARY_PREFIX}{checkpoint_name(step)}-{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    return path


def publish(temporary: Path, root: Path, step: int) -> Path:
    """Gives a complete checkpoint its name, durably. One of the same step, from before a resume, is replaced."""
    final = root / checkpoint_name(step)
    sync_directory(temporary)
    superseded = _set_aside(final) if final.exists() else None
    temporary.rename(final)
    sync_directory(root)
    if superseded is not None:
        shutil.rmtree(superseded)
    return final


def remove(directory: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that no half-deleted one can ever be found."""
    shutil.rmtree(_set_aside(directory))


def _set_aside(directory: Path) -> Path:
    aside = directory.with_name(f"{TEMPORARY_PREFIX}deleted-{uuid.uuid4().hex[:12]}")
    directory.rename(aside)
    return aside


def remove_temporaries(root: Path) -> None:
    """Clears what earlier attempts left half-written or half-deleted. Only for the one process that owns the run."""
    if root.is_dir():
        for path in root.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path)


def mark_corrupt(directory: Path) -> Path:
    """Takes a checkpoint that failed verification out of the way, keeping its bytes as evidence."""
    target = directory.with_name(directory.name + ".corrupt")
    if target.exists():
        target = directory.with_name(f"{directory.name}.corrupt-{uuid.uuid4().hex[:6]}")
    directory.rename(target)
    return target


def retire(root: Path, keep_last: int, keep_every_steps: int | None) -> None:
    """Deletes published checkpoints but the newest `keep_last` and those at multiples of `keep_every_steps`."""
    for path in published_checkpoints(root)[keep_last:]:
        step = int(path.name.removeprefix("step-"))
        if keep_every_steps is None or step % keep_every_steps:
            remove(path)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file atomically: a temporary beside it, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
