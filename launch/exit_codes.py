"""How a run ends, for job scripts and supervisors (the same codes under every launcher that passes them on)."""

from __future__ import annotations

DONE = 0
FAILED = 1
USAGE = 2
STOPPED_EARLY = 75
"""Everything is saved: start me again."""
DO_NOT_RESTART = 78
"""Starting again as is would end the same way."""


class RunEnded(Exception):
    """A run that ends before its last step for a reason a user can act on, in one line, with its exit code."""

    def __init__(self, message: str, exit_code: int, *, told_by_all: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.told_by_all = told_by_all
        """Whether every rank ends with this same reason, so that one of them is enough to tell it."""
