"""What a person watching a run sees: a bar on a terminal, plain lines elsewhere. Made on rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# A bar that is redrawn more often than this is not easier to read.
_BAR_SECONDS = 0.2
# Weight of the newest interval in the pace from which the time left is told.
_PACE_WEIGHT = 0.3


class Progress:
    """Shows where the run is. `update` costs microseconds until the next output is due.

    mode: auto takes a bar where `stream` is a terminal and plain lines elsewhere; off shows neither, only messages.
    total_steps: the step the run ends at. first_step: the first one of this attempt. item_name: what the loss is
    divided by, "token" or "sample". interval_seconds: the time between two plain lines; the first and the last step
    always get one.
    """

    def __init__(
        self,
        mode: Literal["auto", "bar", "lines", "off"],
        total_steps: int,
        first_step: int,
        item_name: str,
        stream: TextIO | None = None,
        interval_seconds: float = 10.0,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        if mode == "auto":
            mode = "bar" if self._stream.isatty() else "lines"
        self._mode = mode
        self._total_steps = total_steps
        self._item_name = item_name
        self._interval_seconds = _BAR_SECONDS if mode == "bar" else interval_seconds
        self._shown_step = first_step - 1
        self._shown_at = time.perf_counter()
        self._due = 0.0  # the first step is always shown
        self._pace_seconds: float | None = None  # wall seconds a step, smoothed
        self._items = self._step_seconds = self._wait_seconds = 0.0  # summed since the last output
        self._skipped = 0
        self._bar = self._make_bar(first_step) if mode == "bar" else None

    def update(self, record: dict[str, Any]) -> None:
        """Take the record of a committed step, as in `metrics.jsonl`."""
        seconds = record["step_seconds"]
        self._step_seconds += seconds
        self._wait_seconds += record["data_wait_seconds"]
        self._items += record["items_per_second"] * seconds
        self._skipped += record["skipped"]
        now = time.perf_counter()
        if self._mode == "off" or (now < self._due and record["step"] < self._total_steps):
            return
        self._show(record, now)

    def message(self, text: str) -> None:
        """A line of text, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar standing and give the terminal back."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def _show(self, record: dict[str, Any], now: float) -> None:
        step: int = record["step"]
        self._update_pace(step, now)
        text = self._text(record)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text, refresh=True)
        else:
            print(f"step {step}/{self._total_steps}  {text}", file=self._stream, flush=True)
        self._due = now + self._interval_seconds
        self._items = self._step_seconds = self._wait_seconds = 0.0
        self._skipped = 0

    def _update_pace(self, step: int, now: float) -> None:
        if step <= self._shown_step:
            return
        pace = (now - self._shown_at) / (step - self._shown_step)
        if self._pace_seconds is not None:
            self._pace_seconds += _PACE_WEIGHT * (pace - self._pace_seconds)
        elif self._due > 0:  # not from the first step, which holds start-up and compilation
            self._pace_seconds = pace
        self._shown_step, self._shown_at = step, now

    def _text(self, record: dict[str, Any]) -> str:
        parts = [f"loss {_number(record['loss'])}"]
        if self._skipped:
            parts.append(f"{self._skipped} skipped, gradient not finite")
        if self._step_seconds > 0:
            parts.append(f"{_rate(self._items / self._step_seconds)} {self._item_name}s/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if self._step_seconds > 0:
            parts.append(f"data wait {self._wait_seconds / self._step_seconds:.1%}")
        if self._pace_seconds is not None:
            parts.append(f"{_duration(self._pace_seconds * (self._total_steps - record['step']))} left")
        return "  ".join(parts)

    def _make_bar(self, first_step: int) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        # On a narrow terminal the bar gives way first, then the end of the text; the step is always whole.
        step = Column(no_wrap=True, min_width=len(f"step {self._total_steps}/{self._total_steps}"))
        columns = (
            TextColumn("step {task.completed}/{task.total}", style="", table_column=step),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
        )
        # No refresh thread: it would take the interpreter's lock from the step.
        bar = RichProgress(*columns, console=Console(file=self._stream, force_terminal=True), auto_refresh=False)
        bar.add_task("", total=self._total_steps, completed=first_step - 1, text="starting")
        bar.start()
        return bar


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 or not math.isfinite(value) else f"{value:.3e}"
    return "none" if value is None else str(value)


def _rate(per_second: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= size:
            return f"{per_second / size:.3g}{letter}"
    return f"{per_second:.3g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s"
