"""The files of a run that never was, and what each second of it was."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.goodput import ROWS, Account, account_of

BEGAN = 1_800_000_000.0


@dataclass
class Simulated:
    """An attempt after the other, as their files tell of them."""

    wall: float = BEGAN
    step: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    done: dict[int, dict[str, float]] = field(default_factory=dict)
    """What each step that counts, and what belongs to it, took."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROWS, 0.0))
    clock: dict[str, Any] = field(default_factory=dict)

    def begin(
        self, start: float, *, back: int = 0, before: float = 0.0, died: float | None = None, **time: Any
    ) -> None:
        """An attempt, `before` seconds after the end of the last one, goes back so many steps. `died`: how long after its
        last word the one before ended, if its launcher saw that."""
        self._forget(max(0, self.step - back))
        if died is not None:
            farewell = self.lines and self.lines[-1]["attempt"] == len(self.attempts) and "ended" in self.lines[-1]
            self.seconds["end" if farewell else "lost"] += died
            self.wall += died
            self.attempts[-1]["time"]["ended"] = self.wall
        self.seconds["between"] += before
        self.wall += before
        self.clock = {"phases": {}, "waiting": 0.0}
        time = {"launched": self.wall, "process_began": self.wall, "job": None} | time
        self.seconds["start"] += start
        self._spend("start", start)
        whence = ("checkpoints/x", self.step, 10 * self.step, "0" * 32) if self.step else (None,) * 4
        keys = ("resumed_from", "resumed_from_step", "resumed_from_position", "resumed_from_digest")
        self.attempts.append(
            {"attempt": len(self.attempts) + 1, "world_size": 2, "engine": "native", "plan": "p", "datasets": {}}
            | dict(zip(keys, whence, strict=True)) | {"time": time | {"clock": self.read()}}
        )  # fmt: skip

    def train(self, data: float, compute: float, communication: float, evaluate: float, save: float) -> None:
        """A step, then an evaluation and a save."""
        self._spend("data", data)
        self._spend("forward", compute / 2)
        self._spend("backward", compute / 2 + communication)
        self.clock["waiting"] += communication
        self.step += 1
        self.write(loss=1.0)
        self._spend("evaluate", evaluate)
        self.write(evaluation={})
        self._spend("save", save / 2)
        self._spend("save.write", save / 2)
        self.write(checkpoint_stall_seconds=save)
        self.done[self.step] = {
            "data": data, "compute": compute, "communication": communication, "evaluate": evaluate, "save": save,
        }  # fmt: skip

    def end(self, seconds: float) -> None:
        self._spend("end", seconds)
        self.done.setdefault(self.step, {})["end"] = self.done.get(self.step, {}).get("end", 0.0) + seconds
        self.write(ended=True)

    def account(self) -> Account:
        with tempfile.TemporaryDirectory() as directory:
            return account_of(self.put(Path(directory)))

    def put(self, directory: Path) -> Path:
        (directory / "run.json").write_text(json.dumps({"attempts": self.attempts}))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return directory

    def expected(self) -> dict[str, float]:
        counted = {row: sum(parts.get(row, 0.0) for parts in self.done.values()) for row in ROWS}
        return {row: self.seconds[row] + counted[row] for row in ROWS}

    def write(self, **what: Any) -> None:
        self.lines.append({"step": self.step, "attempt": len(self.attempts), **what, "clock": self.read()})

    def read(self) -> dict[str, Any]:
        return {"at": self.wall, "phases": dict(self.clock["phases"]), "waiting": self.clock["waiting"]}

    def _spend(self, phase: str, seconds: float) -> None:
        self.clock["phases"][phase] = self.clock["phases"].get(phase, 0.0) + seconds
        self.wall += seconds

    def _forget(self, step: int) -> None:
        """Everything after `step` was for nothing; of a run that begins afresh, everything."""
        for number in [number for number in self.done if number > step or step == 0]:
            self.seconds["lost"] += sum(self.done.pop(number).values())
        self.step = step
