"""`lockstep report`: one or more runs as one HTML page that needs nothing but itself. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from launch.exit_codes import DO_NOT_RESTART, DONE, STOPPED_EARLY
from launch.goodput import Account, account_of
from launch.report_curves import BUCKETS, SERIES_COLOURS, Chart, Curve, column, draw, scientific, short
from launch.report_health import health_facts
from launch.report_time import describe_time
from launch.tracking.metrics_file import STALL_KEY, read_checkpoint_stalls, read_metrics

# What a page shows of long lists and texts; the rest is in the run's files, and the page says so.
_SAMPLES_SHOWN = 12
_SAMPLE_CHARACTERS = 4000
_EVALUATIONS_SHOWN = 12


@dataclass
class Run:
    """What a run directory holds. What is missing is empty here, and named in `notes`."""

    directory: Path
    identity: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    outcome: dict[str, Any]
    samples: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    checkpoint_stalls: list[dict[str, Any]]
    account: Account | None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.identity.get("name") or self.directory.resolve().name)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        attempts: list[dict[str, Any]] = self.identity.get("attempts", [])
        return attempts


def build_report(run_directories: list[Path], output: Path | None = None) -> Path:
    """Writes the page, by default to `report.html` of the first run, and returns its path.

    Several runs are overlaid. A run that is going on, or that crashed, is reported as far as it got; the page says what
    is missing. Raises ValueError where a directory holds no run, a file of one is broken, or the page cannot be written.
    """
    if not run_directories:
        raise ValueError("report: no run given; name at least one run directory")
    runs = [_read_run(directory) for directory in run_directories]
    output = output if output is not None else run_directories[0] / "report.html"
    page = _render(runs)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"report {output}: cannot be written ({error.strerror}); choose another --out") from error
    return output


def _read_run(directory: Path) -> Run:
    if not any((directory / name).is_file() for name in ("run.json", "metrics.jsonl")):
        raise ValueError(f"{directory}: holds no run (neither run.json nor metrics.jsonl); name a run directory")
    notes: list[str] = []
    steps, evaluations = read_metrics(directory)
    if not steps:
        notes.append("No step has been recorded yet.")
    return Run(
        directory=directory,
        identity=_read_json(directory / "run.json", notes),
        recipe_text=_read_text(directory / "recipe.yaml", notes),
        environment=_read_json(directory / "environment.json", notes),
        # a run that goes on has none, which the badge says
        outcome=_read_json(directory / "outcome.json", notes) if (directory / "outcome.json").exists() else {},
        samples=_read_samples(directory / "samples.jsonl", notes),
        steps=steps,
        evaluations=evaluations,
        checkpoint_stalls=read_checkpoint_stalls(directory),
        account=_read_account(directory, notes),
        notes=notes,
    )


def _read_account(directory: Path, notes: list[str]) -> Account | None:
    try:
        return account_of(directory)
    except ValueError as error:
        notes.append(f"Where its time went cannot be told: {error}.")
        return None


def _read_text(path: Path, notes: list[str]) -> str:
    if not path.exists():
        notes.append(f"{path.name} is missing.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        notes.append(f"{path.name} is not readable: {error}.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not readable: not a JSON object.")
        return {}
    return value


def _read_samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():  # an image model makes none
        return []
    samples = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            sample = json.loads(line)
            samples.append({"step": int(sample["step"]), "prompt": str(sample["prompt"]), "text": str(sample["text"])})
        except (ValueError, KeyError, TypeError):
            notes.append(f"{path.name}: line {number} is not readable.")
    return samples


# --- what the page says of a run ---------------------------------------------------------------------------------------


def _badge(run: Run) -> tuple[str, str]:
    """A kind, for the colour, and a sentence."""
    outcome = run.outcome
    if not outcome or outcome.get("attempt", 0) < len(run.attempts):
        return "open", "No outcome yet: the run is going on, or its last attempt was killed."
    code, reason = outcome.get("exit_code"), str(outcome.get("reason", ""))
    if code == DONE:
        return "good", f"Done: {reason}" if reason else "Done"
    if code == STOPPED_EARLY:
        return "open", f"Stopped early, ready to go on: {reason}"
    advice = "; do not start it again as it is" if code == DO_NOT_RESTART else ""
    return "bad", f"Ended with exit code {code}: {reason}{advice}"


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and a remark of each fact in the run's head."""
    if not run.steps:
        return []
    last = run.steps[-1]
    facts = [("Steps", _of_planned(run), f"{len(run.attempts) or 1} attempt{'s' if len(run.attempts) > 1 else ''}")]
    facts.append(("Samples", short(last["samples"]), ""))
    if last.get("tokens"):
        facts.append(("Tokens", short(last["tokens"]), ""))
    losses = column(run.steps, "loss")
    if np.isfinite(losses).any():
        facts.append(("Training loss", f"{losses[np.isfinite(losses)][-1]:.4f}", f"step {short(last['step'])}"))
    facts += _evaluation_facts(run)
    per_second = column(run.steps, "items_per_second")
    if np.isfinite(per_second).any():
        rate = float(f"{np.nanmedian(per_second):.3g}")
        facts.append(("Throughput", f"{short(rate)}/s", f"{_items([run])}, median step"))
    mfu = column(run.steps, "mfu")
    if np.isfinite(mfu).any():
        facts.append(("MFU", f"{np.nanmedian(mfu):.1%}", "median step"))
    seconds, waits = column(run.steps, "step_seconds"), column(run.steps, "data_wait_seconds")
    if np.nansum(seconds) > 0:
        facts.append(("Time in steps", duration(float(np.nansum(seconds))), _last_attempt(run)))
        facts.append(("Data wait", f"{np.nansum(waits) / np.nansum(seconds):.1%}", "of the time in steps"))
    stalls = column(run.checkpoint_stalls, STALL_KEY)
    if len(stalls):
        total, count = float(np.nansum(stalls)), len(stalls)
        share = f"{total / (total + np.nansum(seconds)):.1%} of the time in steps and saves"
        facts.append(("Waited for checkpoints", duration(total), f"{count} save{'s' if count > 1 else ''}, {share}"))
    if run.account is not None:
        of = f"of {duration(run.account.total)} was spent in steps that counted"
        facts.append(("Goodput", f"{run.account.goodput:.1%}", of))
    memory = column(run.steps, "peak_memory_bytes")
    if np.isfinite(memory).any():
        facts.append(("Peak memory", f"{np.nanmax(memory) / 2**30:.2f} GiB", "rank 0"))
    return facts + health_facts(run.steps)


