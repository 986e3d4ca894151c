"""Options of sbatch that `lockstep submit` has flags of its own for, and checks. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_GPUS, _WORKERS, _CPUS = "--gpus-per-node", "--workers-per-node", "--cpus-per-node"
_IN_A_SCRIPT = None
_OWNED: dict[str, str | None] = {
    "nodes": "--nodes", "time": "--time", "time-min": "--time",
    "gres": _GPUS, "gpus": _GPUS, "gpus-per-node": _GPUS, "gpus-per-task": _GPUS, "gpus-per-socket": _GPUS,
    "ntasks": _WORKERS, "ntasks-per-node": _WORKERS, "ntasks-per-core": _WORKERS, "ntasks-per-socket": _WORKERS,
    "ntasks-per-gpu": _WORKERS, "cpus-per-task": _CPUS, "cpus-per-gpu": _CPUS,
    "partition": "--partition", "account": "--account", "qos": "--qos",
    "signal": "--warn-seconds", "dependency": "--after", "array": "--sweep and --at-once",
    "requeue": "--again requeue", "no-requeue": "--again chain",
    "job-name": "run.name", "output": "run.directory", "open-mode": "run.directory",
    "chdir": "the directory that you submit from",
    "wrap": _IN_A_SCRIPT, "wait": _IN_A_SCRIPT, "test-only": _IN_A_SCRIPT, "parsable": _IN_A_SCRIPT,
}  # fmt: skip
_SHORT = {
    "N": "nodes", "t": "time", "G": "gpus", "n": "ntasks", "c": "cpus-per-task", "p": "partition", "A": "account",
    "q": "qos", "d": "dependency", "a": "array", "J": "job-name", "o": "output", "D": "chdir", "W": "wait",
}  # fmt: skip
# Those that take no value: another short one may follow in the same word.
_SHORT_ALONE = "HkOQsvW"


def refuse_owned_options(given: Sequence[str]) -> None:
    """Raises ValueError for an `--sbatch` that contradicts, or might contradict, what was checked."""
    for text in given:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"--sbatch={text}: {error}") from None
        if not words or not words[0].startswith("-"):
            raise ValueError(f"--sbatch={text}: must be an option of sbatch, as in --sbatch=--exclude=n3")
        for word in words:
            if (owned := _owned(word)) is not None:
                flag = _OWNED[owned]
                way_out = f"use {flag}" if flag is not None else "it has no place in a batch script"
                raise ValueError(f"--sbatch={text}: --{owned} is for `lockstep submit` to say; {way_out}")


def _owned(word: str) -> str | None:
    """The option of ours that a word gives, in full, shortened as sbatch allows it, or by its letter."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0]
        if name in _OWNED:
            return name
        shortened = [owned for owned in _OWNED if name and owned.startswith(name)]
        return shortened[0] if shortened else None
    for letter in word[1:] if word.startswith("-") else "":
        if letter in _SHORT:
            return _SHORT[letter]
        if letter not in _SHORT_ALONE:
            break
    return None
