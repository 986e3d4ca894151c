"""The `lockstep` command: help and wrong usage are answered without torch, with the exit codes that scripts rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOCKSTEP = Path(sys.executable).parent / "lockstep"
COMMANDS = ("train", "prepare", "evaluate", "generate", "data", "checkpoint", "report", "engines")


def run(*arguments: object, cwd: Path, command: tuple[object, ...] = (LOCKSTEP,)) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in (*command, *arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_command(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in COMMANDS:
        assert f"\n    {command}" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    shown = run(command, "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: lockstep {command}")


def test_the_command_and_a_bad_recipe_import_no_torch(tmp_path: Path) -> None:
    """In the real command, with nothing injected: the interpreter itself lists what it imports."""
    python = (sys.executable, "-X", "importtime", "-m", "launch.cli")
    refused = run("train", "gpt-stdlib", "run.stepz=3", cwd=tmp_path, command=python)
    imported = {line.rpartition("|")[2].strip() for line in refused.stderr.splitlines() if "import time:" in line}
    assert refused.returncode == 2
    assert "launch.recipe" in imported
    assert "torch" not in imported
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "gpt-stdlib", "run.stepz=3"], "run.stepz=3: unknown key"),
        (["train", "gpt-stdlib", "--workers", "0"], "--workers 0: must be at least 1"),
        (["train", "gpt-stdlib", "--debug", "--workers", "2"], "--workers 2: has no effect with --debug"),
        (["train", "gpt-stdlib", "--resume", "auto"], "--resume auto: needs run.directory"),
        (["train", "gpt-stdlib", "--resume", "nowhere"], "--resume nowhere: neither a checkpoint"),
        (["train", "gpt-stdlib", "--workers", "1", "words"], "unrecognized argument: words"),
        (["train", "gpt-stdlib", "--wrokers", "1"], "unrecognized argument: --wrokers"),
        (["prepare", "nowhere:x", "--out", "d"], "data.source"),
        (["prepare", "text:missing.txt", "--out", "d"], "missing.txt"),
        (["prepare", "stdlib", "--out", "d", "--validation-fraction", "1.5"], "data.validation_fraction=1.5"),
        (["prepare", "stdlib", "digits", "--out", "d"], "text and images cannot be mixed"),
        (["prepare", "stdlib", "--out", "d", "--workers", "0"], "--workers 0: must be at least 1"),
        (["prepare", "stdlib", "--out", "d", "--part", "0/4"], "--part 0/4: must be I/N with I from 1 to N"),
        (["data", "merge", "nothing"], "nothing: nothing was prepared for it"),
        (["data"], "ACTION"),
        (["train", "gpt-stdlib", "data.source=train=stdlib"], "no split validation"),
        (["evaluate", "nowhere"], "nowhere: not a run"),
        (["generate", "nowhere"], "nowhere: not a run"),
        (["report", "nowhere"], "nowhere"),
        (["goodput", "nowhere"], "nowhere: not a run"),
        (["checkpoint"], "ACTION"),
        (["checkpoint", "export", "nowhere"], "--out"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_answered_with_2_and_leaves_nothing(arguments: list[str], part: str, tmp_path: Path) -> None:
    refused = run(*arguments, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert part in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


@pytest.mark.parametrize("arguments", [["--help"], ["engines"], ["train", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_quietly(arguments: list[str], tmp_path: Path) -> None:
    """As before `head`, which has gone when it has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)  # before the command begins: it may have said all within a moment
    with open(writer, "wb") as out:
        done = subprocess.run(
            [LOCKSTEP, *arguments], cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, timeout=120, check=False
        )
    assert done.stderr == b""
    # Of Python 3.11's versions the later ones have argparse end help well.
    assert done.returncode in ((0, 1) if "--help" in arguments else (1,))


def test_the_worker_refuses_the_same_recipes(tmp_path: Path) -> None:
    worker = (sys.executable, "-m", "launch.train")
    refused = run("gpt-stdlib", "run.stepz=3", cwd=tmp_path, command=worker)
    assert refused.returncode == 2
    assert refused.stderr.startswith("lockstep: error: recipe gpt-stdlib: run.stepz=3: unknown key")
    assert refused.stderr.count("\n") == 1


def test_a_folder_of_the_same_name_does_not_shadow_the_packages(tmp_path: Path) -> None:
    for name in ("data", "models", "launch", "distrib"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('shadowed')")
    assert run("train", "--help", cwd=tmp_path).returncode == 0


def test_options_may_stand_between_overrides(tmp_path: Path) -> None:
    refused = run("train", "gpt-stdlib", "run.steps=3", "--workers", "1", "run.stepz=4", cwd=tmp_path)
    assert "run.stepz=4: unknown key" in refused.stderr


def test_several_sources_and_the_parts_of_an_array(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(f"text {number} of {name}\n" * 20)
    arguments = ["prepare", "train=text:a", "validation=text:b", "--workers", 1]
    made = run(*arguments, "--out", "whole", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "prepared whole: 60 documents, " in made.stdout
    assert " tokens, " in made.stdout
    assert " MB/s)" in made.stdout
    for number in (2, 1):
        told = run(*arguments, "--out", "parts", "--part", f"{number}/2", cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        assert "when all parts are done, run `lockstep data merge parts`" in told.stdout
    merged = run("data", "merge", "parts", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.splitlines()[-1] == "parts"
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert whole == parts
