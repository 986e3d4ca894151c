"""`lockstep submit`: a recipe becomes a job of a SLURM cluster, with code and recipe of its own. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrib.capabilities import count_shards
from distrib.manifest import write_durably
from launch import slurm
from launch.config import RunConfig
from launch.exit_codes import DONE, FAILED
from launch.own_code import find_own_code
from launch.recipe import load_recipe
from launch.run_directory import new_numbered, next_numbered
from launch.submit_options import refuse_owned_options
from launch.submit_script import TEMPLATES, Setting, fill_in, format_duration, parse_time, setting_of
from launch.submit_snapshot import CODE_DIRECTORY, OWN_CODE_DIRECTORY, RECIPE_FILE, take_snapshot
from launch.submit_sweep import MANIFEST_FILE, Row, format_manifest, make_rows
from launch.submitted import FOLDER, RECORD_FILE, last_jobs, remember

_WARN_SECONDS = 300


@dataclass(frozen=True)
class Shape:
    """What a job asks of the cluster."""

    least_nodes: int
    most_nodes: int
    gpus: str
    """Of each node, as sbatch takes it: N or TYPE:N; empty: none."""
    workers: int
    """On each node."""
    cpus: int
    """Of each node, for all its workers together."""
    time: str
    warn_seconds: int

    @property
    def nodes(self) -> str:
        same = self.least_nodes == self.most_nodes
        return str(self.least_nodes) if same else f"{self.least_nodes}-{self.most_nodes}"


def submit(arguments: argparse.Namespace) -> int:
    """Checks, submits, and says where to look. Raises ValueError in one line for what cannot be."""
    try:
        return _submit(arguments)
    except slurm.NoAnswer as error:
        print(f"lockstep: error: {error}", file=sys.stderr)
        return FAILED


def _submit(arguments: argparse.Namespace) -> int:
    config = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.at_once is not None and (arguments.at_once < 1 or not arguments.sweep):
        raise ValueError(f"--at-once {arguments.at_once}: must be at least 1, and needs a --sweep")
    if arguments.failures is not None and arguments.failures < 0:
        raise ValueError(f"--failures {arguments.failures}: must be at least 0")
    rows = make_rows(arguments.recipe, arguments.overrides, arguments.sweep) if arguments.sweep else None
    shape = _shape_of(arguments, config)
    of_rows = [row.config for row in rows or ()]
    own_code = find_own_code(kind for each in (config, *of_rows) for kind in (each.model.kind, each.task.kind))
    refuse_owned_options(arguments.sbatch)
    after = _last_after(arguments.after)
    options = _options(after)
    provisional = _directory_to_be(config, rows)
    script = _render(arguments, config, shape, rows, provisional)
    print("\n".join(_facts(config, shape, rows, provisional)))
    if arguments.dry_run:
        _show(script, options, rows, provisional)
        return DONE
    if not slurm.is_there():
        raise ValueError(
            "sbatch is not on the PATH: submit from a login node of the cluster, or see the job with --dry-run"
        )
    _refuse_unknown(arguments.after, after)
    here = Path.cwd()
    print(f"cluster    {slurm.refuse_impossible(script, options, here, shape.time)}")
    with _new_directory(config, rows) as directory:
        folder = directory / FOLDER
        folder.mkdir(parents=True)
        rows_of_copies = take_snapshot(config, rows or (), own_code, folder)
        if rows is not None:
            (folder / MANIFEST_FILE).write_text(format_manifest(rows_of_copies), encoding="utf-8")
        path = folder / _template_name(rows)
        path.write_text(_render(arguments, config, shape, rows, directory), encoding="utf-8")
        job = slurm.submit(path, options, here)
    _remember(directory, job, shape, rows)
    log = _log_name(rows).replace("%j", job).replace("%A", job).replace("%a", "ROW")
    print(f"submitted  job {job}")
    print(f"log        {folder / log}")
    print("next       lockstep jobs")
    return DONE


def _shape_of(arguments: argparse.Namespace, config: RunConfig) -> Shape:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", arguments.nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"--nodes {arguments.nodes}: must be a number of nodes, or a range such as 2-4")
    match = re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?(\d+)", arguments.gpus_per_node)
    if match is None:
        raise ValueError(f"--gpus-per-node {arguments.gpus_per_node}: must be a number, or TYPE:NUMBER such as h100:8")
    gpus, device = int(match[1]), config.run.device
    workers = arguments.workers_per_node if arguments.workers_per_node is not None else gpus or 1
    if workers < 1:
        raise ValueError(f"--workers-per-node {workers}: must be at least 1")
    if device == "cuda" and not gpus:
        raise ValueError("--gpus-per-node 0: the recipe has run.device=cuda; ask for GPUs, or set run.device=cpu")
    if gpus and workers != gpus and device != "cpu":
        raise ValueError(
            f"--workers-per-node {workers}: every one of the {gpus} GPUs of a node has a worker of its own; remove it"
        )
    cpus = arguments.cpus_per_node if arguments.cpus_per_node is not None else workers
    if cpus < workers or cpus % workers:
        raise ValueError(f"--cpus-per-node {cpus}: must be a multiple of the {workers} workers of a node")
    seconds = parse_time(arguments.time)
    warn = arguments.warn_seconds if arguments.warn_seconds is not None else min(_WARN_SECONDS, seconds // 5)
    if not 1 <= warn < seconds or warn > 65535:
        raise ValueError(f"--warn-seconds {warn}: must be at least 1 and less than --time {arguments.time}")
    for nodes in range(least, most + 1):
        count_shards(config.parallel, nodes * workers)
    return Shape(least, most, arguments.gpus_per_node if gpus else "", workers, cpus, arguments.time, warn)


def _last_after(after: str | None) -> list[str]:
    """The jobs to wait for: of a run that was submitted from here those that go on for the one that is named."""
    if after is None:
        return []
    if not re.fullmatch(r"\d+(_\d+)?", after):
        raise ValueError(f"--after {after}: must be the number of a job")
    return last_jobs(after)


def _options(after: Sequence[str]) -> list[str]:
    """What is said on sbatch's command line: of this submission alone, not of the script."""
    if not after:
        return []
    # Without the second a job would wait for ever once another one has failed.
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]


