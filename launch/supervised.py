"""What a worker of `lockstep train` owes to its supervisor: word of where it is, its stacks when asked, and to end with it.

Under torchrun and the others there is no such supervisor, and `supervised_by` returns None. Imports no torch.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import traceback
from pathlib import Path

from distrib.phases import observe
from launch.heartbeats import Heartbeat

SUPERVISOR = "LOCKSTEP_SUPERVISOR"
"""What a worker has from its supervisor: `PID BOARD STACKS RESTARTS`, the second and third of them file descriptors."""
STACKS_SIGNAL = signal.SIGUSR2
"""Asks a worker for the stacks of all its threads. faulthandler answers in C, also while a thread holds the GIL."""

_PR_SET_PDEATHSIG = 1


class Supervised:
    """The bond of this process with its supervisor."""

    def __init__(self, heartbeat: Heartbeat, stacks: int, restarts: int) -> None:
        self._heartbeat, self._stacks = heartbeat, stacks
        self.restarts = restarts
        """How many attempts the same supervisor has made before."""

    def name_run(self, directory: Path) -> None:
        """Tells the supervisor where the run is kept; for rank 0."""
        self._heartbeat.name_run(directory)

    def say_done(self) -> None:
        """Tells the supervisor that this worker has come to its end as it should: an exit code alone could be anybody's."""
        self._heartbeat.say_last("came to its end")

    def say_lost(self, error: BaseException, *, waited: bool) -> None:
        """Tells the supervisor that this worker ends because another is gone or, `waited`, because it did not come; and where
        that was, as faulthandler would."""
        calls = reversed(traceback.extract_tb(error.__traceback__))
        lines = [f'  File "{call.filename}", line {call.lineno} in {call.name}\n' for call in calls]
        os.write(self._stacks, "".join(["Lost contact here (most recent call first):\n", *lines]).encode())
        self._heartbeat.say_last("waited in vain" if waited else "lost contact")


def supervised_by() -> Supervised | None:
    """Begins what is owed; once, as early as can be. The variable is not inherited by this process's own children."""
    given = os.environ.pop(SUPERVISOR, None)
    if given is None:
        return None
    supervisor, board, stacks, restarts = map(int, given.split())
    _end_with(supervisor)
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACKS_SIGNAL])  # blocked by the supervisor until somebody answers
    heartbeat = Heartbeat(board, int(os.environ["RANK"]))
    observe(heartbeat)
    return Supervised(heartbeat, stacks, restarts)


def _end_with(supervisor: int) -> None:
    """From now on the kernel kills this process when its supervisor is gone, however it went; also one that is stopped, or
    has a thread that keeps the interpreter to itself."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != supervisor:  # it went before
        os._exit(1)
