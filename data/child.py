"""Python processes of their own that work for this one, and pass objects over pipes.

None outlives the process that started it, however that one ended: it ends when its pipe does. And no kill leaves anything
behind: pipes have no names, which the semaphores of the standard library's pools have.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from data.errors import CorruptData, NoRoom, Unavailable

# One thread each: of the tokenizers' library, of Arrow and of NumPy's algebra.
ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

Reply = tuple[str, Any]
"""`("result", what a job came to)`, `("error", the exception that it raised)` or `("report", what it told meanwhile)`."""


class ChildEnded(Exception):
    """A child is gone: how it ended."""


class Child:
    """Such a process as its parent sees it: it carries out jobs by `make(setting)`, one after the other."""

    def __init__(self, make: Callable[[Any], Callable[[Any], Any]], setting: Any) -> None:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        # -P: a folder `data` where somebody stands must not shadow ours. A session of its own: Ctrl-C reaches the parent
        # alone, whose pipe then ends.
        with _blocked(
            signal.SIGTERM, signal.SIGUSR1
        ):  # inherited: what a cluster sends to all is for the parent to answer
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from data.child import serve; serve()"],
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdin as asks, self._process.stdout as tells:
            self._jobs = Connection(os.dup(asks.fileno()), readable=False)
            self.replies = Connection(os.dup(tells.fileno()), writable=False)
        self.ask((make, setting))

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: Any) -> None:
        """Hand it a job; it may have others to do before. Where it is gone, `hear` says so."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.send(job)

    def hear(self) -> Reply:
        """Its next reply, waited for; of `result` and `error`, one for each job. ChildEnded where there is none."""
        try:
            kind, value = self.replies.recv()
        except (EOFError, OSError):  # an OSError: it ended in the middle of a reply
            code = self._process.wait()
            raise ChildEnded(
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            ) from None
        return kind, _raised(value) if kind == "error" else value

    def end(self) -> None:
        """Whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._jobs.close()
        self.replies.close()


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def started(make: Callable[[Any], Callable[[Any], Any]], setting: Any, count: int) -> Iterator[list[Child]]:
    """So many children, which end with the block."""
    children: list[Child] = []
    try:
        for _ in range(count):
            children.append(Child(make, setting))
        yield children
    finally:
        for child in children:
            child.end()


def ready(children: Sequence[Child]) -> list[Child]:
    """Those that have replied or ended, waited for."""
    heard = wait([child.replies for child in children])
    return [child for child in children if child.replies in heard]


_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ValueError, CorruptData, Unavailable, NoRoom)}


def _raised(error: dict[str, Any]) -> Exception:
    if error["kind"] == "OSError":
        return OSError(error["number"], error["text"], error["filename"])
    return _KINDS.get(error["kind"], RuntimeError)(error["text"])


def _told(error: Exception) -> dict[str, Any]:
    """An exception as it is passed on: those that tell a user something by themselves, all others with their traces."""
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        return {"kind": "OSError", "number": error.errno, "text": error.strerror, "filename": name and str(name)}
    if isinstance(error, ValueError):
        kind = next((name for name, kind in _KINDS.items() if type(error) is kind), "ValueError")
        return {"kind": kind, "text": str(error)}
    return {"kind": "other", "text": "".join(traceback.format_exception(error))}


_replies: Connection
"""To the parent; only in a child."""


def report(*values: Any) -> None:
    """Tell the parent something of the job that is being done."""
    _reply(("report", values))


def _reply(reply: Reply) -> None:
    try:
        _replies.send(reply)
    except BrokenPipeError:
        os._exit(0)  # whoever asked is gone, and `listen` has not noticed yet


def serve() -> None:
    """A child's life: jobs come by standard input, replies leave by standard output, which nothing else may use."""
    global _replies
    _replies = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        jobs = Connection(0, writable=False)
        with contextlib.suppress(EOFError, OSError):
            while True:
                asked.put(jobs.recv_bytes())
        os._exit(0)  # whoever asked is gone, and with it the need for what is being done

    threading.Thread(target=listen, daemon=True).start()
    perform: Callable[[Any], Any] | None = None
    while True:
        content = asked.get()
        try:
            job = ForkingPickler.loads(content)
            if perform is None:
                make, setting = job
                perform = make(setting)
            else:
                _reply(("result", perform(job)))
        except Exception as error:
            _reply(("error", _told(error)))
            if perform is None:
                return
