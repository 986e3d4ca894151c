"""Every rank's own log file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


class _RankLog(logging.FileHandler):
    """A log that cannot be written, on a full disk for one, is told about once and in one line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            text = f"lockstep: warning: {self.baseFilename}: cannot be written ({error.strerror})"
            print(text, file=sys.stderr, flush=True)


def start_logging(run_directory: Path, rank: int) -> None:
    """Sends the `lockstep` logger to `logs/rank-<rank>.log`, appended over attempts, and rank 0's warnings to stderr too."""
    handler = _RankLog(run_directory / "logs" / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lockstep")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    if rank == 0:
        speaker = logging.StreamHandler(sys.stderr)
        speaker.setLevel(logging.WARNING)
        speaker.addFilter(lambda record: record.levelno == logging.WARNING)  # how a run ended is told by the worker
        speaker.setFormatter(logging.Formatter("lockstep: warning: %(message)s"))
        logger.addHandler(speaker)