def _evaluation_facts(run: Run) -> list[tuple[str, str, str]]:
    losses = [(record["evaluation"].get("loss"), record["step"]) for record in run.evaluations]
    finite = [(loss, step) for loss, step in losses if isinstance(loss, int | float)]
    if not finite:
        return []
    facts = [("Evaluation loss", f"{finite[-1][0]:.4f}", f"step {short(finite[-1][1])}, the last")]
    if min(finite) != finite[-1]:
        facts.append(("Best evaluation", f"{min(finite)[0]:.4f}", f"step {short(min(finite)[1])}"))
    return facts


def _of_planned(run: Run) -> str:
    planned = _flat(_recipe(run)).get("run.steps")
    done = f"{run.steps[-1]['step']:,}"
    return f"{done} of {planned:,}" if isinstance(planned, int) and planned != run.steps[-1]["step"] else done


def _last_attempt(run: Run) -> str:
    seconds = run.outcome.get("seconds")
    return f"last attempt took {duration(seconds)}" if isinstance(seconds, int | float) else ""


def _evaluation_table(run: Run) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names, and the step and values of at most `_EVALUATIONS_SHOWN` evaluations, evenly chosen, first and last in."""
    names = list(dict.fromkeys(name for record in run.evaluations for name in record["evaluation"]))
    chosen = np.unique(
        np.linspace(0, len(run.evaluations) - 1, min(_EVALUATIONS_SHOWN, len(run.evaluations))).astype(int)
    )
    records = [run.evaluations[index] for index in chosen]
    return names, [
        (record["step"], [_measured(record["evaluation"].get(name)) for name in names]) for record in records
    ]


def _recipe(run: Run) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The recipe's keys in which the runs differ, and their values, a value a run."""
    if len(runs) == 1:
        return []
    recipes = [_flat(_recipe(run)) for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    rows = [(key, [_value(recipe[key]) if key in recipe else "–" for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = [_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def _measured(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and 1e-2 <= abs(value) < 1e4 else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "–" if value is None else str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


# --- curves ------------------------------------------------------------------------------------------------------------


# How much was evaluated does not change: no curve. The loss is drawn with the training loss.
_COUNTS = ("tokens", "samples")


def _charts(runs: list[Run]) -> list[dict[str, Any]]:
    restarts = {
        index: [a["resumed_from_step"] for a in run.attempts if isinstance(a.get("resumed_from_step"), int)]
        for index, run in enumerate(runs)
    }
    every_step = [record["step"] for run in runs for record in (run.steps[:1] + run.steps[-1:] + run.evaluations)]
    chart = partial(
        Chart, restarts=restarts, first_step=min(every_step, default=0), last_step=max(every_step, default=1)
    )
    from_zero = partial(chart, from_zero=True)
    charts = [
        chart("Loss", _training(runs, "loss") + _evaluation(runs, "loss"), log_allowed=True),
        from_zero("Learning rate", _training(runs, "lr"), format_value=scientific),
        chart("Gradient norm", _training(runs, "gradient_norm"), log_allowed=True),
        from_zero(f"Throughput, {_items(runs)} per second", _training(runs, "items_per_second"), format_value=short),
        from_zero("Data wait, % of the step", _data_wait(runs)),
        from_zero("Wait for a checkpoint, seconds", _stalls(runs)),
        from_zero("Peak memory of rank 0, GiB", _training(runs, "peak_memory_bytes", 2.0**-30)),
        from_zero("MFU, %", _training(runs, "mfu", 100.0)),
    ]
    for stream in dict.fromkeys(name for run in runs for record in run.steps for name in record.get("streams", {})):
        charts += [
            chart(f"Loss of stream {stream}", _stream(runs, stream, "loss"), log_allowed=True),
            from_zero(f"Epochs of stream {stream}", _stream(runs, stream, "epoch")),
        ]
    names = dict.fromkeys(name for run in runs for record in run.evaluations for name in record["evaluation"])
    charts += [
        chart(f"Evaluation: {name.replace('_', ' ')}", _evaluation(runs, name), log_allowed=True)
        for name in names
        if name != "loss" and name.rpartition("/")[2] not in _COUNTS
    ]
    drawn = [(chart.title, draw(chart)) for chart in charts]
    return [{"title": title, "svg": Markup(svg)} for title, svg in drawn if svg is not None]


def _items(runs: list[Run]) -> str:
    """What the loss is divided by: the records do not say, but only a language model's count tokens."""
    return "tokens" if any(record.get("tokens") for run in runs for record in run.steps[-1:]) else "samples"


def _training(runs: list[Run], name: str, scale: float = 1.0) -> list[Curve]:
    return [Curve(_steps(run.steps), scale * column(run.steps, name), index) for index, run in enumerate(runs)]


def _stream(runs: list[Run], stream: str, name: str) -> list[Curve]:
    """What the log tells of one stream of a mixture."""
    return [
        Curve(_steps(run.steps), column([r.get("streams", {}).get(stream, {}) for r in run.steps], name), index)
        for index, run in enumerate(runs)
    ]


def _data_wait(runs: list[Run]) -> list[Curve]:
    seconds, waits = _training(runs, "step_seconds"), _training(runs, "data_wait_seconds", 100.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is not drawn
        return [replace(wait, values=wait.values / time.values) for wait, time in zip(waits, seconds, strict=True)]


def _stalls(runs: list[Run]) -> list[Curve]:
    return [
        Curve(_steps(run.checkpoint_stalls), column(run.checkpoint_stalls, STALL_KEY), index)
        for index, run in enumerate(runs)
    ]


def _evaluation(runs: list[Run], name: str) -> list[Curve]:
    return [
        Curve(_steps(run.evaluations), column([r["evaluation"] for r in run.evaluations], name), index, points=True)
        for index, run in enumerate(runs)
    ]


def _steps(records: list[dict[str, Any]]) -> NDArray[np.int64]:
    return np.array([record["step"] for record in records], dtype=np.int64)


# --- the page ----------------------------------------------------------------------------------------------------------


def _render(runs: list[Run]) -> str:
    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        runs=[_describe(index, run) for index, run in enumerate(runs)],
        charts=_charts(runs),
        differences=_differences(runs),
        any_band=any(len(run.steps) > BUCKETS for run in runs),
        any_restart=any(attempt.get("resumed_from_step") is not None for run in runs for attempt in run.attempts),
    )


def _describe(index: int, run: Run) -> dict[str, Any]:
    kind, sentence = _badge(run)
    names, rows = _evaluation_table(run)
    shown = run.samples[-_SAMPLES_SHOWN:]
    return {
        "colour": index % SERIES_COLOURS,
        "name": run.name,
        "run_id": run.identity.get("run_id"),
        "created": run.identity.get("created"),
        "directory": str(run.directory),
        "badge": kind,
        "outcome": sentence,
        "notes": run.notes,
        "facts": _facts(run),
        "digest": run.steps[-1].get("digest") if run.steps else None,
        "attempts": run.attempts,
        "time": describe_time(run.account),
        "evaluation_names": names,
        "evaluation_rows": rows,
        "evaluations": len(run.evaluations),
        "samples": [sample | {"cut": _cut(sample["text"])} for sample in reversed(shown)],
        "samples_left_out": len(run.samples) - len(shown),
        "recipe": run.recipe_text,
        "environment": [(key, _value(value)) for key, value in _flat(run.environment).items()]
        if run.environment
        else [],
    }


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= _SAMPLE_CHARACTERS
        else f"{text[:_SAMPLE_CHARACTERS]} … [cut here; all of it is in samples.jsonl]"
    )
