"""A real HTTP server on loopback that serves a directory and fails in the ways that servers and networks fail."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

FaultKind = Literal["status", "reset", "stall", "truncate", "flip", "longer", "slow"]
# A slow answer takes a second and a half: longer than the timeouts of the tests, though each piece comes in time.
SLOW_PIECES, SLOW_PAUSE_SECONDS = 30, 0.05


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one response: a status, or something after (at) byte `at` of the body."""

    kind: FaultKind
    at: int = 0
    status: int = 500


@dataclass
class FaultyServer:
    """`faults[name]` are used up one by one by GETs of that file; `always[name]` is not used up. The directory itself
    is shown as a page of links where it `lists`."""

    directory: Path
    ranges: bool = True
    lists: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    always: dict[str, Fault] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    sleepers: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: str = ""

    def next_fault(self, name: str) -> Fault | None:
        with self.lock:
            self.requests[name] += 1
            return self.faults[name].pop(0) if self.faults[name] else self.always.get(name)


def altered(content: bytes, fault: Fault | None) -> bytes:
    """The content that an answer with this fault holds."""
    body = bytearray(content)
    if fault is not None and fault.kind == "flip":
        body[fault.at] ^= 1
    if fault is not None and fault.kind == "truncate":
        del body[fault.at :]
    if fault is not None and fault.kind == "longer":
        body += b"more"
    return bytes(body)


class FaultyHandler(BaseHTTPRequestHandler):
    """Answers a request with the next fault of the file that it is for."""

    protocol_version = "HTTP/1.1"
    state: FaultyServer

    @property
    def file_name(self) -> str:
        return unquote(self.path).lstrip("/")

    def do_GET(self) -> None:
        name = self.file_name
        fault = self.state.next_fault(name)
        try:
            content = self._page() if not name and self.state.lists else (self.state.directory / name).read_bytes()
        except OSError:
            return self.refuse(404)
        if fault is not None and fault.kind == "status":
            return self.refuse(fault.status)
        start = self._range_start()
        if start >= len(content) > 0:
            return self.refuse(416)
        whole = altered(content, fault)
        self.answer(206 if start else 200, {}, whole[start:], fault, start)
        return None

    def answer(self, status: int, headers: dict[str, str], part: bytes, fault: Fault | None, start: int = 0) -> None:
        """Send what begins at byte `start` of a file, as far as the fault lets it."""
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(header, value)
        self.end_headers()
        kind = None if fault is None else fault.kind
        broken = fault if kind in ("reset", "stall") else None
        part = part[: max(0, broken.at - start)] if broken is not None else part
        pieces = SLOW_PIECES if kind == "slow" else 1
        size = -(-len(part) // pieces) or 1
        for first in range(0, len(part), size):
            self.wfile.write(part[first : first + size])
            self.wfile.flush()
            if kind == "slow":
                self.state.sleepers.wait(SLOW_PAUSE_SECONDS)
        self.state.sent[self.file_name] += len(part)
        if broken is not None:
            self._break_off(broken)

    def _page(self) -> bytes:
        links = ["?C=N;O=D", "/", *sorted(os.listdir(self.state.directory))]
        return "\n".join(f'<a href="{quote(link, safe="?=;/")}">{link}</a>' for link in links).encode()

    def _break_off(self, fault: Fault) -> None:
        self.wfile.flush()
        if fault.kind == "stall":
            self.state.sleepers.wait(60)
        else:  # a reset, not an end: lingering for no time makes the kernel send one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _range_start(self) -> int:
        header = self.headers.get("Range", "")
        return int(header.removeprefix("bytes=").partition("-")[0]) if header and self.state.ranges else 0

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing: what was asked for is in `requests`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Nothing: broken connections are what this server is for."""


@contextlib.contextmanager
def serving(directory: Path, *, ranges: bool = True, lists: bool = False) -> Iterator[FaultyServer]:
    """Serve a directory until the end of the block."""
    with answering(FaultyServer(directory, ranges, lists), FaultyHandler) as state:
        yield state


@contextlib.contextmanager
def answering(state: FaultyServer, handler: type[FaultyHandler], **members: object) -> Iterator[FaultyServer]:
    """Run a server on loopback until the end of the block; `members` are the handler's."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    server = _Server(("127.0.0.1", 0), type("Handler", (handler,), {"state": state, **members}))
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.sleepers.set()
        server.shutdown()
        server.server_close()
        thread.join()
