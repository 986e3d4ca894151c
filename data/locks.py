"""Locks between processes that a crash cannot leave behind: the kernel releases them with the process that holds them."""

import errno
import fcntl
import os
import stat
from io import FileIO
from pathlib import Path

# Nothing can be written there, as it is.
NO_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# File systems without locks between processes.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Others may delete a place again and again, but not so often between two calls: then it cannot be made at all.
_MOST_TRIES = 1000


def take_lock(path: Path, *, wait: bool) -> FileIO | None:
    """The file at `path`, made if there is none, open for appending and locked until it is closed.

    None where another one holds it and `wait` is false. Whoever holds the lock may remove or rename the file: those
    who waited for it begin again with a new one. Threads of one process exclude each other too. OSError as the file system
    raises it, also where it takes no locks.
    """
    problem = OSError(errno.ESTALE, "does not stay the file that was opened", str(path))
    for _ in range(_MOST_TRIES):
        try:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), "r+")
        except FileNotFoundError as error:
            _refuse_dangling(path)
            make_directory(path.parent)
            problem = error
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(file, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        file.close()
    raise problem


def release(file: FileIO) -> None:
    """Give the lock up, but keep the file open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def make_directory(path: Path) -> None:
    """Make a directory and what it lies in, even while others delete them. OSError as the file system raises it."""
    problem: OSError
    for _ in range(_MOST_TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError as error:  # a directory above it was just deleted
            problem = error
        except FileExistsError as error:
            there = Path(error.filename)  # it, or something above it
            _refuse_dangling(there)
            if _is_something_else(there):
                raise
            problem = error
    raise problem


def listing(directory: Path) -> list[Path]:
    """What lies in a directory; nothing where it was deleted."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _refuse_dangling(path: Path) -> None:
    """FileExistsError where a link lies there that leads nowhere: nothing can be made in its place."""
    if path.is_symlink() and not path.exists():
        raise FileExistsError(errno.EEXIST, "a link to what is not there", str(path))


def _is_something_else(path: Path) -> bool:
    """Whether what lies there is no directory. Asked at once: between two questions it may be deleted and made again."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _lies_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
