"""`lockstep submit` and `lockstep jobs` where there is no cluster: what is rendered, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.own_code import find_own_code
from launch.recipe import SHIPPED_RECIPES, load_recipe, parse_yaml
from launch.submit import share_of_batch
from launch.submit_options import refuse_owned_options
from launch.submit_script import TEMPLATES, fill_in, format_duration, parse_time, setting_of
from launch.submit_snapshot import take_snapshot
from launch.submit_sweep import make_rows, split_values
from launch.submitted import last_jobs, remember
from tests.end_to_end.runs import write_recipe

GOLDEN = Path(__file__).parent / "golden"
CPUS = ("--gpus-per-node", "0", "--time", "10")
CASES = {
    "train": (
        "lenet-digits", "--nodes", "2-4", "--gpus-per-node", "h100:8", "--cpus-per-node", "64", "--time", "12:00:00",
        "--partition", "gpu", "--account", "physics", "--after", "12", "--sbatch=--exclude=node[7-8]", "--again", "chain",
        "--launcher", "torchrun", "optimizer.lr=1e-3",
    ),
    "sweep": (
        "lenet-digits", *CPUS, "--workers-per-node", "2", "--sweep", "optimizer.lr=1e-4,3e-4", "--at-once", "1",
        "--sweep", "optimizer.betas=[0.9,0.95],[0.9,0.99]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_the_job_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", "/venv")
    assert main(["submit", *CASES[case], "--dry-run"]) == 0
    text = capsys.readouterr().out.replace(str(tmp_path), "/here")
    golden = GOLDEN / f"{case}.txt"
    assert text == golden.read_text(), f"if it is meant to be so, write it to {golden}"
    assert list(tmp_path.iterdir()) == []
    script = text.partition(f"{case}.sbatch:\n")[2]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("no-such-recipe", *CPUS), ("no-such-recipe", "unknown")),
        (("lenet-digits", *CPUS, "optimizer.speed=1"), ("optimizer.speed", "unknown key")),
        (("lenet-digits", *CPUS, "--nodes", "4-2"), ("--nodes 4-2",)),
        (("lenet-digits", *CPUS, "--nodes", "0"), ("--nodes 0",)),
        (("lenet-digits", "--gpus-per-node", "many", "--time", "10"), ("--gpus-per-node many",)),
        (("lenet-digits", "--gpus-per-node", "0", "--time", "12h"), ("--time 12h", "12:00:00")),
        (("lenet-digits", "--gpus-per-node", "0", "--time", "0:30"), ("--time 0:30", "30 seconds")),
        (("lenet-digits", *CPUS, "--warn-seconds", "600"), ("--warn-seconds 600", "less than --time 10")),
        (("lenet-digits", *CPUS, "--workers-per-node", "0"), ("--workers-per-node 0",)),
        (
            ("lenet-digits", "--gpus-per-node", "8", "--workers-per-node", "4", "--time", "10"),
            ("--workers-per-node 4",),
        ),
        (
            ("lenet-digits", *CPUS, "--workers-per-node", "2", "--cpus-per-node", "3"),
            ("--cpus-per-node 3", "2 workers"),
        ),
        (("lenet-digits", *CPUS, "run.device=cuda"), ("run.device=cuda",)),
        (
            ("lenet-digits", *CPUS, "--nodes", "2-3", "parallel.zero_stage=2", "parallel.replicas=2"),
            ("does not divide",),
        ),
        (("lenet-digits", *CPUS, "--after", "yesterday"), ("--after yesterday",)),
        (("lenet-digits", *CPUS, "--sbatch=--nodes=4"), ("--sbatch=--nodes=4", "use --nodes")),
        (("lenet-digits", *CPUS, "--sbatch=--exclude=n3 --tim=5"), ("--time is for", "use --time")),
        (("lenet-digits", *CPUS, "--sbatch=-HN2"), ("--sbatch=-HN2", "use --nodes")),
        (("lenet-digits", *CPUS, "--sbatch=-d afterok:1"), ("use --after",)),
        (("lenet-digits", *CPUS, "--sbatch=--ntasks-per-node=2"), ("use --workers-per-node",)),
        (("lenet-digits", *CPUS, "--sbatch=--gpus=2"), ("use --gpus-per-node",)),
        (("lenet-digits", *CPUS, "--sbatch=--wrap=true"), ("no place in a batch script",)),
        (("lenet-digits", *CPUS, "--sbatch=exclusive"), ("--sbatch=exclusive", "must be an option of sbatch")),
        (("lenet-digits", *CPUS, "--sbatch=--comment='a"), ("No closing quotation",)),
        (
            ("lenet-digits", *CPUS, "--sbatch=--comment=a\nrm x"),
            ("--sbatch: '--comment=a\\nrm x'", "control character"),
        ),
        (("lenet-digits", *CPUS, "--partition", "a\nb"), ("partition: 'a\\nb'", "control character")),
        (("lenet-digits", *CPUS, "run.directory=a\\b"), ("with a \\ in its name",)),
        (("lenet-digits", *CPUS, "--failures", "-1"), ("--failures -1",)),
        (("lenet-digits", *CPUS, "--at-once", "2"), ("--at-once 2", "--sweep")),
        (("lenet-digits", *CPUS, "--sweep", "optimizer.lr"), ("--sweep optimizer.lr", "section.key=A,B")),
        (("lenet-digits", *CPUS, "--sweep", "optimizer.lr=1,"), ("--sweep optimizer.lr=1,",)),
        (("lenet-digits", *CPUS, "--sweep", "optimizer.lr=1,no"), ("optimizer.lr=no",)),
        (("lenet-digits", *CPUS, "optimizer.lr=1", "--sweep", "optimizer.lr=1,2"), ("given twice",)),
        (("lenet-digits", *CPUS, "--sweep", "run.name=a,b"), ("run.name of its own",)),
        (("lenet-digits", *CPUS, "--sweep", "model.kind=lenet5,convnet", "model.kernel=5"), ("model.",)),
        (("lenet-digits", *CPUS, "run.directory=taken"), ("run.directory=taken", "already holds a run")),
        (("lenet-digits", *CPUS, "run.directory=waiting"), ("submitted before", "sbatch waiting/slurm/train.sbatch")),
        (("lenet-digits", *CPUS), ("sbatch is not on the PATH", "--dry-run")),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused_in_a_line(
    words: tuple[str, ...],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for file in (tmp_path / "taken" / "run.json", tmp_path / "waiting" / "slurm" / "submission.json"):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    assert main(["submit", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert [part for part in parts if part not in told[0]] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:15", 1815), ("12:00:00", 43200), ("2-0", 172800), ("1-2:30", 95400), ("1-2:30:05", 95405),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


def test_durations_are_told_by_their_two_largest_units() -> None:
    told = [format_duration(seconds) for seconds in (0, 59, 60, 750, 3600, 43260, 90000, 86400, 86460)]
    assert told == ["0 s", "59 s", "1 min", "12 min 30 s", "1 h", "12 h 1 min", "1 d 1 h", "1 d", "1 d"]


def test_a_batch_is_shared_as_the_stream_shares_it() -> None:
    assert share_of_batch(512, 4, 32) == "512 samples a step = 16 a rank, in 4 x at most 4 at a time"
    assert share_of_batch(10, 4, 4) == "10 samples a step = 2 or 3 a rank, in 1 x at most 3 at a time"
    assert share_of_batch(3, 4, 8) == "3 samples a step = 0 or 1 a rank, in 1 x at most 1 at a time; 5 ranks have none"


def test_values_of_a_sweep_are_split_where_they_end() -> None:
    assert split_values("1e-4,3e-4") == ["1e-4", "3e-4"]
    assert split_values("[0.9,0.95], {a: [1,2]},'a,b'") == ["[0.9,0.95]", "{a: [1,2]}", "'a,b'"]


def test_what_is_filled_in_survives_the_shell(tmp_path: Path) -> None:
    template = "#SBATCH --output=x\n##SBATCH --qos=NAME\nrecipe=old\nwords=()\n"
    strange = 'it\'s $HOME; `x` "y"'
    text = fill_in(
        template, {"output": "a b", "qos": "high"}, {"recipe": strange, "words": ["a b", strange]}, ["--hold"]
    )
    assert text.splitlines()[:3] == ["#SBATCH --output='a b'", "#SBATCH --qos=high", "#SBATCH --hold"]
    done = subprocess.run(
        ["bash", "-c", text + 'printf "%s\\n" "$recipe" "${words[@]}"'], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [strange, "a b", strange]
    assert fill_in(text, {"qos": None}, {}).splitlines()[1] == "##SBATCH --qos=high"
    with pytest.raises(AssertionError, match="0 lines match"):
        fill_in(template, {}, {"nothing": "x"})


@pytest.mark.parametrize("path", sorted(TEMPLATES.iterdir()), ids=lambda path: path.name)
def test_every_script_of_slurm_is_bash(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""


def test_a_warning_is_heard_though_it_comes_a_moment_before_the_script_waits(tmp_path: Path) -> None:
    """Beside workers that end once they are asked to."""
    script = rf"""
        lockstep={TEMPLATES.parent} SLURM_JOB_ID=7 failures=5
        source "$lockstep/slurm/run.sh"
        start_workers() {{ trap - DEBUG; until [ -e run/stop ]; do sleep 0.1; done; }}
        decide() {{ say "ended with $2"; }}
        warn() {{ case $BASH_COMMAND in wait\ * | sleep\ *) trap - DEBUG; kill -USR1 $$ ;; esac; }}
        set -o functrace
        trap warn DEBUG
        train run recipe
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert [line.partition(": ")[2] for line in done.stdout.splitlines()[1:]] == [
        "warned: the run is asked to save and stop",
        "ended with 0",
    ], done


