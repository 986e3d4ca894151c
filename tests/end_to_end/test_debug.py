"""`lockstep train --debug`: a debugger works in it, it names what is not finite, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distrib.footprint import footprint
from launch.recipe import load_recipe
from tests.end_to_end.runs import (
    LOCKSTEP,
    TIMEOUT_SECONDS,
    Result,
    WarmProcess,
    checkpoints,
    digests,
    environment,
    losses,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """An environment in which the user's models are found, and in which temporary directories are this test's."""
    (tmp_path / "temporary").mkdir()
    folder = str(write_user_package(tmp_path / "own"))
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment(PYTHONPATH=os.pathsep.join(paths), TMPDIR=str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def own_recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe for a user's model, which a test names."""
    values = recipe_values()
    values["model"] = {"kind": "own_package.models_of_mine:build"}
    return write_recipe(tmp_path_factory.mktemp("own") / "own.yaml", values)


class Terminal:
    """A command on a terminal of its own: what a person would see, and type."""

    def __init__(self, *arguments: object, cwd: Path, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [LOCKSTEP, *map(str, arguments)],
            cwd=cwd,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""
        self._waited = 0

    def wait_for(self, text: str) -> None:
        """Reads until `text` has come after what was waited for last."""
        while (place := self.seen.find(text, self._waited)) < 0:
            assert self._read(), self.seen
        self._waited = place + len(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """What is still to be seen, and the exit code."""
        while self._read():
            pass
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def _read(self) -> bool:
        readable, _, _ = select.select([self._ours], [], [], TIMEOUT_SECONDS)
        with contextlib.suppress(OSError):  # a terminal that nobody has open any more
            content = os.read(self._ours, 65536) if readable else b""
            self.seen += content.decode()
            return bool(content)
        return False


@pytest.fixture
def terminal(own_recipe: Path, tmp_path: Path, own: dict[str, str]) -> Iterator[Terminal]:
    """A debug run of the model with a breakpoint in its forward, of one step."""
    stops = "model.kind=own_package.models_of_mine:build_stops"
    shown = Terminal("train", own_recipe, stops, "run.steps=1", "--debug", cwd=tmp_path, env=own)
    yield shown
    shown.close()


def test_a_breakpoint_in_a_user_s_model_works_on_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("(Pdb) ")
    assert list((tmp_path / "temporary").glob("lockstep-debug-*"))
    terminal.type("import os ;; p 'process', os.getpid()\n")
    terminal.wait_for(f"('process', {terminal.process.pid})")  # nobody else than what was started
    for _ in ("dry run", "first micro-batch", "second micro-batch"):
        terminal.wait_for("(Pdb) ")
        terminal.type("p 'seen', tuple(tokens.shape)\n")
        terminal.wait_for("('seen', (2, 64))")
        terminal.type("c\n")
    assert terminal.end() == 0, terminal.seen
    assert "models_of_mine.py" in terminal.seen
    assert "step 1/1  loss" in terminal.seen
    assert list((tmp_path / "temporary").glob("lockstep-debug-*")) == []


def test_a_run_ends_at_once_from_the_debugger(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("(Pdb) ")
    terminal.type("q\n")
    assert terminal.end() == 1
    assert "lockstep: error: ended from the debugger" in terminal.seen
    assert "Traceback" not in terminal.seen
    assert list((tmp_path / "temporary").glob("lockstep-debug-*")) == []


def directory_of(ended: Result) -> Path:
    """Where the run was, as it told."""
    (told,) = re.findall(r"^run (.+), attempt 1", ended.err, re.MULTILINE)
    return Path(told)


def test_five_steps_on_a_slice_of_data_and_nothing_is_left(
    warm: WarmProcess, recipe: Path, own: dict[str, str], tmp_path: Path
) -> None:
    ended = warm.lockstep("train", recipe, "--debug", cwd=tmp_path, env=own).succeeded()
    assert "debug: 5 steps in this process" in ended.err
    assert "batch.global_samples: 12 -> 4" in ended.err
    assert "first batch: 4 samples, 256 tokens, in 2 micro-batches here" in ended.err
    (field,) = (line.split() for line in ended.err.splitlines() if line.startswith("  tokens "))
    assert field[1:4] == ["(2,", "65)", "uint16"]
    assert [line.split()[1] for line in ended.err.splitlines() if line.startswith("step ")] == [
        f"{step}/5" for step in range(1, 6)
    ]
    assert "everything lies in" not in ended.err
    assert not directory_of(ended).exists()
    assert not (tmp_path / "runs").exists()


def test_the_streams_of_a_mixture_are_named(
    warm: WarmProcess, mixture: Path, own: dict[str, str], tmp_path: Path
) -> None:
    ended = warm.lockstep("train", mixture, "--debug", "run.steps=1", cwd=tmp_path, env=own).succeeded()
    told = re.findall(r"^  stream (\w+): (\d) samples, (\d+) tokens$", ended.err, re.MULTILINE)
    assert sorted(name for name, _, _ in told) == ["code", "web"]
    assert sum(int(samples) for _, samples, _ in told) == 4
    assert all(int(tokens) == 64 * int(samples) for _, samples, tokens in told)


def test_what_is_given_wins_and_a_given_directory_stays(
    warm: WarmProcess,
    recipe_values: Callable[..., dict[str, Any]],
    straight_run: Callable[..., Path],
    own: dict[str, str],
    tmp_path: Path,
) -> None:
    given = ["run.steps=3", "batch.global_samples=12", "run.directory=kept"]
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(schedule={"kind": "constant"}))
    ended = warm.lockstep("train", recipe, "--debug", *given, cwd=tmp_path, env=own).succeeded()
    assert "step 3/3" in ended.err
    assert "nothing is kept" not in ended.err
    assert digests(tmp_path / "kept") == digests(straight_run(2))[:3]
    assert checkpoints(tmp_path / "kept") == ["step-00000003"]
    assert json.loads((tmp_path / "kept" / "outcome.json").read_text())["exit_code"] == 0


def test_a_run_is_debugged_from_its_checkpoint_and_left_as_it_is(
    warm: WarmProcess, recipe: Path, straight_run: Callable[..., Path], own: dict[str, str], tmp_path: Path
) -> None:
    """The very steps that the run took after it: the same samples, at the same learning rate."""
    run = straight_run(1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    earlier = run / "checkpoints" / checkpoints(run)[0]
    arguments = ["train", recipe, "--debug", "--resume"]
    ended = warm.lockstep(*arguments, earlier, "run.directory=again", cwd=tmp_path, env=own).succeeded()
    assert f"debug: 5 steps after {earlier} in this process" in ended.err
    again = tmp_path / "again"
    step = int(earlier.name.removeprefix("step-"))
    assert losses(again) == losses(run)[step : step + 5]
    assert digests(again) == digests(run)[step : step + 5]
    # A run's own directory: its newest checkpoint, which is its last step here.
    warm.lockstep(*arguments, run, "run.steps=41", "--allow-change", cwd=tmp_path, env=own).succeeded()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_module_whose_output_is_not_finite_is_named(
    warm: WarmProcess, own_recipe: Path, own: dict[str, str], tmp_path: Path
) -> None:
    overflows = "model.kind=own_package.models_of_mine:build_overflows"
    ended = warm.lockstep("train", own_recipe, overflows, "--debug", cwd=tmp_path, env=own)
    ended.failed_with(
        78,
        "step 3, forward: the first tensor that is not finite is output of middle.1 (Divide): shape (2, 64, 16), float32",
        "of 2,048 values not finite",
        "its inputs and parameters are finite",
    )
    assert "step 1/5" in ended.err
    assert not directory_of(ended).exists()


def test_the_parameter_whose_gradient_is_not_finite_is_named(
    warm: WarmProcess, own_recipe: Path, own: dict[str, str], tmp_path: Path
) -> None:
    root = "model.kind=own_package.models_of_mine:build_root_of_zero"
    ended = warm.lockstep("train", own_recipe, root, "--debug", cwd=tmp_path, env=own)
    ended.failed_with(
        78,
        "step 1, backward: the first gradient that is not finite is that of embedding.weight",
        "made by SqrtBackward0, whose forward is ",
        "models_of_mine.py:",
        "(return self.output(x + (x - x.detach()).sqrt()))",
    )


def test_a_run_that_is_done_leaves_nothing_to_look_into(
    warm: WarmProcess, recipe: Path, straight_run: Callable[[int], Path], tmp_path: Path
) -> None:
    ended = warm.lockstep("train", recipe, "--debug", "--resume", straight_run(1), cwd=tmp_path)
    ended.failed_with(2, "has done all 40 steps", "raise run.steps")


def test_a_launcher_s_worker_is_refused(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    env = environment(RANK="0", WORLD_SIZE="2")
    ended = warm.lockstep("train", recipe, "--debug", cwd=tmp_path, env=env)
    ended.failed_with(2, "whoever set WORLD_SIZE has started 2 of it")


def table(out: str, first: str) -> list[tuple[str, list[str]]]:
    """Rows of the table whose head begins with `first`: the first cell and the words of the others."""
    lines = out[out.index(f"\n{first}  ") :].strip().split("\n\n")[0].splitlines()[1:]
    return [(line.split("  ")[0], line.split("  ", 1)[1].split()) for line in lines]


@pytest.mark.parametrize("layout", [["parallel.zero_stage=0"], ["parallel.zero_stage=3", "parallel.replicas=2"]])
def test_a_rank_of_a_fake_world_is_what_the_formulas_say(
    layout: list[str], warm: WarmProcess, recipe: Path, tmp_path: Path
) -> None:
    arguments = ["train", recipe, *layout, "batch.global_samples=32", "--debug", "--fake-world", 8, "--fake-rank", 5]
    shown = warm.lockstep(*arguments, cwd=tmp_path).succeeded().out
    assert "rank 5 of 8, alone on cpu: native engine" in shown
    assert "losses, gradients and weights mean nothing" in shown
    assert "first batch: 32 samples, 2,048 tokens, in 2 micro-batches here" in shown
    modules = dict(table(shown, "module"))
    assert modules["layers.0"][0] == "Block"
    assert "".join(modules["layers.0"][-3:]) == "(2,64,32)"
    config = load_recipe(str(recipe), layout)
    elements = int(modules["all"][1].replace(",", ""))
    stated = footprint(config.parallel, config.optimizer, parameter_sizes=[elements], world_size=8, micro_batches=2)
    memory = {name: int(cells[0].replace(",", "")) for name, cells in table(shown, "memory of this rank")}
    assert memory["gradients, at the update"] == pytest.approx(stated.gradients, rel=0.03)
    assert memory["optimizer state"] == pytest.approx(stated.optimizer, rel=0.03)
    assert memory["peak of a step, all tensors"] > sum(memory.values()) - memory["peak of a step, all tensors"]
    sent = {name: [] for name in stated.traffic}
    for name, (ranks, dtype, calls, size) in table(shown, "collective"):
        if dtype == "float32" and len(size) > 3:  # the others are counts, norms and flags
            sent[name].append((int(ranks), int(size.replace(",", ""))))
            assert int(calls) > 0
    hybrid = len(layout) > 1
    group_sizes = {"allgather": 4, "reduce_scatter": 4, "allreduce": 2 if hybrid else 8}
    for name, size in stated.traffic.items():
        assert sent[name] == [(group_sizes[name], pytest.approx(size, rel=0.03))]
    assert not (tmp_path / "runs").exists()


def test_a_rank_of_a_fake_world_may_have_no_samples(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe, "batch.global_samples=2", "--debug", "--fake-world", 4, "--fake-rank"]
    for rank in range(4):
        shown = warm.lockstep(*arguments, rank, cwd=tmp_path).succeeded().out
        assert "peak of a step" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--fake-world", 4], "--fake-world 4: needs --debug"),
        (["--debug", "--fake-rank", 1], "--fake-rank 1: needs --debug --fake-world N"),
        (["--debug", "--fake-world", 1], "--fake-world 1: must be at least 2"),
        (["--debug", "--fake-world", 4, "--fake-rank", 4], "--fake-rank 4: must be one of the ranks"),
        (["--debug", "--fake-world", 4, "--resume", "auto"], "--resume auto: has no effect with --fake-world"),
        (["--debug", "--fake-world", 4, "parallel.engine=deepspeed"], "--fake-world needs parallel.engine=native"),
        (["--debug", "--fake-world", 4, "parallel.engine=accelerate"], "--fake-world needs parallel.engine=native"),
        (["--debug", "--fake-world", 4, "parallel.zero_stage=1", "parallel.replicas=3"], "does not divide the 4"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_refused_in_a_line(
    arguments: list[object], part: str, warm: WarmProcess, recipe: Path, tmp_path: Path
) -> None:
    warm.lockstep("train", recipe, *arguments, cwd=tmp_path).failed_with(2, part)
    assert list(tmp_path.iterdir()) == []
