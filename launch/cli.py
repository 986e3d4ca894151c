"""The `lockstep` command, as its processes begin. Imports next to nothing before requests to stop are held back: one that comes
while all the rest is imported waits until somebody can answer it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from launch.exit_codes import STOPPED_EARLY

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # launch.stopping has them, and imports more than that


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        try:
            from launch.commands import run_command

            return run_command(argv)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except KeyboardInterrupt:
        print("lockstep: interrupted; what was finished is intact", file=sys.stderr)
        return STOPPED_EARLY


if __name__ == "__main__":
    sys.exit(main())