def test_what_is_of_a_site_stands_at_the_top_of_every_template() -> None:
    for path in TEMPLATES.glob("*.sbatch"):
        text = path.read_text()
        assert [setting_of(text, name) for name in ("modules", "venv", "container", "lockstep")] == [
            "()",
            "",
            "()",
            "$PWD",
        ]
        for name in ("partition", "account", "qos"):
            assert re.search(rf"^##SBATCH --{name}=NAME$", text, re.MULTILINE)
        code = text.index('source "$lockstep')
        assert max(text.rindex("#SBATCH"), text.rindex("container=")) < code


def test_a_snapshot_holds_the_code_the_recipe_and_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package whole, with its data files; of what lies beside it what it imports, and what that imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "mine_for_snapshots"
    for path in (
        "model.py",
        "settings.json",
        "deep/table.bin",
        "__pycache__/model.pyc",
        ".git/HEAD",
        "venv/pyvenv.cfg",
    ):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text("")
    (package / "model.py").write_text("def build(shape):\n    from beside_for_snapshots import part\n    import yaml\n")
    (tmp_path / "beside_for_snapshots.py").write_text("import further_for_snapshots.part\nimport data.stream\n")
    (tmp_path / "further_for_snapshots").mkdir()
    (tmp_path / "further_for_snapshots" / "part.py").write_text("import mine_for_snapshots.model\n")
    (tmp_path / "not_named_for_snapshots.py").write_text("")
    (tmp_path / "zero.json").write_text("{}")
    config = load_recipe(
        "lenet-digits",
        [
            "model.kind=mine_for_snapshots.model:build",
            "parallel.engine=deepspeed",
            "parallel.deepspeed_config=zero.json",
        ],
    )
    folder = tmp_path / "slurm"
    folder.mkdir()
    take_snapshot(config, (), find_own_code([config.model.kind, config.task.kind]), folder)
    for name in ("launch/train.py", "launch/recipes/lenet-digits.yaml", "launch/templates/report.html", "slurm/run.sh",
                 "distrib/world.py", "models/tasks.py", "data/stream.py"):  # fmt: skip
        assert (folder / "code" / name).is_file()
    assert not list(folder.rglob("__pycache__"))
    assert sorted(str(path.relative_to(folder / "own")) for path in folder.glob("own/**/*") if path.is_file()) == [
        "beside_for_snapshots.py",
        "further_for_snapshots/part.py",
        "mine_for_snapshots/deep/table.bin",
        "mine_for_snapshots/model.py",
        "mine_for_snapshots/settings.json",
    ]
    resolved = load_recipe(str(folder / "recipe.yaml"))
    assert resolved.parallel.deepspeed_config == folder / "deepspeed.json"
    assert resolved.model == config.model


