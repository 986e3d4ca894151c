"""A bounded cache of whole files on the local disk, shared by every process of a node and named by content.

    files/SHA256           complete and verified; verified again whenever it is opened
    partial/SHA256.BYTES   being downloaded by whoever holds its lock, or left by someone who died: the next one resumes it
    claims/                which files each live process needs next, and how soon
    lock                   held for moments, while it is decided what goes

Nothing but ordinary files, and no moment at which a kill leaves anything to clean up by hand. Two processes that want
one file download it once: the second waits for the first one's lock. The whole directory may be deleted at any time.
"""

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple

import xxhash

from data.claims import Claim, Claims
from data.download import FULL, MakeRoom
from data.errors import NoRoom, Unavailable
from data.locks import NO_LOCKS, NO_PLACE, listing, make_directory, release, take_lock
from data.manifest import BLOCK_BYTES, FileEntry

log = logging.getLogger("lockstep")

# What may pass.
_TROUBLE = (errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE)

Fill = Callable[[FileIO, MakeRoom], None]
"""Downloads into an open file; the second argument frees some room on a full disk."""

NextUse = tuple[float, str]
"""How many samples from now, and the file's sha256: no two files are needed equally soon."""
NOW: NextUse = (-1.0, "")


class _Victim(NamedTuple):
    next_use: NextUse
    last_used_ns: int
    bytes: int
    path: Path


