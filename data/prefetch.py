"""Steps made ready ahead of time in one background thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """What is in chunks, one by one, with `depth_chunks` of them made ready ahead in a thread.

    `chunks()` yields what makes each of them, in turn. `together`: that takes every rank, as long as all of them take the
    same number before `close`.
    """

    def __init__(
        self, chunks: Callable[[], Iterator[Callable[[], Iterable[T]]]], depth_chunks: int, *, together: bool
    ) -> None:
        self._makers, self._depth_chunks, self._together = chunks, depth_chunks, together
        # First in, first out: permits to make one more chunk (True), then at most one request to end (False). Ranks
        # that stop at the same step have given the same permits, so their threads make the same calls to each other.
        self._permits: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._chunks: queue.SimpleQueue[Iterable[T] | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __iter__(self) -> Iterator[T]:
        """Yield what is in the chunks. An exception of the thread is raised here unchanged. To be read once."""
        if self._thread is not None:
            raise ValueError("a Stream is read once; make another one at the position to continue from")
        if self._closed:
            return
        self._thread = threading.Thread(target=self._run, name="lockstep-prefetch", daemon=True)
        for _ in range(self._depth_chunks):
            self._permits.put(True)
        self._thread.start()
        while (chunk := self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            self._permits.put(True)
            yield from chunk

    def close(self) -> None:
        """End the thread. Chunks already permitted are finished first where other ranks may be waiting for them."""
        if self._closed:
            return
        self._closed = True
        self._permits.put(False)
        if self._thread is not None and self._thread is not threading.current_thread():
            # If another rank has died, the thread may wait for it for ever; it is a daemon for that case.
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        try:
            for make in self._makers():
                if not self._permits.get() or (self._closed and not self._together):
                    break
                self._chunks.put(make())
            self._chunks.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._chunks.put(error)
