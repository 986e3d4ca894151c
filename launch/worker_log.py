"""Every rank's own log file."""

from __future__ import annotations

import logging
from pathlib import Path


def start_logging(run_directory: Path, rank: int) -> None:
    """Sends the `lockstep` logger to `logs/rank-<rank>.log`, appended over attempts."""
    handler = logging.FileHandler(run_directory / "logs" / f"rank-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lockstep")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
