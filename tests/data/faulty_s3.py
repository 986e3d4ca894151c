"""A proxy on loopback before an S3-compatible server (moto's): requests pass, and GETs of objects fail as they are told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.data.faulty_server import FaultyHandler, FaultyServer, altered, answering

HOP_BY_HOP = ("connection", "content-length", "date", "server", "transfer-encoding")


class _S3Handler(FaultyHandler):
    upstream: tuple[str, int]

    @property
    def file_name(self) -> str:
        """The last part of an object's key."""
        return unquote(urlsplit(self.path).path).rsplit("/", 1)[-1]

    def do_GET(self) -> None:
        fault = self.state.next_fault(self.file_name)
        if fault is not None and fault.kind == "status":
            self.refuse(fault.status)
            return
        status, headers, content = self._ask_upstream()
        self.answer(status, headers, altered(content, fault), fault)

    def _pass_on(self) -> None:
        status, headers, content = self._ask_upstream()
        self.answer(status, headers, content, None)

    do_PUT = do_POST = do_DELETE = _pass_on

    def do_HEAD(self) -> None:
        status, headers, _ = self._ask_upstream(("connection", "date", "server", "transfer-encoding"))
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()

    def _ask_upstream(self, dropped: tuple[str, ...] = HOP_BY_HOP) -> tuple[int, dict[str, str], bytes]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = HTTPConnection(*self.upstream)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
            return response.status, headers, response.read()
        finally:
            connection.close()


@contextlib.contextmanager
def serving_s3() -> Iterator[FaultyServer]:
    """An S3-compatible server until the end of the block; the faults are by the last part of an object's key."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with answering(FaultyServer(Path()), _S3Handler, upstream=server.get_host_and_port()) as state:
            yield state
    finally:
        server.stop()
