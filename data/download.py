"""One file's download: resumed where it broke off, tried again with growing pauses, and verified by its sha256."""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from typing import Protocol

from data.errors import CorruptData, NoRoom, Unavailable
from data.manifest import RESTORE, FileEntry

log = logging.getLogger("lockstep")

# No room on the disk, over the quota, over the process's limit of file size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A whole file of the wrong content is fetched so many times before it is the stored one that is wrong.
MOST_MISMATCHES = 3
PIECE_BYTES = 1 << 20

MakeRoom = Callable[[int], bool]
"""Frees some of so many bytes on a full disk; False where it can free nothing."""


class Source(Protocol):
    """A remote file."""

    @property
    def address(self) -> str: ...

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        """Its content from `start` on, or from 0 where it cannot start there: where it begins, and its pieces.

        FileNotFoundError if there is none, PermissionError where it is denied; any other exception may pass.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How often a download that makes no progress is tried again, after pauses that double from the first one on."""

    retries: int = 8
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** min(failures - 1, 32))


class Tries:
    """How often one address has failed in a row: tells of its first failure, and waits before it is tried again."""

    def __init__(self, address: str, patience: Patience) -> None:
        self._address, self._patience = address, patience
        self._failures, self._told = 0, False

    def again(self, error: BaseException | None) -> bool:
        """After a failure: whether it is tried again, once a pause is over. None: what came broke off."""
        self._failures += 1
        if self._failures > self._patience.retries or (error is not None and is_denied(error)):
            return False
        if not self._told:
            seconds = sum(map(self._patience.pause, range(1, self._patience.retries + 1)))
            reason = "it breaks off" if error is None else _reason(error)
            log.warning(
                "%s: cannot be read now (%s); trying again for up to %.0f s", self._address, reason, seconds + 0.5
            )
            self._told = True
        time.sleep(self._patience.pause(self._failures))
        return True

    def went_on(self) -> None:
        """Something came since the last failure."""
        self._failures = 0


class Partial:
    """A file that grows from its beginning, and the hash of what it holds. What an earlier process left in it counts."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.size = 0
        self._sha256 = hashlib.sha256()
        file.seek(0)
        while piece := file.read(PIECE_BYTES):
            self._sha256.update(piece)
            self.size += len(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def append(self, piece: bytes, make_room: MakeRoom, missing: int) -> None:
        """Write a piece; NoRoom where the disk is full and stays full. `missing`: bytes still to come."""
        view = memoryview(piece)
        while view:
            try:
                written = self.file.write(view)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not make_room(missing):
                    raise NoRoom(os.strerror(error.errno)) from error
                continue
            self._sha256.update(view[:written])
            self.size += written
            view = view[written:]

    def restart(self) -> None:
        """Begin again with nothing."""
        self.file.truncate(0)
        self.file.seek(0)
        self._sha256 = hashlib.sha256()
        self.size = 0


def download(source: Source, entry: FileEntry, file: FileIO, patience: Patience, make_room: MakeRoom) -> None:
    """Fill `file`, open for appending, with the content that `entry` promises.

    CorruptData naming the remote address where that is missing, too short or another one every time; Unavailable where
    the server does not answer; NoRoom; OSError of the local file.
    """
    part = Partial(file)
    if part.size > entry.bytes:
        part.restart()
    tries, mismatches, furthest = Tries(source.address, patience), 0, part.size
    while True:
        problem = _continue(source, entry, part, make_room) if part.size < entry.bytes else None
        if problem is None:
            if part.size == entry.bytes and part.sha256 == entry.sha256:
                return
            mismatches += 1
            if mismatches == MOST_MISMATCHES:
                raise CorruptData(
                    f"{source.address}: fetched {MOST_MISMATCHES} times, and never what the manifest lists "
                    f"(sha256 {entry.sha256[:12]}); {RESTORE}"
                )
            log.warning("%s: not what the manifest lists; fetching it again", source.address)
            part.restart()
            continue
        if part.size > furthest:  # it goes on, if slowly
            tries.went_on()
            furthest = part.size
        if not tries.again(problem.__cause__):
            raise problem


def _continue(source: Source, entry: FileEntry, part: Partial, make_room: MakeRoom) -> ValueError | None:
    """Read on from where the file ends. None where its end was reached or it cannot be the file (then it is longer than
    that), otherwise what went wrong."""
    pieces: Iterator[bytes] | None = None
    while part.size < entry.bytes:
        try:
            if pieces is None:
                start, pieces = source.read_from(part.size)
                if start != part.size:
                    part.restart()
            piece = next(pieces, b"")
        except Exception as error:  # implementations raise their own types
            if _is_mismatch(error):
                part.size = entry.bytes + 1
                return None
            return describe_failure(source.address, error)
        if not piece:
            short = entry.bytes - part.size
            return CorruptData(f"{source.address}: {short} bytes short of the manifest's {entry.bytes}; {RESTORE}")
        if part.size + len(piece) > entry.bytes:
            part.size = entry.bytes + 1  # longer than listed: not the file
            return None
        part.append(piece, make_room, entry.bytes - part.size)
    return None


def _is_mismatch(error: BaseException) -> bool:
    """Whether a client found that what came is not what its server has a checksum of."""
    return type(error).__name__ == "FlexibleChecksumError"  # botocore's, which need not be installed


def _is_timeout(error: BaseException | None) -> bool:
    """Whether time ran out, by what an error says of itself or of what led to it: some clients fail at telling it."""
    while error is not None:
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


def is_denied(error: BaseException) -> bool:
    """Whether a server said that what was asked for is not for us: asking again makes no difference."""
    response = getattr(error, "response", None)
    statuses = (getattr(error, "status", None), getattr(response, "status_code", None))
    return isinstance(error, PermissionError) or any(status in (401, 403) for status in statuses)


def _reason(error: BaseException) -> str:
    if _is_timeout(error):
        return "nothing, or too little, within data.download_timeout_seconds"
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def describe_failure(address: str, error: Exception) -> ValueError:
    """What a failure to read from an address means, in a line; the failure is its cause."""
    found: ValueError
    if isinstance(error, FileNotFoundError):
        found = CorruptData(f"{address}: listed in the manifest but missing; {RESTORE}")
    elif is_denied(error):
        how = " (for this protocol in ~/.netrc)" if address.startswith(("http://", "https://")) else ""
        found = Unavailable(f"{address}: access is denied ({_reason(error)}); give credentials in the environment{how}")
    elif _is_mismatch(error):
        found = CorruptData(f"{address}: not what its server has a checksum of; {RESTORE}")
    else:
        found = Unavailable(f"{address}: cannot be read ({_reason(error)}); is the server there?")
    found.__cause__ = error
    return found
