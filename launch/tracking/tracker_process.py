"""A tracker in a process of its own, behind a bounded queue: whatever it does, the training step does not notice.

A thread alone would not do. W&B registers exit hooks that wait for its service without a limit, so that a hung service
hangs the trainer's exit; both trackers would take the interpreter's lock from the step; and a trainer that is killed
would take the last records with it. A process can be killed, computes beside the step, and outlives a crash for long
enough to finish.

The protocol, in lines of JSON. In: a header; then records, flat objects of numbers with their `step`; then null, the
orderly end. An end of the input without null means that the trainer died. Out: `{"ready": url or null}` once open,
`{"failed": reason}` before giving up. What the tracker's libraries print goes to `<run>/logs/<kind>.log`. What they keep
in the system's temporary directory lies in a folder of the process's own (TMPDIR), which goes with it, however it ends.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

QUEUE_RECORDS = 10_000
_WRITER = Path(__file__).with_name("writer.py")
_END = object()


class TrackerProcess:
    """Feeds one tracker. `log` never blocks and never raises; what goes wrong is told to `report`, once.

    kind: which writer. name: what people call it. header: what the writer needs to open. log_file: takes its output.
    """

    def __init__(
        self,
        kind: Literal["wandb", "tensorboard"],
        name: str,
        header: dict[str, Any],
        log_file: Path,
        report: Callable[[str], None],
    ) -> None:
        self.url: str | None = None
        self._name = name
        self._log_file = log_file
        self._report = report
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE_RECORDS)
        self._dropped = 0
        self._failed = False
        self._failing = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._temporary: str | None = None
        self._thread = threading.Thread(target=self._run, args=(kind, header), name=f"lockstep-{kind}", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, float]) -> None:
        if not self._failed:
            self._put(record)

    def end(self) -> None:
        """Ask the tracker to finish; `join` waits for it."""
        self._put(_END)

    def join(self, timeout_seconds: float) -> None:
        """Wait until the tracker has finished; one that has not after the timeout is killed, and that is reported."""
        self._thread.join(0.0 if self._failed else timeout_seconds)  # one that failed has nothing left to finish
        if self._thread.is_alive():
            self._fail("did not finish in time at the end of the run and was ended")
            if self._process is not None:
                self._process.kill()
                self._clear()
        elif self._dropped and not self._failed:
            self._report(
                f"{self._name}: was too slow, {self._dropped} records did not reach it; metrics.jsonl has every step"
            )

    def _put(self, item: Any) -> None:
        while True:
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._queue.get_nowait()
        except queue.Empty:
            return  # the thread made room in the meantime
        self._dropped += 1

    def _run(self, kind: str, header: dict[str, Any]) -> None:
        try:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.mkdtemp(prefix=f"lockstep-{kind}-")
            with self._log_file.open("a") as log:
                # -P: the folder where the trainer was started, often one with a `wandb/` in it, must shadow nothing.
                # A session of its own: Ctrl-C at the trainer's terminal is not meant for the tracker.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WRITER), kind, self._temporary],
                    env={**os.environ, "TMPDIR": self._temporary},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    start_new_session=True,
                )
        except OSError as error:
            self._fail(str(error))
            return
        try:
            self._feed(self._process, header)
        except OSError:  # the process has gone, or closed its input
            self._fail(self._reason(self._process) or "its process ended early")
        self._clear()

    def _clear(self) -> None:
        """Waits for the end of the process, and removes what its libraries left."""
        assert self._process is not None
        self._process.wait()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _feed(self, process: subprocess.Popen[str], header: dict[str, Any]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(header) + "\n")
        answer = json.loads(process.stdout.readline() or "{}")
        if "ready" not in answer:
            self._fail(answer.get("failed") or self._reason(process) or "its process ended early")
            return
        self.url = answer["ready"]
        while (record := self._queue.get()) is not _END:
            process.stdin.write(json.dumps(record) + "\n")
        process.stdin.write("null\n")
        process.stdin.close()
        if reason := self._reason(process):
            self._fail(reason)

    def _reason(self, process: subprocess.Popen[str]) -> str | None:
        """Why the process failed, as soon as it says so or ends; None where it ended well."""
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "failed" in answer:
                return str(answer["failed"])
        code = process.wait()
        return f"its process ended with exit code {code}" if code else None

    def _fail(self, reason: str) -> None:
        with self._failing:
            if self._failed:
                return
            self._failed = True
        one_line = " ".join(reason.split())
        self._report(
            f"{self._name}: {one_line}; it gets no more records, metrics.jsonl has every step "
            f"(details in {self._log_file})"
        )
