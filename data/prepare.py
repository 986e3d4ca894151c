"""Preparation: a source becomes a directory of shards with a manifest, completely or not at all. Imports no torch."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.addresses import is_remote
from data.build import Progress, build_images, build_tokens
from data.config import DataConfig, parse_source
from data.manifest import FORMAT_VERSION, MANIFEST_NAME
from data.shards import HashingFile
from data.sources import ImageSource, TextSource, open_source, source_state
from data.store import LocalStore, read_manifest

# No room on the disk, over the quota, over the process's limit of file size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

UNWRITABLE = (
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def prepared_directory(config: DataConfig) -> Path:
    """Where the dataset lies or will lie: `config.directory`, or a name made from all that determines its bytes."""
    if is_remote(config.directory):
        raise ValueError(f"{config.directory}: datasets are prepared on a local disk; prepare there, then copy it")
    if config.directory is not None:
        return Path(config.directory)
    address = parse_source(config.source)
    identity = _identity(config) | {"format_version": FORMAT_VERSION, "state": source_state(address)}
    tokenizer_file = Path(config.tokenizer).expanduser()
    if tokenizer_file.is_file():
        identity["tokenizer_sha256"] = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", config.source).strip("-").lower()[-40:].strip("-")
    return Path("prepared") / f"{slug}-{digest}"


def _identity(config: DataConfig) -> dict[str, object]:
    """What determines the bytes of a dataset, beside the source's content."""
    images = parse_source(config.source).kind in ("digits", "images")
    return {
        "source": config.source,
        "tokenizer": None if images else config.tokenizer,
        "validation_fraction": config.validation_fraction,
        "shard_bytes": config.shard_bytes,
    }


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Path:
    """Make the dataset of this configuration unless it is there, and return its directory.

    `progress(documents, bytes)` is called as documents are written, with totals so far. The directory appears under its
    name only when complete; two processes may prepare the same one. ValueError of one line: missing or empty source,
    a split without documents, a directory that holds something else or cannot be written, a full disk.
    """
    directory = prepared_directory(config)
    if _is_prepared(directory, config):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / f".{directory.name}.lock"):
            if not _is_prepared(directory, config):  # another process may have made it while this one waited
                _prepare_in_place(directory, config, progress)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise ValueError(
                f"{directory}: cannot be written ({error.filename}: {error.strerror}); set data.directory"
            ) from error
        raise
    return directory


def _is_prepared(directory: Path, config: DataConfig) -> bool:
    """Whether the dataset is there already; a ValueError if the directory holds anything else."""
    if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return False
    manifest = read_manifest(LocalStore(directory))
    found: dict[str, object] = {
        "source": manifest.source.address,
        "tokenizer": manifest.tokenizer.spec if manifest.tokenizer else None,
        "validation_fraction": manifest.validation_fraction,
        "shard_bytes": manifest.shard_bytes,
    }
    for key, asked in _identity(config).items():
        if found[key] != asked and not (key == "tokenizer" and found[key] is None):  # images have no tokenizer
            raise ValueError(
                f"{directory}: prepared with data.{key} {found[key]!r}, but the recipe has {asked!r}; "
                "change the recipe or choose another data.directory"
            )
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield


def _prepare_in_place(directory: Path, config: DataConfig, progress: Progress | None) -> None:
    prefix = f".{directory.name}.preparing-"
    for stale in directory.parent.glob(glob.escape(prefix) + "*"):
        shutil.rmtree(stale)  # whoever made it held the lock that this process holds now: it is dead
    workspace = directory.parent / f"{prefix}{os.getpid()}"
    workspace.mkdir()
    try:
        source = open_source(parse_source(config.source))
        try:
            if isinstance(source, TextSource):
                manifest = build_tokens(source, config, workspace, progress)
            else:
                manifest = build_images(source, config, workspace, progress)
            with HashingFile(workspace / MANIFEST_NAME) as file:
                file.write(manifest.to_bytes())
                file.finish()
            _sync_directory(workspace)
        except OSError as error:
            if error.errno in FULL:
                raise ValueError(_full_disk(directory, workspace, source)) from error
            raise
        os.rename(workspace, directory)
        _sync_directory(directory.parent)
    finally:
        if workspace.exists():
            shutil.rmtree(workspace)


def _full_disk(directory: Path, workspace: Path, source: TextSource | ImageSource) -> str:
    written = sum(path.stat().st_size for path in workspace.iterdir())
    # At most a token for each byte of text, and two bytes for a token.
    most = source.size_bytes and source.size_bytes * (2 if isinstance(source, TextSource) else 1)
    need = f"up to {most} bytes" if most else f"more than the {written} bytes written"
    return f"{directory}: disk full after {written} bytes, {need} are needed; free some or set data.directory"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