class ShardCache:
    """The files of a cache directory, as one process uses them.

    What lies there stays within `limit_bytes`, except that a file needed at once is fetched even if only downloads in
    flight could make room for it.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._claims = Claims(directory / "claims")
        self._own: Mapping[str, Claim] = {}

    def claim(self, claims: Mapping[str, Claim]) -> None:
        """Say how soon each file, by its sha256, is used next."""
        self._own = claims
        with self._told_in_a_line(), self._unless_full():
            self._claims.publish(claims)

    def open(self, entry: FileEntry, fill: Fill) -> FileIO:
        """The file, open for reading: it stays readable whatever becomes of its name. Waits for its download.

        NoRoom where the disk is full and nothing can be evicted; ValueError where the directory cannot be written;
        what `fill` raises.
        """
        with self._told_in_a_line():
            kept = self._open_kept(entry)
            if kept is not None:
                return kept
            part = take_lock(self._partial(entry), wait=True)
            assert part is not None
            try:
                kept = self._open_kept(entry)  # another may have fetched it while this one waited
                if kept is not None:
                    self._partial(entry).unlink(missing_ok=True)
                    part.close()
                    return kept
                self._make_room(NOW)
                fill(part, lambda missing: self._free(missing, NOW))
                self._publish(entry, part)
                part.seek(0)
            except BaseException:
                part.close()
                raise
            return part

    def bring(self, entry: FileEntry, fill: Fill, distance: int) -> Literal["here", "busy", "no room"]:
        """Fetch a file that is used so many samples from now, unless another one is at it, or the limit holds no more than
        what this process and others need before it."""
        with self._told_in_a_line():
            if self.holds(entry):
                return "here"
            part = take_lock(self._partial(entry), wait=False)
            if part is None:
                return "busy"
            with part:
                if not self.holds(entry):
                    if not self._make_room((distance, entry.sha256), entry.bytes):
                        if os.fstat(part.fileno()).st_size == 0:
                            self._partial(entry).unlink(missing_ok=True)
                        return "no room"
                    try:
                        fill(part, lambda missing: self._free(missing, (distance, entry.sha256)))
                    except NoRoom:
                        return "no room"
                    self._publish(entry, part)
                else:
                    self._partial(entry).unlink(missing_ok=True)
                return "here"

    def holds(self, entry: FileEntry) -> bool:
        """Whether a file of the right name and size is here."""
        with self._told_in_a_line():
            try:
                return self._file(entry).stat().st_size == entry.bytes
            except FileNotFoundError:
                return False

    def used_bytes(self) -> int:
        """What the cache takes on the disk when the downloads in flight are done."""
        return sum(size for _, size in self._partials()) + sum(status.st_size for _, status in self._files())

    def room_bytes(self) -> int:
        """What the disk lets the cache hold: what it holds now and what is free."""
        with self._told_in_a_line():
            existing = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
            return self.used_bytes() + shutil.disk_usage(existing).free

    def _file(self, entry: FileEntry) -> Path:
        return self.directory / "files" / entry.sha256

    def _partial(self, entry: FileEntry) -> Path:
        return self.directory / "partial" / f"{entry.sha256}.{entry.bytes}"

    def _open_kept(self, entry: FileEntry) -> FileIO | None:
        try:
            file = FileIO(self._file(entry), "r")
        except FileNotFoundError:
            return None
        if _verifies(file, entry):
            file.seek(0)
            with contextlib.suppress(PermissionError):  # it is another user's, and counts as used when it was fetched
                os.utime(file.fileno())  # what was used last is evicted last among the unclaimed
            return file
        file.close()
        log.warning("%s: altered in the cache; fetching it again", self._file(entry))
        self._file(entry).unlink(missing_ok=True)
        return None

    def _publish(self, entry: FileEntry, part: FileIO) -> None:
        """Name a complete download, which nothing alters by mistake from here on. Its file is whole and verified even where
        somebody has deleted the cache."""
        target = self._file(entry)
        make_directory(target.parent)
        with contextlib.suppress(FileNotFoundError):
            self._partial(entry).rename(target)
        with contextlib.suppress(OSError):  # where files have no such permissions
            os.fchmod(part.fileno(), 0o444)  # after the renaming: whoever resumes a download writes to it
        release(part)

    def _make_room(self, next_use: NextUse, size: int = 0) -> bool:
        """Evict until the cache, with all downloads begun, is within its limit; whether it is.

        A file of `size` bytes that is fetched ahead has room only beside all that is needed before it, here or not:
        whatever is not fetched yet would push it out again.
        """
        with self._deciding():
            claims = self._all_claims()
            sooner = sum(claim.bytes for sha256, claim in claims.items() if (claim.distance, sha256) < next_use)
            if next_use != NOW and sooner + size > self.limit_bytes:
                return False
            excess = self.used_bytes() - self.limit_bytes
            return excess <= 0 or self._remove(self._victims(next_use, claims), excess) >= excess

    def _free(self, wanted: int, next_use: NextUse) -> bool:
        """Evict for the sake of the disk, whatever the limit; whether there was anything to evict."""
        with self._deciding():
            return self._remove(self._victims(next_use, self._all_claims()), wanted) > 0

    def _remove(self, victims: Sequence[_Victim], wanted: int) -> int:
        freed = 0
        for victim in victims:
            if freed >= wanted:
                return freed
            victim.path.unlink(missing_ok=True)
            freed += victim.bytes
        return freed + (self._remove_abandoned() if freed < wanted else 0)

    def _all_claims(self) -> dict[str, Claim]:
        nearest = self._claims.of_others()
        for sha256, claim in self._own.items():
            nearest[sha256] = min(claim, nearest.get(sha256, claim))
        return nearest

    def _victims(self, next_use: NextUse, claims: Mapping[str, Claim]) -> list[_Victim]:
        """The files needed later than `next_use`, the farthest first, and of the unclaimed the longest unused."""
        found = []
        for path, status in self._files():
            claim = claims.get(path.name)
            needed = (math.inf if claim is None else claim.distance, "" if claim is None else path.name)
            found.append(_Victim(needed, status.st_mtime_ns, status.st_size, path))
        found = [victim for victim in found if victim.next_use > next_use]
        found.sort(key=lambda victim: victim.last_used_ns)
        return sorted(found, key=lambda victim: victim.next_use, reverse=True)

    def _remove_abandoned(self) -> int:
        """Remove what dead processes have begun to download; the bytes that were set aside for it."""
        freed = 0
        for path, size in self._partials():
            with contextlib.suppress(FileNotFoundError):
                path.stat()  # taking its lock would make it anew
                part = take_lock(path, wait=False)
                if part is not None:
                    path.unlink(missing_ok=True)
                    part.close()
                    freed += size
        return freed

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in listing(self.directory / "files"):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def _partials(self) -> Iterator[tuple[Path, int]]:
        for path in listing(self.directory / "partial"):
            size = path.name.partition(".")[2]
            if size.isdecimal():
                yield path, int(size)

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        lock = take_lock(self.directory / "lock", wait=True)
        assert lock is not None
        with lock:
            yield

    @contextlib.contextmanager
    def _unless_full(self) -> Iterator[None]:
        """Claims that a full disk does not take are not published: others may evict what this process needs next, and
        it fetches that again."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise

    @contextlib.contextmanager
    def _told_in_a_line(self) -> Iterator[None]:
        try:
            yield
        except NoRoom as error:
            raise NoRoom(
                f"{self.directory}: {error}, and nothing more can be evicted; free some of the disk or set "
                "data.cache_directory"
            ) from error
        except OSError as error:
            if error.errno in FULL:
                raise NoRoom(f"{self.directory}: {error.strerror}; free some or set data.cache_directory") from error
            if error.errno in (*NO_PLACE, *NO_LOCKS, *_TROUBLE):
                raise _described(error, self.directory) from error
            raise


def _described(error: OSError, directory: Path) -> ValueError:
    """A failure of the cache's place in a line, with what to do about it."""
    where = error.filename or directory
    if error.errno in NO_LOCKS:
        return ValueError(f"{where}: cannot be locked ({error.strerror}); set data.cache_directory to a local disk")
    if error.errno in NO_PLACE:
        return ValueError(f"{where}: {error.strerror}; set data.cache_directory")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Unavailable(f"{where}: {error.strerror}; raise the limit of open files (`ulimit -n`)")
    return Unavailable(f"{where}: {error.strerror}; see to the disk, or set data.cache_directory")


def _verifies(file: FileIO, entry: FileEntry) -> bool:
    """Whether every block of a file is as prepared."""
    if os.fstat(file.fileno()).st_size != entry.bytes:
        return False
    for expected in entry.blocks:
        block = bytearray()
        while len(block) < BLOCK_BYTES and (piece := file.read(BLOCK_BYTES - len(block))):
            block += piece
        if xxhash.xxh3_64_hexdigest(block) != expected:
            return False
    return True
