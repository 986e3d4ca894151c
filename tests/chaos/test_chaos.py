"""Faults on purpose, in every phase of a run: it ends as each of them says, and leaves nothing behind.

`make chaos SEEDS=100` draws as many more, see campaign.py.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.tracking.metrics_file import read_metrics
from tests.chaos.harness import CaseSite, Ground, Told, run_case
from tests.chaos.launching import Launcher, WarmLauncher
from tests.chaos.plan import STEPS, Case, Happening, make_case
from tests.end_to_end.runs import checkpoints

# What must have been said where a fault has come about: without it, it did not bite.
EVIDENCE = {
    "no room for a checkpoint, for a while": "not saved: ",
    "files limited in size, for a while": "no room for a checkpoint (File too large)",
    "no room for a checkpoint": "make room (earlier checkpoints are intact)",
    "no room at all": "No space left on device",
    "flipped bit in the newest checkpoint": "passed over a checkpoint: ",
    "flipped bit in a local shard": "was altered",
    "flipped bit in the cache of a remote dataset": "altered in the cache; fetching it again",
    "deleted shard": "missing",
    "read-only disk": "a checkpoint could not be written (Read-only file system)",
    "SIGSTOP of a rank": " hung in ",
    "hung tracker": "W&B: did not finish in time",
}
KILLS = ("SIGKILL of a rank", "SIGKILL of the launcher", "SIGKILL of launcher and ranks")
SHORT = [
    ("SIGKILL of a rank", "backward"),
    ("SIGKILL of launcher and ranks", "save.rename"),
    ("no room for a checkpoint", "data"),
    ("NaN", "forward"),
]
LONG = [
    *(("SIGKILL of a rank", phase) for phase in ("data", "forward", "reduce", "step", "save.write", "load")),
    *(("SIGKILL of a rank", phase) for phase in ("save.manifest", "save.rename", "start", "evaluate", "end")),
    *(("SIGKILL of the launcher", phase) for phase in ("forward", "save.write", "load")),
    *(("SIGKILL of launcher and ranks", phase) for phase in ("step", "save.write", "save.manifest", "load")),
    *(("SIGTERM to a rank", phase) for phase in ("forward", "save.write", "load")),
    *(("USR1 to a rank", phase) for phase in ("data", "save.manifest", "start")),
    *(("SIGSTOP of a rank, then SIGCONT", phase) for phase in ("backward", "save.write", "load")),
    *(("no room for a checkpoint, for a while", phase) for phase in ("save.write", "save.manifest")),
    *(("SIGSTOP of a rank", phase) for phase in ("backward", "save.write")),
    ("files limited in size, for a while", None),
    *(("no room for a checkpoint", phase) for phase in ("step", "save.write")),
    ("no room at all", "reduce"),
    *(("flipped bit in the newest checkpoint", phase) for phase in ("data", "save.manifest")),
    ("flipped bit in a local shard", "backward"),
    ("flipped bit in the cache of a remote dataset", "data"),
    ("deleted shard", "data"),
    ("read-only disk", "forward"),
    ("clock that jumps", "step"),
    *(("NaN", phase) for phase in ("backward", "reduce")),
    ("hung tracker", "step"),
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    launcher = WarmLauncher()
    yield Ground(tmp_path_factory.mktemp("ground"), launcher)
    launcher.close()


def run_drawn(ground: Ground, directory: Path, fault: str, phase: str | None) -> Told:
    case = make_case(fault, random.Random(f"{fault} {phase}"), directory, phase)
    told = run_case(ground, directory, case)
    assert told.happened
    assert EVIDENCE.get(fault, "") in told.said
    assert told.restarts >= (fault in KILLS and phase != "end")
    return told


@pytest.mark.parametrize(("fault", "phase"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)])
def test_a_run_ends_as_its_fault_says(ground: Ground, tmp_path: Path, fault: str, phase: str | None) -> None:
    run_drawn(ground, tmp_path / "case", fault, phase)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "phase"), [("SIGKILL of a rank", "save.write"), ("SIGKILL of launcher and ranks", "step")]
)
def test_processes_that_begin_as_a_person_would_begin_them(tmp_path: Path, fault: str, phase: str) -> None:
    """Not forked from one that has imported all they need."""
    launcher = Launcher()
    cold = Ground(tmp_path / "ground", launcher)
    try:
        run_drawn(cold, tmp_path / "case", fault, phase)
    finally:
        launcher.close()


@pytest.mark.long
def test_a_skipped_step_leaves_weights_and_optimizer_alone(ground: Ground, tmp_path: Path) -> None:
    """Of two checkpoints, of the steps before and after it, all that is trained is the same, byte by byte."""
    poisoned = Happening("backward", STEPS - 1, 1, [("poison", {})])
    site = CaseSite(ground, tmp_path / "case", Case("NaN", (poisoned,), "skipped"))
    with site.ready():
        assert site.launch("checkpoint.every_steps=1") == 0, site.said()
    before, after = (site.run / "checkpoints" / name for name in checkpoints(site.run)[-2:])
    assert after.name == f"step-{STEPS:08d}"
    assert [record["step"] for record in read_metrics(site.run)[0] if record["skipped"]] == [STEPS]
    for path in before.glob("*.safetensors"):
        assert path.read_bytes() == (after / path.name).read_bytes(), path.name


# --- that the harness would notice ----------------------------------------------------------------------------


def test_another_result_is_noticed(ground: Ground, tmp_path: Path) -> None:
    poisoned = Happening("forward", 2, 0, [("poison", {})])
    with pytest.raises(AssertionError, match="skipped"):
        run_case(ground, tmp_path / "case", Case("declared harmless", (poisoned,), "identical"))


def test_a_request_to_stop_that_kills_is_noticed(ground: Ground, tmp_path: Path) -> None:
    """The next start makes it good, to the same bytes."""
    killed = Happening("forward", 5, 1, [("send", {"number": int(signal.SIGKILL)})])
    with pytest.raises(AssertionError, match="exit code 1 of what was asked to stop"):
        run_case(ground, tmp_path / "case", Case("SIGTERM to a rank", (killed,), "identical"))


def test_what_is_left_behind_is_noticed(ground: Ground, tmp_path: Path) -> None:
    file = tmp_path / "case" / "temporary" / "forgotten"
    left = Happening("forward", 1, 0, [("leave_behind", {"file": str(file)})])
    with pytest.raises(AssertionError, match="the end of all processes"):
        run_case(ground, tmp_path / "case", Case("left", (left,), "identical"), patience_seconds=0.2)
    assert ground.launcher.processes() == []


def test_a_fault_that_does_not_heal_is_noticed(ground: Ground, tmp_path: Path) -> None:
    """A checkpoint that nobody can publish, where every save after it was promised."""
    directory = tmp_path / "case"
    case = make_case("no room for a checkpoint", random.Random(1), directory, "data")
    assert case.outcome != "identical"
    with pytest.raises(AssertionError, match="exit code 78 instead of 0"):
        run_case(ground, directory, Case(case.fault, case.happenings, "identical", small_disk="checkpoints"))