def test_a_snapshot_holds_what_every_row_of_a_sweep_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in "ab":
        (tmp_path / f"row_{name}_for_snapshots.py").write_text("def build(shape): ...\n")
        (tmp_path / f"zero_{name}.json").write_text(
            json.dumps({"zero_optimization": {"reduce_bucket_size": ord(name)}})
        )
    overrides = ["parallel.engine=deepspeed", "parallel.zero_stage=1"]
    sweeps = [
        "model.kind=row_a_for_snapshots:build,row_b_for_snapshots:build",
        "parallel.deepspeed_config=zero_a.json,zero_b.json",
    ]
    shipped = parse_yaml((SHIPPED_RECIPES / "lenet-digits.yaml").read_text(), "lenet-digits")
    recipe = write_recipe(tmp_path / "mine.yaml", shipped | {"model": {"kind": "row_a_for_snapshots:build"}})
    rows = make_rows(str(recipe), overrides, sweeps)
    own_code = find_own_code(row.config.model.kind for row in rows)
    (folder := tmp_path / "slurm").mkdir()
    rows = take_snapshot(load_recipe(str(recipe), overrides), rows, own_code, folder)
    assert sorted(path.name for path in (folder / "own").iterdir()) == [f"row_{name}_for_snapshots.py" for name in "ab"]
    for row, name in zip(rows, "abab", strict=True):
        in_job = load_recipe(str(folder / "recipe.yaml"), row.overrides)
        assert in_job.parallel.deepspeed_config == folder / f"deepspeed-{row.name}.json"
        assert str(ord(name)) in in_job.parallel.deepspeed_config.read_text()


