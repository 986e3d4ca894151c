"""Tracking against real W&B, real TensorBoard, and servers that hang or fail; the trainer is a real process."""

import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch.tracking.config import TrackingConfig
from launch.tracking.metrics_file import read_metrics
from launch.tracking.tracking import Tracking
from tests.end_to_end.runs import TIMEOUT_SECONDS, wait_until
from tests.launch.silent_server import silent_server

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"


def step_record(step: int, attempt: int = 1) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": attempt,
        "samples": 8 * step,
        "tokens": 512 * step,
        "loss": math.nan if step == 2 else 4.0 / step,
        "lr": 1e-3,
        "gradient_norm": 0.5,
        "step_seconds": 0.01,
        "data_wait_seconds": 0.001,
        "items_per_second": 51200.0,
        "mfu": None,
        "peak_memory_bytes": 123_456_789,
        "skipped": step == 2,
        "digest": "00ff" * 4,
    }


def make(config: TrackingConfig, run: Path) -> Tracking:
    return Tracking(config, run, run_name="first", wandb_run_id="abcd1234", recipe={"model": {"layers": 2}})


def track(config: TrackingConfig, run: Path, steps: range, attempt: int = 1) -> Tracking:
    tracking = make(config, run)
    for step in steps:
        tracking.log(step_record(step, attempt))
    tracking.log({"step": steps[-1], "attempt": attempt, "evaluation": {"loss": 1.25, "note": "text"}})
    tracking.close(TIMEOUT_SECONDS)
    return tracking


@pytest.fixture(autouse=True)
def no_wandb_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


