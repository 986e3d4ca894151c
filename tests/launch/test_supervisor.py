"""The supervisor's judgements: exit codes, restarts, causes. Its dealings with live workers are in
tests/end_to_end/test_supervision.py."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distrib.phases import Moment, Phase
from launch.hangs import Hang, HangWatch, Limits, find_cause, find_missed, waits_for_others
from launch.heartbeats import Beat, Board, Heartbeat, LastWord
from launch.post_mortem import read_post_mortem, write_post_mortem
from launch.recipe import load_recipe
from launch.restarts import Again, Death, GiveUp, Restarts
from launch.run_directory import decide_resume
from launch.stop_signals import StopSignals
from launch.supervised import STACKS_SIGNAL
from launch.supervisor import _find_death, _run_exit_code, default_workers
from launch.worker_group import AttemptEnd, Worker, ask_for_stacks


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], 0),
        ([0, 0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([78, 1], 78),
        ([1, 78], 78),
        ([2, 2], 2),
        ([1, 2, 1], 2),
        ([0, 1], 1),
        ([75, 1], 1),
        ([-signal.SIGKILL, 1], 1),
        ([-signal.SIGKILL, -signal.SIGKILL], 1),
        ([78, -signal.SIGKILL], 78),
        ([75, -signal.SIGSEGV], 1),
        ([0, 3], 1),
    ],
)
def test_the_most_telling_code_is_the_runs(codes: list[int], expected: int) -> None:
    assert _run_exit_code(codes) == expected


def test_a_cpu_gets_at_most_two_workers() -> None:
    assert default_workers("cpu") in (1, 2)


def death(step: int, cause: str = "signal", name: str = "SIGKILL") -> Death:
    return Death(1, "forward", step, cause, name, "")  # type: ignore[arg-type]


def test_the_first_restart_is_immediate_and_the_wait_then_doubles_up_to_a_minute() -> None:
    restarts = Restarts(9, 1.0, None)
    waits = [restarts.after(death(step), None) for step in range(9)]
    assert waits == [Again(n + 1, seconds) for n, seconds in enumerate([0, 1, 2, 4, 8, 16, 32, 60, 60])]
    assert restarts.after(death(9), None) == GiveUp(None)


def test_a_later_checkpoint_gives_the_whole_budget_back() -> None:
    restarts = Restarts(2, 1.0, 100)
    assert restarts.after(death(101), 100) == Again(1, 0.0)
    assert restarts.after(death(102), 100) == Again(2, 1.0)
    assert restarts.after(death(111), 110) == Again(1, 0.0)
    assert restarts.after(death(112), 110) == Again(2, 1.0)
    assert restarts.after(death(113), 110) == GiveUp(None)


@pytest.mark.parametrize(("cause", "times"), [("exception", 2), ("ended", 3), ("signal", 3), ("hang", 3), ("exit", 3)])
def test_a_death_that_repeats_at_one_step_ends_the_run_even_where_checkpoints_are_published(
    cause: str, times: int
) -> None:
    restarts = Restarts(20, 1.0, None)
    for before in range(1, times):
        assert restarts.after(death(7, cause), before) == Again(1, 0.0)
    assert restarts.after(death(7, cause), times) == GiveUp(times)


def test_deaths_of_another_kind_or_step_in_between_are_no_repetition() -> None:
    restarts = Restarts(20, 0.0, None)
    others = [
        death(7, "exception", "A"),
        death(7, "exception", "B"),
        death(8, "exception", "B"),
        death(7, "signal", "B"),
    ]
    for one in others * 2:
        assert isinstance(restarts.after(one, None), Again)


def test_what_others_do_not_give_may_last() -> None:
    restarts = Restarts(20, 0.0, None)
    assert all(isinstance(restarts.after(death(0, "unavailable"), None), Again) for _ in range(20))


def test_without_restarts_a_run_ends_as_it_died() -> None:
    assert Restarts(0, 1.0, None).after(death(7, "exception"), None) == GiveUp(None)


def ended(rank: int, code: int, last_word: LastWord) -> Worker:
    process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])
    process.wait()
    return Worker(rank, process, -1, last_word=last_word)


def test_who_only_lost_another_is_not_the_cause_whoever_was_noticed_first() -> None:
    """Where both have ended between two looks of the supervisor, they are noted by rank."""
    lost, cause = ended(0, 1, "lost contact"), ended(1, 3, "nothing")
    beats = [Beat("backward", 7, 30, 30), Beat("forward", 7, 29, 29)]
    for failed in ([lost, cause], [cause, lost]):
        death, worker = _find_death(AttemptEnd([lost, cause], failed, beats, None), None)
        assert (worker, death.rank, death.cause, death.name, death.phase) == (cause, 1, "exit", "3", "forward")
    death, _ = _find_death(AttemptEnd([lost, cause], [lost], beats, None), None)
    assert death.rank == 0


def test_stacks_are_taken_once_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that writes them may have to stand still in the middle of that."""
    memory = os.memfd_create("stacks")
    pieces = {3: b"the threads", 6: b", and the main one", 9: b", which is the last"}
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        os.write(memory, pieces.get(len(looks), b""))

    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with monkeypatch.context() as hand:
        hand.setattr("time.sleep", look)
        found = ask_for_stacks([Worker(1, process, memory)])
    assert process.wait() == -STACKS_SIGNAL
    assert found == ([], {1: b"".join(pieces.values()).decode()})
    os.close(memory)


