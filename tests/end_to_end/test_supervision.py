"""Workers that are killed, stopped, stuck or mistaken under a real `lockstep train`, and what it makes of that."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import (
    LOCKSTEP,
    TIMEOUT_SECONDS,
    Result,
    WarmProcess,
    checkpoints,
    command,
    final_bytes,
    history,
    is_running,
    lockstep,
    started,
    wait_for_step,
    wait_until,
    workers_of,
    write_recipe,
)
from tests.end_to_end.runs import environment as clean_environment
from tests.end_to_end.user_models import write_user_package

STEPS = 150
RESTARTED = ["run.max_restarts=3", "--workers", 2]
# Far longer than any phase of these runs, on however busy a machine.
QUICK = "run.hang_timeout_seconds=5"

# Python runs a module of this name in every process at its start: rank 1's source blocks in the thread that reads ahead,
# while it makes the fifth chunk of steps, in the first attempt.
BLOCKED_SOURCE = """
import os

if os.environ.get("RANK") == "1" and os.environ["LOCKSTEP_SUPERVISOR"].endswith(" 0"):
    import time
    from data.stream import Stream

    make, made = Stream._make_chunk, []

    def blocks(*arguments):
        made.append(True)
        if len(made) == 5:
            time.sleep(3600)
        return make(*arguments)

    Stream._make_chunk = blocks
"""

# It does something to itself at a moment, once the supervisor has heard of that.
AT_A_MOMENT = """
import os

if os.environ.get("RANK", "") in {ranks} and int(os.environ["LOCKSTEP_SUPERVISOR"].split()[-1]) < {attempts}:
    import resource, signal, time
    from distrib import phases

    def happen(moment):
        {do}

    def hear(moment, heard=[]):
        if moment[:2] == ({phase!r}, {step}) and not heard:
            heard.append(True)
            phases.observe(happen)  # the last to hear of this moment

    phases.observe(hear)
"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def attempts(run: Path) -> list[Any]:
    return list(read_json(run / "run.json")["attempts"])


def assert_same_run(run: Path, straight: Path) -> None:
    assert final_bytes(run) == final_bytes(straight)
    assert history(run) == history(straight)
    assert not list(run.rglob(".tmp-*"))
    assert read_json(run / "outcome.json")["exit_code"] == 0


