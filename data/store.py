"""Where the files of a prepared dataset lie, and how one of them is had on this machine."""

import stat
from pathlib import Path
from typing import Protocol

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

    def check(self, entry: FileEntry) -> None:
        """What can be said of a listed file without reading it: CorruptData if it cannot be the one that was prepared."""
        ...

    def fetch(self, entry: FileEntry) -> Path:
        """A local path of a listed file, of the right size; its content is not checked here."""
        ...


class LocalStore:
    """A directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = str(directory)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None

    def check(self, entry: FileEntry) -> None:
        self.fetch(entry)

    def fetch(self, entry: FileEntry) -> Path:
        """The path of a listed file, after checking that it is a regular file in the directory, of the size listed."""
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
        difference = status.st_size - entry.bytes
        if difference:
            word = "more than" if difference > 0 else "short of"
            raise CorruptData(f"{path}: {abs(difference)} bytes {word} the manifest's {entry.bytes}; {RESTORE}")
        return path


def read_manifest(store: Store) -> Manifest:
    """Read and check a dataset's `manifest.json`.

    CorruptData if any byte of it was altered; ValueError if there is none or a newer Lockstep wrote it.
    """
    content = store.read(MANIFEST_NAME)
    if content is None:
        raise ValueError(f"{store.address}: no {MANIFEST_NAME}: not a prepared dataset; run `lockstep prepare`")
    return parse_manifest(content, f"{store.address}/{MANIFEST_NAME}")
