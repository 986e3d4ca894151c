"""A dataset at an address as it lies there now: each file is fetched when it is opened, and this machine keeps none.

What the cache holds was verified when it came and says nothing of what lies at the address today.
"""

import tempfile
from collections.abc import Sequence
from io import FileIO

from data.download import Patience
from data.errors import NoRoom
from data.manifest import FileEntry
from data.remote import Remote

# A shard is of two or three files, which are looked at together.
_HELD_FILES = 4


class FreshStore:
    """The files last opened are held, without a name: they are gone with this process, however it ends."""

    opens_copies = False
    looks_ahead_bytes = 0

    def __init__(self, address: str, *, patience: Patience, timeout_seconds: float) -> None:
        self.address = address
        self._remote = Remote(address, timeout_seconds, patience)
        self._remote.connect()
        self._held: dict[str, FileIO] = {}
        """By their sha256, the one opened last at the end."""

    def read(self, name: str) -> bytes | None:
        return self._remote.read(name)

    def names(self) -> list[str] | None:
        return self._remote.names()

    def check(self, entry: FileEntry) -> None:
        """Nothing: only its content says what a file is."""

    def open(self, entry: FileEntry) -> FileIO:
        file = self._held.pop(entry.sha256, None) or self._fetch(entry)
        self._held[entry.sha256] = file
        if len(self._held) > _HELD_FILES:
            self._held.pop(next(iter(self._held))).close()
        return FileIO(f"/proc/self/fd/{file.fileno()}")  # opened once more: with a place in it of its own

    def _fetch(self, entry: FileEntry) -> FileIO:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it is held)
        try:
            self._remote.fetch(entry, file, lambda missing: False)
        except NoRoom as error:
            file.close()
            raise NoRoom(f"{tempfile.gettempdir()}: {error}; free some of the disk or set TMPDIR") from error
        except BaseException:
            file.close()
            raise
        return file

    def expect(self, start: int, stop: int, entries: Sequence[FileEntry]) -> None:
        """Nothing: nothing is fetched ahead."""

    def reached(self, position: int) -> None:
        """Nothing: what was opened goes by itself."""

    def expects(self, entry: FileEntry) -> bool:
        return True
