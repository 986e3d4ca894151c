"""Requests to stop: a file in the run directory, or a signal. Both only set a flag; the ranks agree at a step boundary.

Imports no torch, so that a worker can listen before it spends seconds on imports.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 0.5


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._signalled = False
        self._file: Path | None = None
        self._next_poll = 0.0

    def listen(self) -> None:
        """SIGTERM, SIGUSR1 and the first Ctrl-C set the flag; a second Ctrl-C interrupts at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # `lockstep train` starts its workers with these blocked, so that none comes before somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def watch(self, file: Path) -> None:
        """Also stop once `file` exists; looked at no more than twice a second. For rank 0."""
        self._file = file

    def ask(self) -> None:
        """This process asks itself."""
        self._signalled = True

    def asked(self) -> bool:
        if self._file is not None and not self._signalled:
            now = time.monotonic()
            if now >= self._next_poll:
                self._next_poll = now + _POLL_SECONDS
                self._signalled = self._file.exists()
        return self._signalled

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signalled = True
