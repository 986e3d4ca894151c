"""Requests to stop, as the supervisor hears them, and those that come before it is there. Its handler only notes which signal
came; the loop acts on it at once, because the same signal wakes it. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Iterator
from types import FrameType

from launch.stopping import STOP_SIGNALS


@contextlib.contextmanager
def answering_stop_signals(*, as_interrupts: bool = False) -> Iterator[None]:
    """A context in which requests to stop, which `launch.cli` holds back, are answered: those that came before, at once.

    as_interrupts: SIGTERM and SIGUSR1 are answered as Ctrl-C is, by KeyboardInterrupt, and not as ever.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1) if as_interrupts else ()
    handlers_before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


class StopSignals:
    """A context in which SIGTERM, SIGUSR1 and Ctrl-C are requests. A selector finds it readable when one has come."""

    def __init__(self) -> None:
        self.asked = False
        """Whether there was any request."""
        self.interrupts = 0
        """How often Ctrl-C was pressed."""
        self._came: list[int] = []
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> StopSignals:
        # The interpreter writes a byte for each signal as it comes, so that nobody sleeps through one.
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._mask_before = signal.pthread_sigmask(
            signal.SIG_UNBLOCK, STOP_SIGNALS
        )  # held back until now, see launch.cli
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        return self._reader

    def take(self) -> bool:
        """Whether requests have come since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        came, self._came = self._came, []
        self.interrupts += came.count(signal.SIGINT)
        self.asked = self.asked or bool(came)
        return bool(came)

    def wait(self, seconds: float) -> None:
        """Sleeps, but not through a request."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.select(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
