"""A process that has imported what our commands import, and becomes one of them by forking; and so do the workers that a
`lockstep train` of it starts. What is left out is the start of each interpreter and its imports, nothing else: each is
a process of its own, a child of whom it would be, in a session, with an environment and files of its own.

Requests come as lines of JSON on stdin; the answers to each are its process id and, when it has ended, its exit code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from tests.end_to_end.warm_process import MODULES, become

_WORKER = ["-m", "launch.train"]


class ForkingPopen(subprocess.Popen[Any]):
    """Starts workers by forking, everything else as ever."""

    def _execute_child(self, *arguments: Any) -> None:
        plain = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(plain).bind(*arguments).arguments
        command = [str(part) for part in asked["args"]]
        if command[1:3] != _WORKER:
            plain(*arguments)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become_worker(command, asked)
        self.pid = pid
        self._child_created = True
        pipes = [asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _become_worker(command: list[str], asked: dict[str, Any]) -> NoReturn:
    """What happens between a fork and the first line of `launch.train`."""
    if asked["start_new_session"]:
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((0, "p2cread"), (1, "c2pwrite"), (2, "errwrite")):
        if asked[name] != -1:
            os.dup2(asked[name], descriptor)
    kept = {0, 1, 2, *asked["pass_fds"]}
    for descriptor in sorted(int(path.name) for path in Path("/proc/self/fd").iterdir()):
        if descriptor not in kept:
            try:
                os.close(descriptor)
            except OSError:  # the one that listed them
                continue
    for descriptor in asked["pass_fds"]:
        os.set_inheritable(descriptor, True)
    code: Any = 1
    try:
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv = ["launch.train", *command[3:]]
        from injector import inject_into_this_worker

        inject_into_this_worker()
        code = sys.modules["launch.train"].main(command[3:])
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    for thread in threading.enumerate():  # as an interpreter does at its end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    # What the first request would otherwise import for itself alone.
    importlib.import_module("launch.supervisor")
    importlib.import_module("launch.preparing")
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            subprocess.Popen = ForkingPopen  # type: ignore[misc]
            become(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