class Ranks:
    """Ranks on a board, and the watch over them, whose clock is advanced by hand."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.board = Board(count)
        self.hearts = [Heartbeat(self.board.descriptor, rank) for rank in range(count)]
        self.watch = HangWatch(self.board, limits)

    def enter(self, rank: int, *phases: Phase, step: int = 5, saving: bool = False) -> None:
        for phase in phases:
            self.hearts[rank](Moment(phase, step, saving))

    def after(self, seconds: int) -> Hang | None:
        """What the watch says at the first look at which it says something, within so many seconds."""
        looks = (self.watch.look(1.0, range(len(self.hearts))) for _ in range(seconds))
        return next((hang for hang in looks if hang is not None), None)


def a_step(*phases: Phase) -> tuple[Phase, ...]:
    return ("data", "forward", "backward", "reduce", "step", "report", *phases)


@pytest.fixture
def two() -> Ranks:
    ranks = Ranks(2, Limits(floor_seconds=10, unknown_seconds=100, data_is_near=True, compiles=False))
    for rank in range(2):
        ranks.enter(rank, *a_step())
    ranks.watch.look(1.0, range(2))
    return ranks


def test_a_board_tells_what_the_workers_say(tmp_path: Path) -> None:
    board = Board(3)
    assert board.beat(2) == ("start", 0, 0, 0)
    assert board.beat(2, saving=True).phase == "idle"
    assert board.run_directory is None
    heart = Heartbeat(board.descriptor, 2)
    heart.name_run(tmp_path / "a run")
    heart(Moment("forward", 12, False))
    heart(Moment("save.write", 10, True))
    heart(Moment("backward", 12, False))
    assert board.run_directory == tmp_path / "a run"
    assert board.beat(2) == ("backward", 12, 2, 2)
    assert board.beat(2, saving=True) == ("save.write", 10, 1, 0)
    assert board.beat(1) == ("start", 0, 0, 0)
    assert board.longest_seconds("forward") is not None
    assert board.longest_seconds("backward") is None
    assert [board.last_word(rank) for rank in range(3)] == ["nothing"] * 3
    heart.say_last("came to its end")
    assert [board.last_word(rank) for rank in range(3)] == ["nothing", "nothing", "came to its end"]
    board.close()


def test_the_longest_of_a_phase_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    board = Board(1)
    heart = Heartbeat(board.descriptor, 0)
    heart(Moment("forward", 0, False))
    clock[0] += 50.0  # it compiles
    heart(Moment("data", 0, False))
    assert board.longest_seconds("forward") == 50.0
    for _ in range(200):
        heart(Moment("forward", 0, False))
        clock[0] += 2.0
        heart(Moment("data", 0, False))
    assert board.longest_seconds("forward") == 2.0


def test_a_rank_that_waits_is_not_hung_while_the_other_may_still_take_its_time(two: Ranks) -> None:
    two.watch = HangWatch(two.board, Limits(10, 100, data_is_near=False, compiles=False))
    two.enter(0, "data", "forward", "backward")
    two.enter(1, "data")
    assert two.after(100) is None
    assert two.after(2) == Hang((1,), "data", False, 101.0)


def test_the_rank_that_is_behind_is_judged_by_its_own_phase(two: Ranks) -> None:
    two.enter(0, "data", "forward", "backward")
    two.enter(1, "data", "forward")
    assert two.after(20) == Hang((1,), "forward", False, 11.0)


def test_a_rank_whose_model_is_compiled_may_compile_it_anew_at_any_step(two: Ranks) -> None:
    """For a micro-batch of another size, though it has gone through the phase before."""
    two.watch = HangWatch(two.board, Limits(10, 100, data_is_near=True, compiles=True))
    two.enter(0, "data", "forward", "backward", "reduce")
    two.enter(1, "data", "forward")
    assert two.after(100) is None
    assert two.after(2) == Hang((1,), "forward", False, 101.0)
    two.enter(1, "backward", "reduce")
    assert two.after(20) == Hang((0, 1), "reduce", False, 11.0)


def test_ranks_that_are_equally_far_hang_once_the_last_to_come_there_has_waited_too_long(two: Ranks) -> None:
    two.enter(0, "data", "forward", "backward")
    two.enter(1, "data", "forward")
    assert two.after(8) is None
    two.enter(1, "backward")
    assert two.after(10) is None
    assert two.after(3) == Hang((0, 1), "backward", False, 11.0)


def test_a_rank_that_has_more_to_do_in_a_save_is_not_taken_for_further(two: Ranks) -> None:
    """Where training saves itself, rank 0 writes the manifest while the others are in the same phase all the time."""
    two.enter(0, "save", "save.write", "save.manifest", "save.rename", "save", "data", "forward")
    two.enter(1, "save", "save.write", "save", "data", "forward", "backward")
    assert two.after(20) == Hang((0,), "forward", False, 11.0)


def test_a_pause_of_the_supervisor_itself_is_not_held_against_workers(two: Ranks) -> None:
    assert two.watch.look(3600.0, range(2)) is None


def test_a_saving_thread_that_does_not_move_is_found(two: Ranks) -> None:
    two.enter(0, "save.write", "save.manifest", "save.rename", "idle", saving=True)
    two.enter(1, "save.write", "idle", saving=True)
    two.enter(1, "save.write", saving=True)
    for _ in range(100):
        for rank in range(2):
            two.enter(rank, *a_step())
        assert two.after(1) is None
    for rank in range(2):
        two.enter(rank, *a_step())
    assert two.after(2) == Hang((1,), "save.write", True, 101.0)


@pytest.mark.parametrize(
    ("phase", "longest", "seconds"),
    [
        ("forward", 0.1, 30.0),
        ("forward", 20.0, 100.0),
        ("forward", None, 1800.0),
        ("data", 0.1, 30.0),
        ("save", 0.1, 300.0),
        ("evaluate", 100.0, 500.0),
        ("evaluate", None, 1800.0),
        ("load", 0.1, 1800.0),
        ("end", None, 1800.0),
    ],
)
def test_limits_are_learned_above_a_floor(phase: Phase, longest: float | None, seconds: float) -> None:
    limits = Limits.of_run(load_recipe("gpt-stdlib"))
    assert limits is not None
    assert limits.seconds(phase, longest) == seconds


def test_data_that_is_fetched_may_take_longer_and_null_means_for_ever(tmp_path: Path) -> None:
    far = Limits.of_run(load_recipe("gpt-stdlib", ["data.directory=s3://bucket/place"]))
    assert far is not None
    assert far.seconds("data", 0.1) == 300.0
    assert Limits.of_run(load_recipe("gpt-stdlib", ["run.hang_timeout_seconds=null"])) is None


def stacks(*calls: str) -> str:
    """As faulthandler writes them, each thread with the file of its innermost call."""
    threads = [
        f'Thread 0x0 (most recent call first):\n  File "{file}", line 1 in f\n  File "x", line 2' for file in calls
    ]
    return "\n\n".join(threads)


WAITING = stacks("/usr/queue.py", "/v/site-packages/torch/distributed/distributed_c10d.py")
WORKING = stacks("/usr/queue.py", "/home/me/models.py")


def test_the_cause_is_who_is_stopped_then_who_is_silent_then_who_does_not_wait() -> None:
    hang = Hang((0, 1), "backward", False, 30.0)
    assert waits_for_others(WAITING, main_thread=True)
    assert not waits_for_others(WORKING, main_thread=True)
    assert find_cause(hang, [2], {0: WAITING, 1: WORKING}) == (2, "its process is stopped")
    assert find_cause(hang, [], {0: WAITING}) == (1, "its process does not answer")
    assert find_cause(hang, [], {0: WAITING, 1: WORKING}) == (1, "it does not move")
    assert find_cause(hang, [], {0: WORKING, 1: WAITING}) == (0, "it does not move")
    assert find_cause(hang, [], {0: WAITING, 1: WAITING}) == (0, "the ranks wait for each other")
    assert find_cause(hang._replace(ranks=(1,)), [], {0: WAITING, 1: WAITING}) == (1, "it does not move")


def test_who_was_missed_is_stopped_or_silent_or_not_ahead_and_not_in_a_collective() -> None:
    behind, level, ahead = (Beat("load", 0, common, common) for common in (2, 3, 4))
    answers = {1: WORKING, 2: WORKING}
    assert find_missed([level, level, level], [0], [1, 2], [2], answers) == (2, "its process is stopped")
    assert find_missed([level, level, level], [0], [1, 2], [], {1: WORKING}) == (2, "its process does not answer")
    assert find_missed([level, level, behind], [0], [1, 2], [], answers) == (2, "it does not move")
    assert find_missed([level, level, behind], [0], [1, 2], [], {1: WORKING, 2: WAITING}) == (1, "it does not move")
    assert find_missed([level, ahead, behind], [0], [1, 2], [], {1: WORKING, 2: WAITING}) is None
    reads_ahead = level._replace(phase="data")
    waits_elsewhere = stacks("/v/site-packages/torch/distributed/distributed_c10d.py", "/usr/queue.py")
    assert find_missed([level, level], [0], [1], [], {1: waits_elsewhere}) == (1, "it does not move")
    assert find_missed([level, reads_ahead], [0], [1], [], {1: waits_elsewhere}) is None


def test_only_where_data_or_a_save_is_late_does_it_count_that_another_thread_waits() -> None:
    """A thread that reads ahead may be in a collective at any time, or on its way out of one."""
    reads_ahead = stacks("/v/site-packages/torch/distributed/distributed_c10d.py", "/usr/queue.py")
    seen = {0: reads_ahead, 1: WORKING}
    assert find_cause(Hang((0, 1), "data", False, 30.0), [], seen) == (1, "it does not move")
    assert find_cause(Hang((0, 1), "save.write", True, 30.0), [], seen) == (1, "it does not move")
    assert find_cause(Hang((0, 1), "forward", False, 30.0), [], seen) == (0, "it does not move")


def test_real_stacks_are_read_as_faulthandler_writes_them() -> None:
    program = """
