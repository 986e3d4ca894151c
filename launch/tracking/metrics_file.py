"""`metrics.jsonl`: one JSON object a line, appended as steps commit; the truth of what a run measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
_BLOCK_BYTES = 65536
_MOST_STEPS = 1 << 62
STALL_KEY = "checkpoint_stall_seconds"
"""In a line of its own for every save: how long training waited for it, and for the one before to be written."""
END_KEY = "ended"
"""In the last line of an attempt that could say so itself."""


class MetricsFile:
    """Appends records to `<run>/metrics.jsonl`; each line has reached the operating system when `append` returns.

    JSON has no NaN and no infinity: such numbers are written as null. A step with a non-finite gradient is known by its
    `skipped`, and a null loss that was not skipped is a loss that was not finite.

    Raises ValueError, naming the path, where the file cannot be opened or written: without it a run has no record.
    """

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / FILE_NAME
        try:
            _mend_torn_end(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be opened for writing ({error.strerror}); choose a writable run.directory"
            ) from error

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. A line cut short by a full disk is mended when the file is next opened."""
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(record), allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); free some space and resume the run"
            ) from error

    def close(self) -> None:
        self._file.close()


def read_metrics(run_directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step records and the evaluation records of a run, each sorted by step.

    A resumed run repeats the steps after its checkpoint: the last line of a step counts. A last line that is not whole
    was torn by a crash and is dropped; any other broken line raises ValueError with its number. A run that has not
    written a line yet has two empty lists.
    """
    lines = _last_lines(run_directory)
    return lines["step"], lines["evaluation"]


def read_checkpoint_stalls(run_directory: Path) -> list[dict[str, Any]]:
    """The records of how long training waited for each save, sorted by step; read as `read_metrics` reads."""
    return _last_lines(run_directory)["stall"]


def read_step_lines(run_directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record of a step with the number of its line, in the order of the file: also those that were repeated later.

    A torn last line is dropped; any other broken line raises ValueError with its number.
    """
    return ((number, record) for number, kind, record in _lines(run_directory) if kind == "step")


def read_last_step(run_directory: Path) -> dict[str, Any] | None:
    """The record of the step that was written last, found from the end of the file; None where there is none yet."""
    path = run_directory / FILE_NAME
    if not path.exists():
        return None
    with path.open("rb") as file:
        end, tail = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            # What stands before the first end of a line may be the rest of one: it comes again with the block before.
            tail, end = file.read(end - start) + tail, start
            head, newline, lines = tail.partition(b"\n") if start else (b"", b"\n", tail)
            for line in reversed(lines.splitlines()):
                record = _parse(line)
                if record is not None and _kind(record) == "step":
                    return record
            tail = head + newline if newline else tail
    return None


def read_all_lines(run_directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record of any kind with the number of its line, in the order of the file; read as `read_step_lines` reads."""
    return ((number, record) for number, _, record in _lines(run_directory))


def _last_lines(run_directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each kind of record (step, evaluation, stall, end) the last line of every step, sorted by step."""
    kinds: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}, "stall": {}, "end": {}}
    for _, kind, record in _lines(run_directory):
        kinds[kind][record["step"]] = record
    return {kind: [records[step] for step in sorted(records)] for kind, records in kinds.items()}


def _lines(run_directory: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The number, the kind and the record of every line."""
    path = run_directory / FILE_NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record, whole = _parse(line), line.endswith(b"\n")
            if record is not None:
                yield number, _kind(record), record
            elif whole:
                raise ValueError(
                    f"{path}: line {number} is not a JSON object with a whole-number `step` that a run can have; "
                    "restore the file or delete that line"
                )
            if not whole:
                break  # it is being written: what comes after it is its rest, and no line


def _kind(record: dict[str, Any]) -> str:
    for kind, key in (("evaluation", "evaluation"), ("stall", STALL_KEY), ("end", END_KEY)):
        if key in record:
            return kind
    return "step"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also what a broken UTF-8 sequence raises
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or abs(record["step"]) >= _MOST_STEPS:
        return None
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _mend_torn_end(path: Path) -> None:
    """Make the file end with a newline: complete a whole last line, cut off a torn one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start, tail = size, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(size - start)
        last = tail[tail.rfind(b"\n") + 1 :]
        if not last:
            return
        if _parse(last) is None:
            file.truncate(size - len(last))
        else:
            file.write(b"\n")