def test_nobody_takes_the_port_at_which_the_workers_are_about_to_meet(recipe: Path, tmp_path: Path) -> None:
    """They import for seconds before they do: a port that was merely free when it was chosen could be gone by then."""
    arguments = ["train", recipe, "run.directory=run", "run.steps=1000000", "--workers", 2]
    with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
        wait_until(lambda: bool(workers_of(process.pid)), "a worker")
        variables = Path(f"/proc/{workers_of(process.pid)[0]}/environ").read_bytes().split(b"\0")
        port = next(int(v.removeprefix(b"MASTER_PORT=")) for v in variables if v.startswith(b"MASTER_PORT="))
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                thief.bind(("127.0.0.1", port))
        process.terminate()
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, err
    assert f"met at 127.0.0.1:{port}\n" in err


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_rank_is_replaced(rank: int, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Its first attempt does not come to its end before somebody kills it.
    env = at_a_moment("data", 30, "time.sleep(3600)", tmp_path, ranks="01")
    arguments = [
        "train",
        recipe,
        "run.directory=run",
        f"run.steps={STEPS}",
        "run.hang_timeout_seconds=null",
        *RESTARTED,
    ]
    with started(LOCKSTEP, *arguments, cwd=tmp_path, env=env) as process:
        wait_for_step(run, 8, None, process)
        wait_until(lambda: bool(checkpoints(run)), "a checkpoint to go on from")
        workers = workers_of(process.pid)
        os.kill(workers[rank], signal.SIGKILL)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, err
    assert not any(map(is_running, workers))
    assert_same_run(run, straight_run(2, STEPS))
    assert len(attempts(run)) == 2
    assert attempts(run)[1]["resumed_from_step"] >= 5
    died = read_json(run / "post-mortem.json")
    assert (died["rank"], died["cause"], died["signal"], died["attempt"]) == (rank, "signal", "SIGKILL", 1)
    assert died["pid"] == workers[rank]
    assert died["step"] >= 7
    assert died["last_metrics"]["attempt"] == 1
    assert died["earlier"] == []
    told = f"lockstep: rank {rank} was killed by SIGKILL in {died['phase']} at step {died['step']}; starting again (1 of 3)"
    assert told in err.splitlines()


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_replaced(
    rank: int, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    env = at_a_moment("forward", 20, "os.kill(os.getpid(), signal.SIGSTOP)", tmp_path, ranks=str(rank))
    arguments = ["train", recipe, "run.directory=run", f"run.steps={STEPS}", QUICK, *RESTARTED]
    lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    assert_same_run(run, straight_run(2, STEPS))
    died = read_json(run / "post-mortem.json")
    assert (died["rank"], died["cause"], died["exit_code"], died["signal"]) == (rank, "hang", None, None)
    assert died["reason"].endswith(" s: its process is stopped")
    # The one that waited for it is not blamed, and says where it waits.
    assert died["stacks"] == [f"logs/stacks-rank-{1 - rank}.txt"]
    assert "most recent call first" in (run / died["stacks"][0]).read_text()


def with_site(code: str, tmp_path: Path) -> Mapping[str, str]:
    """An environment in which every process runs `code` at its start."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(code)
    return clean_environment(PYTHONPATH=os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))


def at_a_moment(
    phase: str, step: int, do: str, tmp_path: Path, *, ranks: str = "1", attempts: int = 1
) -> Mapping[str, str]:
    """Ranks do `do` in that phase of the first `attempts` attempts."""
    code = AT_A_MOMENT.format(phase=phase, step=step, do=do, ranks=set(ranks), attempts=attempts)
    return with_site(code, tmp_path)


@pytest.mark.long
def test_a_source_that_blocks_is_the_cause_and_not_the_rank_that_waits_for_it(
    recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ["train", recipe, "run.directory=run", f"run.steps={STEPS}", QUICK, *RESTARTED]
    lockstep(*arguments, cwd=tmp_path, env=with_site(BLOCKED_SOURCE, tmp_path)).succeeded()
    run = tmp_path / "run"
    assert_same_run(run, straight_run(2, STEPS))
    died = read_json(run / "post-mortem.json")
    assert (died["rank"], died["cause"], died["phase"]) == (1, "hang", "data")
    assert [rank["phase"] for rank in died["ranks"]] == ["data", "data"]
    assert "sitecustomize.py" in (run / "logs" / "stacks-rank-1.txt").read_text()
    assert "sum_in_prefetch_thread" in (run / "logs" / "stacks-rank-0.txt").read_text()


@pytest.mark.parametrize("ranks", ["1", pytest.param("01", marks=pytest.mark.long)])
def test_a_rank_that_leaves_before_the_end_has_failed_whatever_its_exit_code(
    ranks: str, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A library that calls exit(), or a script that does: nobody says that the run is done."""
    env = at_a_moment("forward", 20, "os._exit(0)", tmp_path, ranks=ranks)
    arguments = ["train", recipe, "run.directory=run", *RESTARTED]
    ended = lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    run = tmp_path / "run"
    assert_same_run(run, straight_run(2))
    died = read_json(run / "post-mortem.json")
    assert (died["cause"], died["exit_code"], died["phase"], died["step"]) == ("exit", 0, "forward", 20)
    assert str(died["rank"]) in ranks
    reason = f"rank {died['rank']} ended with exit code 0 in forward at step 20, before the run's end"
    assert f"lockstep: {reason}; starting again (1 of 3)" in ended.told
    assert len(attempts(run)) == 2


@pytest.mark.long
def test_leaving_again_and_again_at_one_step_ends_the_run_with_78(recipe: Path, tmp_path: Path) -> None:
    env = at_a_moment("forward", 20, "os._exit(75)", tmp_path, ranks="01", attempts=9)
    ended = lockstep("train", recipe, "run.directory=run", *RESTARTED, cwd=tmp_path, env=env)
    assert ended.code == 78, ended.err
    outcome = read_json(tmp_path / "run" / "outcome.json")
    assert (outcome["exit_code"], outcome["step"]) == (78, 20)
    assert "ended with exit code 75 in forward at step 20, before the run's end" in outcome["reason"]


@pytest.mark.long
def test_a_signal_without_a_name_is_told_by_its_number(recipe: Path, tmp_path: Path) -> None:
    env = at_a_moment("forward", 20, "os.kill(os.getpid(), 40)", tmp_path)
    ended = lockstep("train", recipe, "run.directory=run", *RESTARTED, cwd=tmp_path, env=env).succeeded()
    assert "lockstep: rank 1 was killed by signal 40 in forward at step 20; starting again (1 of 3)" in ended.told
    assert read_json(tmp_path / "run" / "post-mortem.json")["signal"] == "signal 40"


@pytest.mark.long
@pytest.mark.parametrize(
    ("phase", "step", "do", "known"),
    [
        ("load", 0, "time.sleep(3600)", "it does not move"),
        ("load", 0, "os.kill(os.getpid(), signal.SIGSTOP)", "its process is stopped"),
        ("evaluate", 0, "time.sleep(3600)", "it does not move"),
        ("end", 40, "time.sleep(3600)", "it does not move"),
    ],
)
def test_a_hang_that_the_process_groups_own_time_ends_is_found_out_all_the_same(
    phase: str, step: int, do: str, known: str, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Ahead of steps, and after them, the rank that waits gives up before anybody counts as hung: it is not the cause."""
    env = at_a_moment(phase, step, do, tmp_path)
    arguments = ["train", recipe, "run.directory=run", "parallel.timeout_seconds=15", *RESTARTED]
    ended = lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    run = tmp_path / "run"
    assert_same_run(run, straight_run(2))
    died = read_json(run / "post-mortem.json")
    assert (died["rank"], died["cause"], died["phase"], died["step"]) == (1, "hang", phase, step)
    assert died["reason"].startswith(f"rank 1 hung in {phase} at step {step} for ")
    assert died["reason"].endswith(f" s: {known}")
    assert f"lockstep: {died['reason']}; starting again (1 of 3)" in ended.told
    assert "Traceback" not in ended.err
    assert "distributed_c10d.py" in (run / "logs" / "stacks-rank-0.txt").read_text()
    if "sleep" in do:
        assert "sitecustomize.py" in (run / "logs" / "stacks-rank-1.txt").read_text()


@pytest.mark.long
def test_a_rank_that_never_comes_to_meet_the_others_is_named(recipe: Path, tmp_path: Path) -> None:
    late = 'import os, time\n\nif os.environ.get("LOCKSTEP_SUPERVISOR", "").endswith(" 0") and os.environ["RANK"] == "1":\n'
    env = with_site(late + "    time.sleep(3600)\n", tmp_path)
    arguments = ["train", recipe, "run.directory=run", "parallel.timeout_seconds=15", *RESTARTED]
    ended = lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    named = [line for line in ended.told if line.startswith("lockstep: rank 1 hung in start at step 0 for ")]
    assert [line.partition(" s: ")[2] for line in named] == ["its process does not answer; starting again (1 of 3)"]
    assert "Traceback" not in ended.err


@pytest.mark.long
def test_what_a_worker_says_of_its_end_counts_whatever_the_clock_says(recipe: Path, tmp_path: Path) -> None:
    """A clock that is set back under a long run must not hide why a worker failed."""
    ahead = "import sys, time; now = time.time; time.time = lambda: now() + 3600; "
    command_line = [sys.executable, "-c", ahead + "from launch.cli import main; sys.exit(main(sys.argv[1:]))", "train"]
    env = at_a_moment("forward", 20, "raise RuntimeError('a mistake of mine')", tmp_path, attempts=9)
    ended = command(*command_line, recipe, "run.directory=run", *RESTARTED, cwd=tmp_path, env=env)
    assert ended.code == 78, ended.err
    assert "lockstep: rank 1 failed: RuntimeError: a mistake of mine; starting again (1 of 3)" in ended.told
    died = read_json(tmp_path / "run" / "post-mortem.json")
    assert [one["cause"] for one in (died, *died["earlier"])] == ["exception"] * 2
    assert died["exception"]["message"] == "a mistake of mine"


def test_a_damaged_identity_ends_the_command_with_78_and_a_damaged_post_mortem_ends_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "post-mortem.json").write_text("{torn")
    env = at_a_moment("forward", 7, "open('run/run.json', 'w').write('{torn'); os._exit(3)", tmp_path)
    # No checkpoint is being written when the run ends, which would be told, too.
    arguments = ["train", recipe, "run.directory=run", "checkpoint.every_steps=40", *RESTARTED]
    ended = lockstep(*arguments, cwd=tmp_path, env=env)
    assert ended.code == 78, ended.err
    assert "Traceback" not in ended.err
    reason = "run/run.json: not what a run writes; restore the file, or begin a new run from a checkpoint of it"
    assert ended.told[0].endswith("post-mortem.json: not what a run writes; kept as post-mortem.json.corrupt")
    assert ended.told[1:] == [f"lockstep: error: {reason}"]
    outcome = read_json(run / "outcome.json")
    assert (outcome["exit_code"], outcome["reason"]) == (78, reason)
    lockstep(*arguments, "--resume", "auto", cwd=tmp_path).failed_with(78, reason)


@pytest.fixture
def faulty(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A model of the user's own that fails as its environment says; six forwards of two ranks make a step of theirs."""
    values = recipe_values(run={"steps": 20, "max_restarts": 3})
    values["model"] = {"kind": "own_package.models_of_mine:build_faulty"}
    return write_recipe(tmp_path / "faulty.yaml", values)


def fails(how: str, at: list[int], tmp_path: Path, rank: int = 1) -> Mapping[str, str]:
    package = tmp_path / "mine"
    if not package.exists():
        write_user_package(package)
    forwards = " ".join(map(str, at))
    return clean_environment(PYTHONPATH=f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                             FAULT=how, FAULTS=forwards, FAULT_RANK=str(rank))  # fmt: skip


def train(recipe: Path, *overrides: object, env: Mapping[str, str]) -> Result:
    return lockstep("train", recipe, "run.directory=run", "--workers", 2, *overrides, cwd=recipe.parent, env=env)


@pytest.mark.long
def test_a_thread_that_keeps_the_interpreter_is_found_in_its_phase(faulty: Path, tmp_path: Path) -> None:
    """No Python code can run in that process, so none of it can say so: its stacks can be had all the same."""
    train(faulty, QUICK, env=fails("hang", [30], tmp_path)).succeeded()
    died = read_json(tmp_path / "run" / "post-mortem.json")
    assert (died["rank"], died["cause"], died["phase"]) == (1, "hang", "forward")
    assert died["reason"].endswith(" s: it does not move")
    assert "models_of_mine.py" in (tmp_path / "run" / "logs" / "stacks-rank-1.txt").read_text()
    assert (tmp_path / "run" / "logs" / "stacks-rank-0.txt").exists()
    assert checkpoints(tmp_path / "run")[-1] == "step-00000020"


@pytest.mark.long
def test_a_mistake_that_comes_again_at_the_same_step_ends_the_run_with_78(faulty: Path, tmp_path: Path) -> None:
    """The first attempt dies in its ninth step, and the second, which begins after the fifth, there too."""
    forwards_of_a_step = 3
    dry = 2
    at = [dry + 8 * forwards_of_a_step + 1, dry + 3 * forwards_of_a_step + 1]
    ended = train(faulty, env=fails("mistake", at, tmp_path))
    assert ended.code == 78, ended.err
    run = tmp_path / "run"
    reason = "died 2 times in the same way at step 8 and would again: rank 1 failed: ArithmeticError: a mistake of mine"
    assert ended.err.splitlines()[-1] == f"lockstep: error: {reason}"
    assert len(attempts(run)) == 2
    outcome = read_json(run / "outcome.json")
    assert (outcome["exit_code"], outcome["reason"], outcome["step"]) == (78, reason, 8)
    died = read_json(run / "post-mortem.json")
    assert (died["rank"], died["cause"], died["phase"], died["step"]) == (1, "exception", "forward", 8)
    assert (died["exit_code"], died["exception"]["type"]) == (1, "ArithmeticError")
    assert died["exception"]["message"] == "a mistake of mine"
    assert "models_of_mine.py" in died["exception"]["frames"][-1]
    assert [earlier["attempt"] for earlier in died["earlier"]] == [1]
    assert checkpoints(run) == ["step-00000005"]


@pytest.mark.long
def test_restarts_without_a_later_checkpoint_are_used_up(faulty: Path, tmp_path: Path) -> None:
    short = ["run.max_restarts=1", "checkpoint.every_steps=null"]
    ended = train(faulty, *short, env=fails("exit", [10, 20], tmp_path))
    assert ended.code == 1, ended.err
    run = tmp_path / "run"
    assert ended.told[-1] == "lockstep: error: restarted 1 times without a later checkpoint; giving up"
    assert "rank 1 ended with exit code 3 in forward at step" in ended.told[0]
    assert [attempt["resumed_from"] for attempt in attempts(run)] == [None, None]
    died = read_json(run / "post-mortem.json")
    assert (died["cause"], died["exit_code"], died["restarts"], len(died["earlier"])) == ("exit", 3, 1, 1)
    assert read_json(run / "outcome.json")["exit_code"] == 1


@pytest.mark.long
@pytest.mark.parametrize("how", ["SIGTERM", "stop file"])
def test_a_request_to_stop_while_waiting_to_start_again(how: str, faulty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = fails("kill", [30, 40], tmp_path)
    arguments = ["run.directory=run", "run.restart_backoff_seconds=3600", "checkpoint.every_steps=null", "--workers", 2]
    with started(LOCKSTEP, "train", faulty, *arguments, cwd=tmp_path, env=env) as process:
        wait_until(lambda: _died(run, times=2), "the second death")
        wait_until(lambda: not workers_of(process.pid), "the end of all workers")
        if how == "stop file":
            (run / "stop").touch()
        else:
            process.send_signal(signal.Signals[how])
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, err
    assert err.splitlines()[-1] == "lockstep: stopped on request before another attempt; what was saved last is intact"
    assert read_json(run / "outcome.json")["exit_code"] == 75


def _died(run: Path, times: int) -> bool:
    path = run / "post-mortem.json"
    return path.exists() and len(read_json(path)["earlier"]) == times - 1


@pytest.mark.long
def test_a_fork_that_dies_before_it_saved_begins_from_its_origin_again(
    faulty: Path, recipe: Path, tmp_path: Path
) -> None:
    env = fails("kill", [10**6, 4], tmp_path)
    train(faulty, "run.steps=5", env=env).succeeded()
    (tmp_path / "tried").write_text("x")
    origin = tmp_path / "run" / "checkpoints" / "step-00000005"
    arguments = [
        "train", faulty, "run.directory=fork", "run.steps=12", "--resume", origin, "--allow-change", "--workers", 2,
    ]  # fmt: skip
    lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    assert [attempt["resumed_from"] for attempt in attempts(tmp_path / "fork")] == [str(origin)] * 2
    assert checkpoints(tmp_path / "fork")[-1] == "step-00000012"


@pytest.mark.long
def test_a_run_without_a_directory_of_its_own_goes_on_in_the_one_it_was_given(faulty: Path, tmp_path: Path) -> None:
    env = fails("kill", [30], tmp_path)
    lockstep("train", faulty, "--workers", 2, cwd=tmp_path, env=env).succeeded()
    [run] = (tmp_path / "runs").iterdir()
    assert len(attempts(run)) == 2


@pytest.mark.long
def test_a_supervisor_that_is_killed_takes_a_stuck_rank_along(faulty: Path, tmp_path: Path) -> None:
    env = fails("hang", [30], tmp_path)
    with started(LOCKSTEP, "train", faulty, "run.directory=run", "--workers", 2, cwd=tmp_path, env=env) as process:
        wait_until((tmp_path / "hangs").exists, "the hang")
        workers = workers_of(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_running, workers)), "the end of both, also of the one that cannot act")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_ctrl_c_asks_first_and_then_ends_at_once_even_a_stuck_rank(faulty: Path, tmp_path: Path) -> None:
    env = fails("hang", [30], tmp_path)
    with started(LOCKSTEP, "train", faulty, "run.directory=run", "--workers", 2, cwd=tmp_path, env=env) as process:
        wait_until((tmp_path / "hangs").exists, "the hang")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: (tmp_path / "asked").stat().st_size > 0, "word of the first at the stuck rank")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    run = tmp_path / "run"
    assert len(attempts(run)) == 1
    reason = "interrupted twice: ended at once; what was saved last is intact"
    assert err.splitlines()[-1] == f"lockstep: {reason}"
    outcome = read_json(run / "outcome.json")
    assert (outcome["exit_code"], outcome["reason"], outcome["attempt"]) == (1, reason, 1)


def test_a_worker_that_another_launcher_started_says_itself_of_what_it_died(
    warm: WarmProcess, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = recipe_values()
    values["model"] = {"kind": "own_package.models_of_mine:build_broken"}
    recipe = write_recipe(tmp_path / "broken.yaml", values)
    env = clean_environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    assert warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=env).code == 1
    died = read_json(tmp_path / "run" / "post-mortem.json")
    assert (died["rank"], died["cause"], died["phase"], died["step"]) == (0, "exception", "start", 0)
    assert died["exception"]["type"] == "AttributeError"
    assert died["exception"]["frames"][-1].endswith("in forward")
    assert died["last_metrics"] is None