import datetime, faulthandler, os, sys, threading
import torch.distributed as dist
from torch.distributed import distributed_c10d

def dump(main=threading.get_ident()):
    while sys._current_frames()[main].f_code.co_filename != distributed_c10d.__file__:
        pass
    faulthandler.dump_traceback(sys.stdout, all_threads=True)
    sys.stdout.flush()
    os._exit(0)

threading.Thread(target=dump).start()
distributed_c10d._store_based_barrier(0, dist.HashStore(), "x", 2, datetime.timedelta(seconds=60))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert waits_for_others(done.stdout, main_thread=True), done.stdout


def test_a_signal_is_only_noted_and_wakes_who_waits() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as signals, selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        assert not signals.take()
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            assert selector.select(60.0)
            assert signals.take()
            assert not signals.take()
            assert signals.interrupts == count
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.wait(60.0)
        assert signals.take()
        assert (signals.asked, signals.interrupts) == (True, 2)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_earlier_deaths_are_kept_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 2.5}\n{"step": 7, "loss": 2.25}\n{"step": 8, "lo')
    for attempt in (1, 2, 3):
        write_post_mortem(
            tmp_path, attempt=attempt, rank=1, phase="data", step=7, cause="hang", reason="why", exit_code=None, pid=1
        )
    last = read_post_mortem(tmp_path)
    assert last is not None
    assert [last["attempt"], *(one["attempt"] for one in last["earlier"])] == [3, 1, 2]
    assert last["last_metrics"] == {"step": 7, "loss": 2.25}
    assert "earlier" not in last["earlier"][0]


def test_a_damaged_post_mortem_is_put_aside_and_hides_no_death(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damaged in ("{torn", "[]", '{"attempt": 1, "pid": 1}'):
        (tmp_path / "post-mortem.json").write_text(damaged)
        write_post_mortem(
            tmp_path, attempt=2, rank=1, phase="data", step=7, cause="hang", reason="why", exit_code=None, pid=1
        )
        assert capsys.readouterr().err == (
            f"lockstep: warning: {tmp_path}/post-mortem.json: not what a run writes; kept as post-mortem.json.corrupt\n"
        )
        assert (tmp_path / "post-mortem.json.corrupt").read_text() == damaged
        last = read_post_mortem(tmp_path)
        assert last is not None
        assert (last["attempt"], last["earlier"]) == (2, [])


def test_a_fork_that_saved_nothing_may_begin_again_from_its_checkpoint_and_no_other_run_may(tmp_path: Path) -> None:
    origin, fork = tmp_path / "origin", tmp_path / "fork"
    checkpoints = [origin / "checkpoints" / f"step-0000000{step}" for step in (5, 6)]
    for checkpoint in checkpoints:
        checkpoint.mkdir(parents=True)
        (checkpoint / "MANIFEST.json").touch()
    fork.mkdir()
    (fork / "run.json").write_text(json.dumps({"attempts": [{"resumed_from": str(checkpoints[0])}]}))
    config = load_recipe("gpt-stdlib", [f"run.directory={fork}"])
    assert decide_resume(config, str(checkpoints[0])).checkpoint == checkpoints[0]
    with pytest.raises(ValueError, match="holds another run"):
        decide_resume(config, str(checkpoints[1]))
    (fork / "checkpoints" / "step-00000009").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another run"):
        decide_resume(config, str(checkpoints[0]))