def test_own_code_that_is_too_much_to_be_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "large_for_snapshots").mkdir()
    (tmp_path / "large_for_snapshots" / "model.py").write_text("def build(shape): ...\n")
    with (tmp_path / "large_for_snapshots" / "weights.bin").open("wb") as file:
        file.truncate(65 * 2**20)
    assert main(["submit", "lenet-digits", *CPUS, "model.kind=large_for_snapshots.model:build"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "65 MiB, more than 64" in told
    assert "large_for_snapshots/weights.bin (65 MiB)" in told


def test_other_options_of_sbatch_are_taken() -> None:
    refuse_owned_options(
        [
            "--exclude=n3",
            "-x n3",
            "--comment='--nodes of -N'",
            "--mem=4G",
            "--exclusive",
            "--hold",
            "--export=NONE",
            "-HQ",
        ]
    )


def test_a_percent_sign_in_a_directory_is_one_for_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "lenet-digits", *CPUS, "run.directory=50%job", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"#SBATCH --output={tmp_path}/50%%job/slurm/job-%j.out\n" in out
    assert f"\nrun_directory={tmp_path}/50%job\n" in out


def test_a_controller_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens at its port; then somebody who never answers."""
    monkeypatch.chdir(tmp_path)
    _submitted(tmp_path / "waits", "5", None)
    for name in ("squeue", "sbatch", "sacct"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for reason in ("Unable to contact slurm controller", "squeue: no answer in 0 seconds"):
        assert main(["jobs", "waits"]) == 0
        told = capsys.readouterr()
        assert told.out.splitlines()[1].split() == ["5", "waits", "unknown"]
        assert reason in told.err
        assert len(told.err.splitlines()) == 1
        assert main(["submit", "lenet-digits", *CPUS, "--after", "5"]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("lockstep: error: squeue: ")
        assert reason in error
        (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 1000\n")
        monkeypatch.setattr("launch.slurm._ANSWER_SECONDS", 0.2)
    assert main(["submit", "lenet-digits", *CPUS]) == 1
    assert "lockstep: error: sbatch: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_directory_is_gone_is_shown_while_slurm_knows_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "submitted.txt").write_text(f"{tmp_path}/gone\t7\n{tmp_path}/long-gone\t8\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7|RUNNING|9:00|None'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["jobs"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split() == ["7", "gone", "running", "9:00", "its", "directory", "is", "gone"]


def test_a_run_is_waited_for_by_the_last_of_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _submitted(tmp_path / "alone", "3", None)
    (tmp_path / "alone" / "slurm" / "jobs.txt").write_text("3\n7\n")
    _submitted(tmp_path / "sweep", "4", ["001", "002"])
    (tmp_path / "sweep" / "002" / "slurm").mkdir(parents=True)
    (tmp_path / "sweep" / "002" / "slurm" / "jobs.txt").write_text("4_2\n9_2\n")
    for name, job in (("alone", "3"), ("sweep", "4")):
        remember(tmp_path / name, job)
    assert [last_jobs(job) for job in ("3", "7", "4", "4_1", "4_2", "99")] == [
        ["7"], ["7"], ["4", "9_2"], ["4_1"], ["9_2"], ["99"],
    ]  # fmt: skip


def test_jobs_where_nothing_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jobs"]) == 0
    assert "no run was submitted from here" in capsys.readouterr().out
    assert main(["jobs", "elsewhere"]) == 2
    assert "elsewhere: was not submitted" in capsys.readouterr().err


def test_jobs_are_known_from_their_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is done, one that has not begun, and a sweep of which one row was given up and one chained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    step = {"step": 7, "loss": 0.51234, "items_per_second": 1234.5, "step_seconds": 0.5}
    _submitted(tmp_path / "runs" / "done", "3", None)
    _began(
        tmp_path / "runs" / "done",
        7,
        [step, {"step": 7, "evaluation": {"loss": 1.0}}],
        {"exit_code": 0, "reason": "all"},
    )
    _submitted(tmp_path / "runs" / "waits", "5", None)
    (tmp_path / "runs" / "waits" / "slurm" / "jobs.txt").write_text("")
    _submitted(tmp_path / "elsewhere", "4", ["001", "002"])
    _began(tmp_path / "elsewhere" / "001", 9, [step], {"exit_code": 78, "reason": "no good checkpoint"})
    _began(tmp_path / "elsewhere" / "002", 9, [], {"exit_code": 75, "reason": "on request"})
    (tmp_path / "elsewhere" / "002" / "slurm").mkdir()
    (tmp_path / "elsewhere" / "002" / "slurm" / "jobs.txt").write_text("4_2\n6_2\n")
    (tmp_path / "runs" / "submitted.txt").write_text(
        "".join(f"{tmp_path / name}\n" for name in ("runs/done", "runs/gone", "elsewhere", "runs/waits"))
    )
    assert main(["jobs"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["3", "runs/done", "done", "7/7", "0.5123", "1,234", "all"],
        ["4_1", "elsewhere/001", "given", "up", "7/9", "0.5123", "1,234", "no", "good", "checkpoint"],
        ["6_2", "elsewhere/002", "stopped", "on", "request"],
        ["5", "runs/waits", "unknown"],
    ]
    assert main(["jobs", "runs/waits"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def _submitted(directory: Path, job: str, rows: list[str] | None) -> None:
    (directory / "slurm").mkdir(parents=True)
    (directory / "slurm" / "submission.json").write_text(json.dumps({"job": job, "rows": rows}))


def _began(directory: Path, steps: int, lines: list[dict[str, Any]], outcome: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(f"run: {{steps: {steps}}}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "outcome.json").write_text(json.dumps(outcome))