def _refuse_unknown(named: str | None, after: Sequence[str]) -> None:
    """Raises ValueError for jobs that Slurm does not know: it would take them for such as have ended well."""
    known = slurm.find_jobs(after)
    for job in after:
        if not any(name == job or name.startswith(f"{job}_") for name in known):
            goes_on = "" if job == named else f" (job {job} goes on for it)"
            raise ValueError(f"--after {named}{goes_on}: Slurm does not know such a job, or not any more")


def _directory_to_be(config: RunConfig, rows: Sequence[Row] | None) -> Path:
    """Where the run will lie; nothing is made. Raises ValueError where something is there already."""
    directory = config.run.directory
    if directory is None:
        return next_numbered(_base_name(config, rows)).absolute()
    if (directory / FOLDER / RECORD_FILE).exists():
        again = shlex.join(["sbatch", str(directory / FOLDER / _template_name(rows))])
        raise ValueError(
            f"run.directory={directory}: was submitted before; go on with `{again}`, or name another directory"
        )
    if (directory / "run.json").exists() or (directory / FOLDER).exists():
        raise ValueError(f"run.directory={directory}: already holds a run; name another directory")
    return directory.absolute()


@contextlib.contextmanager
def _new_directory(config: RunConfig, rows: Sequence[Row] | None) -> Iterator[Path]:
    """Makes the run's directory; where the submission fails nothing of it is left."""
    if config.run.directory is None:
        directory, was_there = new_numbered(_base_name(config, rows)).absolute(), False
    else:
        directory, was_there = config.run.directory.absolute(), config.run.directory.exists()
    try:
        yield directory
    except BaseException as error:
        shutil.rmtree(directory / FOLDER if was_there else directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"{error.filename or directory}: cannot be written ({error.strerror})") from None
        raise


def _base_name(config: RunConfig, rows: Sequence[Row] | None) -> str:
    return config.run.name if rows is None else f"{config.run.name}-sweep"


def _template_name(rows: Sequence[Row] | None) -> str:
    return "train.sbatch" if rows is None else "sweep.sbatch"


def _log_name(rows: Sequence[Row] | None) -> str:
    return "job-%j.out" if rows is None else "job-%A_%a.out"


