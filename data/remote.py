"""A dataset at any address that fsspec reads: whole files through a cache on the local disk, fetched ahead along the plan."""

import errno
import importlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any
from urllib.parse import quote, unquote

from data.cache import ShardCache
from data.download import MakeRoom, Patience, Tries, describe_failure, download
from data.errors import CorruptData
from data.manifest import MANIFEST_NAME, FileEntry
from data.needs import Needs

log = logging.getLogger("lockstep")

# Of one request to a store that is read by ranges.
REQUEST_BYTES = 8 << 20
# A manifest of a petabyte in shards of 64 MiB is about as large.
MOST_READ_BYTES = 1 << 32
# A server that sends less than this within a timeout is taken for stalled.
SLOWEST_BYTES_PER_SECOND = 1024
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Positions are reached thousands of times a second; what follows from that is done this often.
LOOK_SECONDS = 0.1


# What is raised of a file that some implementations open on this machine, and which no waiting helps.
_NO_CONNECTION = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Remote:
    """A directory at an fsspec address. The connection is made when it is first used."""

    def __init__(self, address: str, timeout_seconds: float, patience: Patience) -> None:
        self.address = address
        self.protocol = address.partition("://")[0]
        self.timeout_seconds = timeout_seconds
        self._patience = patience
        self._connected: tuple[Any, str] | None = None
        self._lock = threading.Lock()

    def connect(self) -> tuple[Any, str]:
        """The file system and the directory's path in it. ValueError where the protocol's package is missing or the address
        is none for it, Unavailable where its server does not answer."""
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def _connect(self) -> tuple[Any, str]:
        import fsspec

        tries = Tries(self.address, self._patience)
        while True:
            try:
                found: tuple[Any, str] = fsspec.core.url_to_fs(
                    self.address, skip_instance_cache=True, **self._options()
                )
                return found
            except ImportError as error:
                extra = EXTRAS.get(self.protocol)
                what = f"'lockstep[{extra}]'" if extra else f"what fsspec needs for {self.protocol}"
                raise ValueError(f"{self.address}: {_in_a_line(error)}; pip install {what}") from None
            except ValueError as error:
                raise ValueError(f"{self.address}: {_in_a_line(error)}") from None
            except Exception as error:  # implementations raise their own types
                if not isinstance(error, OSError) or isinstance(error, _NO_CONNECTION):
                    raise ValueError(
                        f"{self.address}: cannot be used as an address ({type(error).__name__}: {_in_a_line(error)}); give "
                        "a directory at https://, s3://, gs://, hf:// or whatever needs no more than an address"
                    ) from error
                if not tries.again(error):
                    raise describe_failure(self.address, error) from error

    def _options(self) -> dict[str, Any]:
        """What makes a request that gets no answer fail in time; everything else comes from the environment."""
        seconds = self.timeout_seconds
        if self.protocol in ("http", "https"):
            aiohttp = importlib.import_module("aiohttp")
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        if self.protocol in ("s3", "s3a"):
            return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
        if self.protocol in ("gs", "gcs"):
            return {"requests_timeout": seconds}
        return {}

    def read(self, name: str) -> bytes | None:
        """The whole of a small file; None if there is none. ValueError where it cannot be read."""
        tries = Tries(f"{self.address}/{name}", self._patience)
        while True:
            content = bytearray()
            try:
                for piece in RemoteFile(self, name).read_from(0)[1]:
                    content += piece
                    if len(content) > MOST_READ_BYTES:
                        raise CorruptData(f"{self.address}/{name}: more than {MOST_READ_BYTES} bytes; not a manifest")
                return bytes(content)
            except FileNotFoundError:
                return None
            except CorruptData:
                raise
            except Exception as error:  # implementations raise their own types
                if not tries.again(error):
                    raise describe_failure(f"{self.address}/{name}", error) from error

    def fetch(self, entry: FileEntry, file: FileIO, make_room: MakeRoom) -> None:
        """`data.download.download` of a listed file."""
        download(RemoteFile(self, entry.name), entry, file, self._patience, make_room)

    def names(self) -> list[str] | None:
        """What lies in the directory, sorted; None where nobody says it: the protocol or the server does not list."""
        filesystem, root = self.connect()
        tries = Tries(self.address, self._patience)
        while True:
            filesystem.invalidate_cache()
            try:
                found = filesystem.ls(root, detail=False)
                break
            except Exception as error:  # implementations raise their own types
                if _is_final(error) or not tries.again(error):
                    return None
        if self.protocol in ("http", "https"):  # the links of a page: also those that sort it, or lead elsewhere
            links = {path.removeprefix(f"{root}/").rstrip("/") for path in found}
            names = {unquote(link) for link in links if link and not set(link) & set("?#/")}
        else:
            names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
        # What does not show the manifest, which is there, is some page and no listing.
        return sorted(names) if MANIFEST_NAME in names else None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_final(error: Exception) -> bool:
    """Whether a request failed for a reason that stays: what was asked for is not there, or not for us."""
    kinds = FileNotFoundError | PermissionError | NotImplementedError
    return isinstance(error, kinds) or 400 <= getattr(error, "status", 0) < 500


