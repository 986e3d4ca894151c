"""The place of a dataset that is being prepared: whether one can appear there, what lies beside it meanwhile, and its lock."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.locks import NO_LOCKS, NO_PLACE, take_lock
from data.manifest import MANIFEST_NAME

# No room on the disk, over the quota, over the process's limit of file size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

UNWRITABLE = (*FULL, *NO_PLACE, *NO_LOCKS, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV)


def refuse_unfit(directory: Path) -> None:
    """ValueError for a place where no directory can be given its name once it is complete; told before any work."""
    if (directory / MANIFEST_NAME).exists():
        return  # it has its name
    if directory.name in ("", ".."):
        raise ValueError(
            f"{directory}: a dataset's directory needs a name of its own; give one, such as {directory}/dataset"
        )
    if directory.is_symlink():
        target = os.readlink(directory)
        raise ValueError(f"{directory}: is a link, which no dataset can replace; give what it leads to ({target})")
    if os.path.ismount(directory):
        raise ValueError(f"{directory}: is a mount point, which no dataset can replace; give a directory below it")


def exists(directory: Path) -> bool:
    """Whether anything lies there; an empty directory is nothing."""
    return os.path.lexists(directory) and not (directory.is_dir() and not any(directory.iterdir()))


def workspaces_of(directory: Path) -> Path:
    """Where the workspaces of a dataset lie."""
    return directory.parent / f".{directory.name}.preparing"


def inside(path: Path) -> list[Path]:
    """What lies in a directory, sorted; nothing where there is none."""
    return sorted(path.iterdir()) if path.is_dir() else []


def remove_leftovers(directory: Path) -> None:
    """Clean up after a process that was killed between giving the dataset its name and doing this itself."""
    if workspaces_of(directory).exists():
        with locked(directory):
            clean_up(directory)


def clean_up(directory: Path) -> None:
    """Remove the lock, which this process holds, and then the workspaces: whoever finds one of those does this again.

    Only where the dataset has its name. Over a network file system another machine may for moments see the lock where it
    was removed, and take it while a third one makes a new one: harmless then, because there is nothing left to make.
    """
    _lock_path(directory).unlink(missing_ok=True)
    shutil.rmtree(workspaces_of(directory), ignore_errors=True)  # others may be at it too


def _lock_path(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within, no other process prepares this dataset. Waits until it may."""
    lock = take_lock(_lock_path(directory), wait=True)
    assert lock is not None
    with lock:
        yield


@contextlib.contextmanager
def lock_removed_with_all_else(directory: Path) -> Iterator[None]:
    """Where a preparation fails and leaves nothing, its lock goes too. Whoever holds the lock may remove it; what `clean_up`
    says of network file systems could here make one of two preparations fail, which then goes on when it is started again."""
    try:
        yield
    except BaseException:
        if not workspaces_of(directory).exists():
            _lock_path(directory).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def in_one_line(directory: Path) -> Iterator[None]:
    """A ValueError for a place that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise ValueError(
                f"{directory}: cannot be written ({error.filename}: {error.strerror}); set data.directory"
            ) from error
        raise
