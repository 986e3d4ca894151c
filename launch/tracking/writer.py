"""The process that a tracker's library runs in: `python -P writer.py wandb|tensorboard TEMPORARY_DIRECTORY`.

`tracker_process.py` starts it, and has the protocol and the reasons for a process. It is run as a file and imports
nothing of Lockstep, so that the folder it is started in does not matter.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

# How long this process may go on after an error, or without a trainer. A living trainer sets a limit of its own.
ORPHAN_SECONDS = 120
TENSORBOARD_FLUSH_SECONDS = 5


class Writer(Protocol):
    url: str | None

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self, orderly: bool) -> None: ...


class WandbWriter:
    """Weights & Biases. All attempts of a run share one id.

    Online, W&B continues the run. Offline, every attempt leaves a folder `wandb/offline-run-*` with that id, and
    `wandb sync <run>/wandb/offline-run-*` uploads them as one run, in the order of their start.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        import wandb

        mode = header["mode"]
        if mode == "auto":
            # without a prompt, login only looks for credentials, in all the places that wandb knows
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            id=header["run_id"],
            resume="allow",
            dir=header["directory"],
            project=header["project"],
            entity=header["entity"],
            name=header["name"],
            config=header["recipe"],
            mode=mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_stats_pid=header["trainer_pid"],  # the process whose CPU and memory W&B shows
            ),
        )
        # Where it cannot write, wandb falls back to the system's temporary directory. That is not what was asked for.
        directory = Path(header["directory"]).resolve()
        if mode != "disabled" and not Path(self._run.dir).resolve().is_relative_to(directory):
            raise OSError(f"{directory} is not writable for wandb")
        # W&B's own step may never go back, and a resumed run goes back to its checkpoint.
        self._run.define_metric("*", step_metric="step")
        self.url: str | None = None if self._run.offline else self._run.url

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(record)

    def close(self, orderly: bool) -> None:
        self._run.finish(exit_code=0 if orderly else 1)


class TensorBoardWriter:
    """Event files, by TensorBoard's own writer: torch's would load torch for it."""

    def __init__(self, header: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.url: str | None = None
        self._event, self._session_log, self._summary = Event, SessionLog, Summary
        self._file = EventFileWriter(header["directory"], max_queue_size=1000, flush_secs=TENSORBOARD_FLUSH_SECONDS)
        self._first = True

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self._first:
            # Makes TensorBoard forget what an earlier attempt wrote of this step and of later ones.
            start = self._session_log(status=self._session_log.START)
            self._file.add_event(self._event(wall_time=time.time(), step=step, session_log=start))
            self._first = False
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self, orderly: bool) -> None:
        self._file.close()


def main(kind: str, temporary: str) -> None:
    # Only the end of the input ends this process: a job's signals are the trainer's business, and the records of its
    # last steps still have to be written.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to the log, not among the reports
    try:
        header = json.loads(sys.stdin.readline())
        writer: Writer = WandbWriter(header) if kind == "wandb" else TensorBoardWriter(header)
        reports.write(json.dumps({"ready": writer.url}) + "\n")
        orderly = False
        for line in sys.stdin:
            if not line.endswith("\n"):
                break  # the trainer died while it wrote
            record = json.loads(line)
            if record is None:
                orderly = True
                break
            writer.write(record)
        if not orderly:
            _end_soon(temporary)
        writer.close(orderly)
        if not orderly:  # else the trainer does it
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        _end_soon(temporary)
        reports.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        raise


def _end_soon(temporary: str) -> None:
    """Ends this process after a while, whatever its library is about by then."""

    def end() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        os._exit(1)

    ending = threading.Timer(ORPHAN_SECONDS, end)
    ending.daemon = True
    ending.start()
    signal.alarm(ORPHAN_SECONDS + 10)  # where a library lets no other thread run


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