@dataclass(frozen=True)
class RemoteFile:
    """One file at an address; a `Source` of `data.download`."""

    remote: Remote
    name: str

    @property
    def address(self) -> str:
        return f"{self.remote.address}/{self.name}"

    def read_from(self, start: int) -> tuple[int, Iterator[bytes]]:
        """Its content from `start` on, or from 0 where the server does not serve parts of a file."""
        filesystem, root = self.remote.connect()
        filesystem.invalidate_cache()  # a listing of before may lack what has appeared since
        if self.remote.protocol in ("http", "https"):
            # One request, streamed; a block size of 0 asks for that, and a size spares a request for it.
            headers = {"Range": f"bytes={start}-"} if start else {}
            file = filesystem.open(f"{root}/{quote(self.name)}", block_size=0, size=1, headers=headers)
            begins = start if file.r.status == 206 else 0
        else:
            file = filesystem.open(f"{root}/{self.name}", "rb", block_size=REQUEST_BYTES, cache_type="none")
            file.seek(start)
            begins = start
        return begins, self._pieces(file)

    def _pieces(self, file: Any) -> Iterator[bytes]:
        seconds = self.remote.timeout_seconds
        begun, received = time.monotonic(), 0
        with file:
            while piece := file.read(REQUEST_BYTES):
                yield piece
                received += len(piece)
                now = time.monotonic()
                if now - begun > seconds:
                    if received < SLOWEST_BYTES_PER_SECOND * seconds:
                        raise TimeoutError(errno.ETIMEDOUT, f"{received} bytes in {now - begun:.0f} seconds")
                    begun, received = now, 0


class RemoteStore:
    """A prepared dataset that was copied to an address. Nothing is asked about a listed file before it is fetched."""

    opens_copies = True

    def __init__(
        self, address: str, cache: ShardCache, *, patience: Patience, timeout_seconds: float, download_threads: int
    ) -> None:
        self.address = address
        self.cache = cache
        self.looks_ahead_bytes = cache.limit_bytes
        self._remote = Remote(address, timeout_seconds, patience)
        self._remote.connect()
        self._needs = Needs()
        # Held for the bookkeeping below, never while anything is read or downloaded.
        self._lock = threading.Lock()
        self._position = 0
        self._looked_at = -math.inf
        self._most_threads = download_threads
        self._threads = 0
        # By their sha256: what a thread has taken, could not fetch, or found another process fetching.
        self._passed_over: set[str] = set()

    def read(self, name: str) -> bytes | None:
        return self._remote.read(name)

    def names(self) -> list[str] | None:
        return self._remote.names()

    def check(self, entry: FileEntry) -> None:
        if entry.bytes > self.cache.limit_bytes:
            raise ValueError(
                f"{self.address}/{entry.name}: {entry.bytes} bytes do not fit data.cache_bytes "
                f"{self.cache.limit_bytes}; raise that"
            )

    def open(self, entry: FileEntry) -> FileIO:
        return self.cache.open(entry, self._fill(entry))

    def expect(self, start: int, stop: int, entries: Sequence[FileEntry]) -> None:
        with self._lock:
            self._needs.expect(start, stop, entries)
        self._go_on()

    def reached(self, position: int) -> None:
        self._position = position
        self._go_on()

    def expects(self, entry: FileEntry) -> bool:
        with self._lock:
            return entry in self._needs

    def _fill(self, entry: FileEntry) -> Callable[[FileIO, MakeRoom], None]:
        return lambda file, make_room: self._remote.fetch(entry, file, make_room)

    def _go_on(self) -> None:
        """Now and then: forget what is past, and start a thread if there is something to fetch ahead."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at < LOOK_SECONDS:
                return
            self._looked_at = now
            self._needs.reached(self._position)
            self._passed_over.clear()
            self.cache.claim(self._needs.claims())
            wanted = self._most_threads - self._threads if self._next() is not None else 0
            self._threads += wanted
        for _ in range(wanted):
            threading.Thread(target=self._fetch_ahead, name="lockstep-download", daemon=True).start()

    def _next(self) -> tuple[FileEntry, int] | None:
        """The file needed soonest that is not here and that no thread of this process has taken."""
        for entry, distance in self._needs.in_order():
            if entry.sha256 not in self._passed_over and not self.cache.holds(entry):
                return entry, distance
        return None

    def _fetch_ahead(self) -> None:
        """A thread's work, which ends when there is nothing more to fetch or no room for it."""
        try:
            while True:
                with self._lock:
                    found = self._next()
                    if found is None:
                        return
                    entry, distance = found
                    self._passed_over.add(entry.sha256)
                    self.cache.claim(self._needs.claims())  # or it might be evicted as soon as it is here
                if self.cache.bring(entry, self._fill(entry), distance) == "no room":
                    return
        except ValueError as error:  # left to whoever needs it, who tries again and then tells
            log.warning("not fetched ahead: %s", error)
        finally:
            with self._lock:
                self._threads -= 1
