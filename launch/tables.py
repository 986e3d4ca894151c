"""Tables and bars of commands that answer a person. Imports nothing heavy unless a bar is shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one their names, in columns two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class Bar:
    """How far some work has come, on a terminal; silent elsewhere."""

    def __init__(self, what: str, total: int, *, of_bytes: bool = False) -> None:
        self._bar: Any = None
        if not sys.stderr.isatty() or total == 0:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        pace = TransferSpeedColumn() if of_bytes else TextColumn("{task.completed:,.0f} of {task.total:,.0f}")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            pace,
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line on stdout, above the bar where there is one."""
        if self._bar is not None:
            self._bar.stop()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.start()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)