def _literally(folder: Path) -> str:
    """A folder as a part of sbatch's --output, which replaces what follows a %. Raises ValueError where it cannot be said."""
    if "\\" in str(folder):
        raise ValueError(
            f"{folder}: sbatch cannot write a log to a directory with a \\ in its name; choose another one"
        )
    return str(folder).replace("%", "%%")


def _render(
    arguments: argparse.Namespace, config: RunConfig, shape: Shape, rows: Sequence[Row] | None, directory: Path
) -> str:
    template = (TEMPLATES / _template_name(rows)).read_text(encoding="utf-8")
    folder = directory / FOLDER
    directives: dict[str, str | None] = {
        "job-name": config.run.name,
        "nodes": shape.nodes,
        "gres": f"gpu:{shape.gpus}" if shape.gpus else None,
        "cpus-per-task": str(shape.cpus),
        "time": shape.time,
        "signal": f"B:USR1@{shape.warn_seconds}",
        "output": _literally(folder) + "/" + _log_name(rows),
        "chdir": str(Path.cwd()),
    }
    site: Mapping[str, str | None] = {
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
    }
    directives |= {name: value for name, value in site.items() if value is not None}
    settings: dict[str, Setting] = {
        "lockstep": str(folder / CODE_DIRECTORY),
        "own_code": str(folder / OWN_CODE_DIRECTORY),
        "recipe": str(folder / RECIPE_FILE),
        "workers": str(shape.workers),
    }
    if not setting_of(template, "venv"):
        settings["venv"] = sys.prefix
    settings |= {name: value for name in ("launcher", "again") if (value := getattr(arguments, name)) is not None}
    if arguments.failures is not None:
        settings["failures"] = str(arguments.failures)
    if rows is None:
        settings["run_directory"] = str(directory)
    else:
        directives["array"] = f"1-{len(rows)}" + (f"%{arguments.at_once}" if arguments.at_once else "")
        settings |= {"directory": str(directory), "manifest": str(folder / MANIFEST_FILE)}
    return fill_in(template, directives, settings, arguments.sbatch)


def _facts(config: RunConfig, shape: Shape, rows: Sequence[Row] | None, directory: Path) -> list[str]:
    lines = [f"run        {directory}"]
    if rows is not None:
        lines[0] = f"sweep      {len(rows)} runs in {directory}"
    for nodes in sorted({shape.least_nodes, shape.most_nodes}):
        ranks = nodes * shape.workers
        world = f"{_count(nodes, 'node')} x {_count(shape.workers, 'worker')} = {_count(ranks, 'rank')}"
        lines.append(f"world      {world}, {_count(shape.cpus // shape.workers, 'core')} each")
        lines.append(f"batch      {share_of_batch(config.batch.global_samples, config.batch.micro_samples, ranks)}")
    limit, warning = format_duration(parse_time(shape.time)), format_duration(shape.warn_seconds)
    lines.append(f"time       {limit} a start; asked to save and stop {warning} before")
    return lines


def share_of_batch(samples: int, micro_samples: int, ranks: int) -> str:
    """What a step is to each rank, as a line."""
    least, most = samples // ranks, -(-samples // ranks)
    each = str(most) if least == most else f"{least} or {most}"
    micro_batches = -(-most // micro_samples)
    idle = f"; {ranks - samples} ranks have none" if samples < ranks else ""
    largest = min(most, micro_samples)
    return f"{samples} samples a step = {each} a rank, in {micro_batches} x at most {largest} at a time{idle}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _show(script: str, options: Sequence[str], rows: Sequence[Row] | None, directory: Path) -> None:
    path = directory / FOLDER / _template_name(rows)
    print(f"\n{shlex.join(slurm.command_line(path, options))}\n\n{path}:\n{script}", end="")
    if rows is not None:
        print(f"\n{path.with_name(MANIFEST_FILE)}:\n{format_manifest(rows)}", end="")


def _remember(directory: Path, job: str, shape: Shape, rows: Sequence[Row] | None) -> None:
    """Leaves the record that `lockstep jobs` reads."""
    record = {
        "job": job,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "nodes": shape.nodes,
        "workers_per_node": shape.workers,
        "time": shape.time,
        "rows": None if rows is None else [row.name for row in rows],
    }
    write_durably(directory / FOLDER / RECORD_FILE, json.dumps(record, indent=2).encode() + b"\n")
    remember(directory, job)