# --- files read back ------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, those that are whole while it is written: LevelDB's log format, in blocks of 32 KiB,
    after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert b":W&B".startswith(data[:4])
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def tensorboard_scalars(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_offline_wandb_files_hold_the_run_and_its_own_step_metric(run: Path) -> None:
    tracking = track(TrackingConfig(wandb="auto", tensorboard=False), run, range(1, 4))
    assert tracking.problems == []
    assert tracking.wandb_url is None
    (path,) = run.glob("wandb/offline-run-*/run-abcd1234.wandb")
    records = list(wandb_records(path))
    (opened,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (opened.run_id, opened.project, opened.display_name) == ("abcd1234", "lockstep", "first")
    assert {item.key: json.loads(item.value_json) for item in opened.config.update}["model"] == {"layers": 2}
    globs = [
        r.metric.glob_name
        for r in records
        if r.WhichOneof("record_type") == "metric" and r.metric.step_metric == "step"
    ]
    assert globs == ["*"]
    rows = wandb_history(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert rows[0]["loss"] == 4.0
    assert rows[1]["skipped"] == 1
    assert math.isnan(float(rows[1]["loss"]))
    assert rows[3]["evaluation/loss"] == 1.25
    assert not {"digest", "mfu", "evaluation", "evaluation/note"} & {key for row in rows for key in row}


def test_a_resumed_run_keeps_its_wandb_id(run: Path) -> None:
    config = TrackingConfig(wandb="offline", tensorboard=False)
    track(config, run, range(1, 6))
    (first,) = run.glob("wandb/offline-run-*")
    # W&B names an attempt's folder by the second; a real resume is never that quick
    first.rename(first.with_name(first.name.replace("offline-run-2", "offline-run-1")))
    assert track(config, run, range(4, 8), attempt=2).problems == []
    files = sorted(run.glob("wandb/offline-run-*/run-abcd1234.wandb"))
    assert [[row["step"] for row in wandb_history(file)] for file in files] == [[1, 2, 3, 4, 5, 5], [4, 5, 6, 7, 7]]
    assert [record["attempt"] for record in read_metrics(run)[0]] == [1, 1, 1, 2, 2, 2, 2]


def test_tensorboard_events_are_read_back_and_forget_repeated_steps(run: Path) -> None:
    config = TrackingConfig(wandb="off")
    assert track(config, run, range(1, 6)).problems == []
    assert track(config, run, range(4, 8), attempt=2).problems == []
    scalars = tensorboard_scalars(run)
    losses = scalars.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6, 7]
    assert losses[3].value == pytest.approx(1.0)
    assert math.isnan(losses[1].value)
    assert [event.value for event in scalars.Scalars("attempt")] == [1, 1, 1, 2, 2, 2, 2]
    assert [event.step for event in scalars.Scalars("evaluation/loss")] == [7]
    assert "digest" not in scalars.Tags()["scalars"]


def test_every_steps_thins_the_trackers_but_not_the_file(run: Path) -> None:
    track(TrackingConfig(wandb="off", every_steps=3), run, range(1, 9))
    assert [event.step for event in tensorboard_scalars(run).Scalars("loss")] == [3, 6]
    assert len(read_metrics(run)[0]) == 8


def test_nothing_is_started_that_was_not_asked_for(run: Path) -> None:
    track(TrackingConfig(wandb="off", tensorboard=False), run, range(1, 3))
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_no_secret_reaches_a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    assert track(TrackingConfig(wandb="offline"), run, range(1, 4)).problems == []
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []


# --- trackers that fail ---------------------------------------------------------------------------------------

TRAINER = """
import json, sys
from pathlib import Path
from launch.tracking.config import TrackingConfig
from launch.tracking.tracking import Tracking
from tests.end_to_end.runs import wait_until
from tests.launch.silent_server import silent_server
config, run = TrackingConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])
steps, timeout_seconds = map(int, sys.argv[3:])
tracking = Tracking(config, run, run_name="first", wandb_run_id="abcd1234", recipe={})
for step in range(1, steps + 1):
    tracking.log({"step": step, "loss": 1.0})
print("logged", flush=True)
sys.stdin.readline()
tracking.close(timeout_seconds)
print("problems", json.dumps(tracking.problems), flush=True)
"""


def train(
    config: dict[str, Any],
    run: Path,
    steps: int,
    timeout_seconds: int,
    *,
    until: Callable[[], bool] = lambda: True,
    **environment: str,
) -> list[str]:
    """Runs a trainer to its own end, which it awaits until `until` holds; returns the tracking's problems."""
    arguments = [json.dumps(config), str(run), str(steps), str(timeout_seconds)]
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, *arguments],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as trainer:
        wait_until(until, "what the test waits for")
        out, err = trainer.communicate("end\n", timeout=250)
    assert trainer.returncode == 0, err
    logged, problems = out.splitlines()
    assert logged == "logged"
    found: list[str] = json.loads(problems.removeprefix("problems "))
    assert err.splitlines() == [f"lockstep: warning: {problem}" for problem in found]
    assert len(read_metrics(run)[0]) == steps
    return found


class Broken(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("mode", ["auto", pytest.param("online", marks=pytest.mark.long)])
def test_a_hanging_wandb_stops_neither_the_steps_nor_the_exit(run: Path, tmp_path: Path, mode: str) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"WANDB_API_KEY": FAKE_KEY, "TMPDIR": str(temporary)}
    with silent_server() as (url, connections):
        config = {"wandb": mode, "tensorboard": False}
        # more records than the queue holds
        (problem,) = train(config, run, 11_000, 2, until=lambda: bool(connections), WANDB_BASE_URL=url, **environment)
    assert list(temporary.iterdir()) == []
    assert problem.startswith("W&B: did not finish in time")
    assert [path for path in run.rglob("*") if path.is_file() and FAKE_KEY.encode() in path.read_bytes()] == []


def test_a_wandb_that_answers_500_never_stops_the_run(run: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        config = {"wandb": "online", "tensorboard": False}
        (problem,) = train(config, run, 100, 3, WANDB_BASE_URL=url, WANDB_API_KEY=FAKE_KEY)
        server.shutdown()
    assert problem.startswith("W&B: ")


def test_online_wandb_without_a_key_is_said_in_one_line(run: Path) -> None:
    (problem,) = train({"wandb": "online", "tensorboard": False}, run, 100, 200)
    assert "No API key configured" in problem


def test_an_unwritable_tensorboard_directory_is_said_in_one_line(run: Path) -> None:
    (run / "tensorboard").write_text("a file, where the folder should be")
    (problem,) = train({"wandb": "off"}, run, 100, 200)
    assert problem.startswith("TensorBoard: FileExistsError")


def test_a_failing_tracker_leaves_the_other_one_alone(run: Path) -> None:
    (run / "wandb").write_text("a file, where the folder should be")
    (problem,) = train({"wandb": "offline"}, run, 100, 200)
    assert problem.startswith("W&B: ")
    assert len(tensorboard_scalars(run).Scalars("loss")) == 100


def test_a_killed_trainer_leaves_whole_tracker_files(run: Path) -> None:
    # killed once the trackers have taken what was logged, but long before they would have flushed it
    wait = "import time\nwhile any(not t._queue.empty() for t in tracking._trackers): time.sleep(0.01)\n"
    script = TRAINER.replace('print("logged"', wait + 'print("logged"').replace("tracking.close", "time.sleep")
    arguments = ['{"wandb": "offline"}', str(run), "50", "1000"]
    trainer = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "logged\n"
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for(lambda: any(run.glob("wandb/offline-run-*/*.wandb")))
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    wait_for(lambda: any(record.WhichOneof("record_type") == "exit" for record in wandb_records(path)))
    assert len(wandb_history(path)) >= 49  # the fiftieth may have been on its way
    wait_for(lambda: tensorboard_steps(run) >= 49)


def tensorboard_steps(run: Path) -> int:
    scalars = tensorboard_scalars(run)
    return len(scalars.Scalars("loss")) if "loss" in scalars.Tags()["scalars"] else 0


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        threading.Event().wait(0.1)
    raise AssertionError("waited for a minute in vain")


def test_a_full_disk_is_the_one_failure_that_stops_the_run(run: Path) -> None:
    (run / "metrics.jsonl").symlink_to("/dev/full")
    tracking = make(TrackingConfig(wandb="off", tensorboard=False), run)
    with pytest.raises(ValueError, match="No space left on device"):
        tracking.log(step_record(1))
    tracking.close()


def test_unknown_keys_of_the_recipe_are_refused() -> None:
    with pytest.raises(ValueError, match="extra_forbidden"):
        TrackingConfig.model_validate({"wandb_projekt": "x"})


def test_the_trainer_itself_imports_neither_library() -> None:
    code = "import sys, launch.tracking.tracking; print({'wandb', 'tensorboard', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
