"""`lockstep doctor`: one table of what is there, how fast it is, and what is broken; no secret in it."""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import _launcher, _rooms_here, _wandb
from tests.end_to_end.runs import LOCKSTEP, Result, command, environment

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens


def doctor(*arguments: object, cwd: Path, start: tuple[object, ...] = (LOCKSTEP,), **variables: str) -> Result:
    env = environment(**{"WANDB_BASE_URL": NOBODY, **variables})
    return command(*start, "doctor", *arguments, cwd=cwd, env=env)


def checks_of(result: Result) -> dict[str, dict[str, Any]]:
    report = json.loads(result.out)
    assert report["exit_code"] == result.code
    return {check["name"]: check for check in report["checks"]}


def test_a_machine_is_examined(tmp_path: Path) -> None:
    result = doctor("--json", "--workers", 2, cwd=tmp_path, NCCL_DEBUG="WARN").succeeded()
    checks = checks_of(result)
    assert {check["state"] for check in checks.values()} <= {"ok", "slow"}
    for name in ("python", "torch", "deepspeed", "accelerate", "datasets", "wandb", "numpy", "CUDA", "launcher", "devices",
                 "matrix product, fp32", "matrix product, bf16", "memory bandwidth", "all-reduce, gloo", "disk, write",
                 "disk, read", "run directory", "cache", "W&B"):  # fmt: skip
        assert checks[name]["figure"], name
    assert "between 2 ranks" in checks["all-reduce, gloo"]["figure"]
    assert "NCCL_DEBUG=WARN" in checks["launcher"]["figure"]
    assert checks["W&B"]["figure"].startswith("offline: 127.0.0.1 does not answer")
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_is_a_line_and_exit_code_1(tmp_path: Path) -> None:
    recipe = ["lenet-digits", "tracking.wandb=off", "run.directory=/proc/run"]
    result = doctor(*recipe, "--workers", 1, cwd=tmp_path)
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    lines = {line.split("  ")[0]: line for line in result.out.splitlines()}
    assert " broken " in lines["disk"]
    assert "/proc" in lines["disk"]
    assert "not asked for (tracking.wandb=off)" in lines["W&B"]
    assert " ok " in lines["torch"]


@pytest.mark.long
def test_workers_that_cannot_measure_are_told(tmp_path: Path) -> None:
    result = doctor("--json", "--device", "cuda", "--workers", 2, cwd=tmp_path)
    assert result.code == 1
    assert "torch sees no GPU" in checks_of(result)["workers"]["figure"]


@pytest.mark.long
def test_under_a_launcher_its_processes_are_the_workers(tmp_path: Path) -> None:
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "launch.cli")
    result = doctor("--json", cwd=tmp_path, start=start).succeeded()
    checks = checks_of(result)  # which one rank alone prints
    assert "between 2 ranks" in checks["all-reduce, gloo"]["figure"]
    assert "WORLD_SIZE=2" in checks["launcher"]["figure"]


def test_a_recipe_that_is_wrong_is_refused(tmp_path: Path) -> None:
    doctor("no-such-recipe", cwd=tmp_path).failed_with(2, "no-such-recipe")
    doctor("--workers", 0, cwd=tmp_path).failed_with(2, "--workers 0")


def test_no_secret_is_shown() -> None:
    figure = _launcher(
        {
            "RANK": "3", "ACCELERATE_TOKEN": "hf_secret", "NCCL_NET_KEY": "secret1", "WANDB_API_KEY": "secret2",
            "DS_STORE": "https://me:secret3@host/", "AWS_SECRET_ACCESS_KEY": "secret4", "SLURM_JOB_ID": "17", "HOME": "/me",
        }
    ).figure  # fmt: skip
    assert "secret" not in figure
    assert figure == (
        "ACCELERATE_TOKEN (set, not shown) DS_STORE (set, not shown) NCCL_NET_KEY (set, not shown) RANK=3 SLURM_JOB_ID=17"
    )


def test_room(tmp_path: Path) -> None:
    (check,) = _rooms_here({"cache": tmp_path / "not" / "there"})
    assert check.state == "ok"
    assert "GiB free" in check.figure
    assert list(tmp_path.iterdir()) == []


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[int]:
    """A server that has no page, at this port."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Refuses) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()


def test_a_server_that_answers_is_reachable(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor._WANDB_SECONDS", 100.0)  # it may stand still for some
    check = _wandb({"WANDB_BASE_URL": f"http://127.0.0.1:{server}", "WANDB_API_KEY": "secret"})
    assert check.figure.startswith("127.0.0.1 answers in ")
    assert check.figure.endswith("a key is set")
    assert "secret" not in check.figure


def test_a_server_that_does_not_answer_is_offline_and_no_failure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody accepts
        check = _wandb({"WANDB_BASE_URL": f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}/"})
    assert check.state == "ok"
    assert check.figure.startswith("offline: 127.0.0.1 does not answer")
    assert "secret" not in check.figure
    assert _wandb({"WANDB_BASE_URL": "no address"}).figure.startswith("offline: ")
