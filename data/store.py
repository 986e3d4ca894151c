"""Where the files of a prepared dataset lie, and how one of them is had on this machine."""

import os
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Protocol

from data.addresses import is_remote, parse_address
from data.cache import ShardCache
from data.config import DataConfig
from data.download import Patience
from data.errors import CorruptData
from data.manifest import MANIFEST_NAME, RESTORE, FileEntry, Manifest, parse_manifest


class Store(Protocol):
    """What holds a dataset's files."""

    @property
    def address(self) -> str:
        """What messages call it."""
        ...

    def read(self, name: str) -> bytes | None:
        """The whole of a small file; None if there is none. ValueError where it cannot be read."""
        ...

    def names(self) -> list[str] | None:
        """What lies beside the manifest, and that, sorted; None where nobody says it."""
        ...

    def check(self, entry: FileEntry) -> None:
        """What can be said of a listed file without reading it: CorruptData if it cannot be the one that was prepared."""
        ...

    def open(self, entry: FileEntry) -> FileIO:
        """A listed file, open for reading on this machine and of the right size: it stays readable whatever becomes of
        its name. CorruptData if it cannot be the one that was prepared; not all its content is checked here."""
        ...

    @property
    def opens_copies(self) -> bool:
        """Whether what it opens are copies of a cache: one that was altered since is fetched anew when it is opened again."""
        ...

    @property
    def looks_ahead_bytes(self) -> int:
        """How much is worth knowing of what is read next; 0: nothing, and `expect` and `reached` do nothing."""
        ...

    def expect(self, start: int, stop: int, entries: Sequence[FileEntry]) -> None:
        """These files are read between two positions, which rise from call to call."""
        ...

    def reached(self, position: int) -> None:
        """What is read before `position` is done with."""
        ...

    def expects(self, entry: FileEntry) -> bool:
        """Whether a file was expected at a position that is still ahead."""
        ...


class LocalStore:
    """A directory of this machine."""

    opens_copies = False
    looks_ahead_bytes = 0

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = str(directory)

    def read(self, name: str) -> bytes | None:
        path = self.directory / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # of some others, reading would not end
                raise CorruptData(f"{path}: not a regular file; {RESTORE}")
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            if os.path.lexists(self.directory):
                raise ValueError(f"{self.directory}: is a file, and a dataset is a directory; name another") from None
            return None
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory))

    def check(self, entry: FileEntry) -> None:
        """It must be a regular file in the directory, of the size listed."""
        path = self.directory / entry.name
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                if path.resolve(strict=True).parent != self.directory.resolve():
                    raise CorruptData(f"{path}: a link to outside the dataset's directory; replace it by the file")
                status = path.stat()
        except (FileNotFoundError, RuntimeError):
            raise CorruptData(f"{path}: listed in {MANIFEST_NAME} but missing; {RESTORE}") from None
        if not stat.S_ISREG(status.st_mode):
            raise CorruptData(f"{path}: not a regular file; {RESTORE}")
        _check_size(str(path), status.st_size, entry)

    def open(self, entry: FileEntry) -> FileIO:
        self.check(entry)
        file = FileIO(self.directory / entry.name)
        _check_size(file.name, os.fstat(file.fileno()).st_size, entry)  # grown or cut since
        return file

    def expect(self, start: int, stop: int, entries: Sequence[FileEntry]) -> None:
        """Nothing: the files are here."""

    def reached(self, position: int) -> None:
        """Nothing: the files stay."""

    def expects(self, entry: FileEntry) -> bool:
        return True


def _check_size(name: str, size: int, entry: FileEntry) -> None:
    difference = size - entry.bytes
    if difference:
        word = "more than" if difference > 0 else "short of"
        raise CorruptData(f"{name}: {abs(difference)} bytes {word} the manifest's {entry.bytes}; {RESTORE}")


def open_store(address: Path | str, config: DataConfig) -> Store:
    """The store at a path of this machine, or at an address that fsspec reads, through the cache that the recipe names.

    ValueError where the address is not one, holds a secret, or needs a package that is not installed.
    """
    address = parse_address(address)
    if not is_remote(address):
        return LocalStore(Path(address))
    from data.remote import RemoteStore  # takes fsspec along

    return RemoteStore(
        address,
        open_cache(config),
        patience=Patience(config.download_retries, config.download_pause_seconds),
        timeout_seconds=config.download_timeout_seconds,
        download_threads=config.download_threads,
    )


def open_fresh_store(address: Path | str) -> Store:
    """The store at a path or an address, and no cache between: what is read of it is what lies there now.

    ValueError as `open_store`.
    """
    address = parse_address(address)
    if not is_remote(address):
        return LocalStore(Path(address))
    from data.fresh import FreshStore  # takes fsspec along

    usual = DataConfig()
    return FreshStore(
        address,
        patience=Patience(usual.download_retries, usual.download_pause_seconds),
        timeout_seconds=usual.download_timeout_seconds,
    )


def open_cache(config: DataConfig) -> ShardCache:
    """The cache that a recipe names. Unless it does, each user has one of their own."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return ShardCache(config.cache_directory or home / "lockstep" / "shards", config.cache_bytes)


def read_manifest(store: Store) -> Manifest:
    """Read and check a dataset's `manifest.json`.

    CorruptData if any byte of it was altered; ValueError if there is none or another version of Lockstep wrote it.
    """
    content = store.read(MANIFEST_NAME)
    if content is None:
        raise ValueError(f"{store.address}: no {MANIFEST_NAME}: not a prepared dataset; run `lockstep prepare`")
    return parse_manifest(content, f"{store.address}/{MANIFEST_NAME}")
