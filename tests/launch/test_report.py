import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from launch.report import build_report, duration
from launch.report_curves import BUCKETS, Chart, Curve, decimate, draw, scientific, short
from tests.launch.simulated_run import Simulated


def step_line(step: int, attempt: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": attempt,
        "samples": 16 * step,
        "tokens": 4096 * step,
        "loss": 5.0 / (1 + 0.01 * step) + 0.1 * math.sin(step),
        "lr": 1e-3 * min(1.0, step / 10),
        "gradient_norm": 0.5 + 1.0 / step,
        "step_seconds": 0.25,
        "data_wait_seconds": 0.01,
        "items_per_second": 16384.0,
        "mfu": None,
        "peak_memory_bytes": 2**30,
        "skipped": False,
        "digest": f"{step:016x}",
    } | changes


def make_run(directory: Path, name: str = "gpt-tiny", steps: int = 60, lr: float = 1e-3) -> Path:
    """A run that was resumed once, from step 20, and is done."""
    directory.mkdir(parents=True)
    attempts = [
        {"attempt": 1, "started": "2026-11-22T09:00:00+00:00", "world_size": 2, "engine": "native", "device": "cpu",
         "resumed_from_step": None},
        {"attempt": 2, "started": "2026-11-22T09:05:00+00:00", "world_size": 1, "engine": "native", "device": "cpu",
         "resumed_from_step": 20},
    ]  # fmt: skip
    identity = {"name": name, "run_id": "00ff", "wandb_run_id": "00ff", "created": "2026-11-22", "attempts": attempts}
    (directory / "run.json").write_text(json.dumps(identity))
    recipe = {"model": {"kind": "gpt"}, "optimizer": {"lr": lr}, "run": {"name": name, "steps": steps}}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (directory / "environment.json").write_text(json.dumps({"python": "3.11.7", "versions": {"torch": "2.13.0"}}))
    with (directory / "metrics.jsonl").open("w") as file:
        for attempt, numbers in ((1, range(1, 26)), (2, range(21, steps + 1))):
            for step in numbers:
                file.write(json.dumps(step_line(step, attempt)) + "\n")
                if step % 10 == 0:
                    evaluation = {"loss": 4.0 - 0.02 * step if step < 50 else 3.5, "bits_per_byte": 2.0}
                    file.write(json.dumps({"step": step, "attempt": attempt, "evaluation": evaluation}) + "\n")
                if step % 20 == 0:
                    stall = {"step": step, "attempt": attempt, "checkpoint_stall_seconds": 0.2}
                    file.write(json.dumps(stall) + "\n")
    outcome = {"exit_code": 0, "reason": f"all {steps} steps are done", "step": steps, "attempt": 2, "seconds": 75.5}
    (directory / "outcome.json").write_text(json.dumps(outcome))
    samples = [{"step": step, "prompt": "def ", "text": f"after_{step}(self):\n    return"} for step in (0, steps)]
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return directory


def make_timed_run(directory: Path) -> Path:
    """A run whose first attempt hung after step 3, which was done for nothing; the second did 2 steps."""
    run = Simulated()
    run.begin(8.0)
    for _ in range(3):
        run.train(0.0, 10.0, 2.0, 0.0, 1.0)
    run.begin(4.0, back=1, before=15.0, died=6.0)
    for _ in range(2):
        run.train(0.0, 10.0, 2.0, 0.0, 1.0)
    run.lines = [step_line(line["step"], line["attempt"]) | line if "loss" in line else line for line in run.lines]
    return run.put(make_run(directory))


class Page(HTMLParser):
    """What a reader sees, and whether tags nest and ids are unique."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == []
        assert len(self.ids) == len(set(self.ids))
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self._words.append(data)


def figures(page: Page) -> dict[str, str]:
    found = re.findall(r"<figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)", page.html, flags=re.DOTALL)
    return dict(found)


def test_the_time_of_a_run_is_told_by_attempt_and_kind(tmp_path: Path) -> None:
    page = Page(build_report([make_timed_run(tmp_path / "run")]))
    for expected in (
        "Goodput 49.0% of 1 min 38 s was spent in steps that counted",
        "Attempt start compute communication save lost between all "
        "1 8.00 20.00 4.00 2.00 19.00 0.00 53.00 2 4.00 20.00 4.00 2.00 0.00 15.00 45.00 "
        "all 12.00 40.00 8.00 4.00 19.00 15.00 98.00 share 12.2% 40.8% 8.2% 4.1% 19.4% 15.3% 100.0%",
        "lost steps that a later attempt did again",
        "1 step was done again by a later attempt.",
    ):
        assert expected in page.text, page.text
    widths = [float(width) for width in re.findall(r'<rect class="t-\w+" x="[\d.]+" width="([\d.]+)"', page.html)]
    assert widths == pytest.approx([122.449, 408.163, 81.633, 40.816, 193.878, 153.061], abs=0.001)
    assert set(re.findall(r'<rect class="(t-\w+)"', page.html)) <= set(re.findall(r"\.(t-\w+) \{", page.html))


def test_a_run_without_a_clock_says_so(tmp_path: Path) -> None:
    page = Page(build_report([make_run(tmp_path / "run")]))
    assert "Where its time went cannot be told" in page.text
    assert "Goodput" not in page.text


def test_a_run_is_told_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "gpt-tiny")
    path = build_report([run])
    assert path == run / "report.html"
    page = Page(path)
    for expected in (
        "gpt-tiny Done: all 60 steps are done",
        "Steps 60 2 attempts",
        "Samples 960",
        "Tokens 245.8k",
        "Evaluation loss 3.5000 step 60, the last",
        "Best evaluation 3.2000 step 40",
        "Throughput 16.4k/s tokens, median step",
        "Time in steps 15.0 s last attempt took 1 min 16 s",
        "Data wait 4.0%",
        "Waited for checkpoints 0.6 s 3 saves, 3.8% of the time in steps and saves",
        "Peak memory 1.00 GiB",
        "After step 60 def after_60(self): return",
        "2 2026-11-22T09:05:00+00:00 1 native cpu 20",
        "versions.torch 2.13.0",
        "kind: gpt",
        "000000000000003c",
    ):
        assert expected in page.text, expected
    assert list(figures(page)) == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput, tokens per second",
        "Data wait, % of the step",
        "Wait for a checkpoint, seconds",
        "Peak memory of rank 0, GiB",
        "Evaluation: bits per byte",
    ]


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = Page(build_report([make_run(tmp_path / "run")]))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    addresses = set(re.findall(r"(?:href|src|url)\s*[=(]\s*[\"']?([^\"')\s]+)", page.html))
    assert {address for address in addresses if not address.startswith("#")} == set()
    assert "default-src 'none'" in page.html
    names = set(re.findall(r"https?://[^\s\"'<]+", page.html))
    assert names <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = build_report([run]).read_bytes()
    assert build_report([run], tmp_path / "again.html").read_bytes() == first


def test_several_runs_are_overlaid_and_their_recipes_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "first"), make_run(tmp_path / "b", "second", steps=80, lr=3e-4)]
    page = Page(build_report(runs, tmp_path / "both.html"))
    assert "2 runs side by side" in page.text
    loss = figures(page)["Loss"]
    assert "var(--series-0)" in loss
    assert "var(--series-1)" in loss
    assert "optimizer.lr 0.001 0.0003" in page.text
    assert "run.steps 60 80" in page.text
    assert "model.kind" not in page.text


def test_restarts_are_marked(tmp_path: Path) -> None:
    resumed = make_run(tmp_path / "resumed")
    straight = make_run(tmp_path / "straight")
    identity = json.loads((straight / "run.json").read_text())
    identity["attempts"][1]["resumed_from_step"] = None
    (straight / "run.json").write_text(json.dumps(identity))
    with_mark, without = (Page(build_report([run])) for run in (resumed, straight))
    assert "resumed from here" in with_mark.text
    assert "resumed from here" not in without.text
    assert figures(with_mark)["Learning rate"].count("<path") == figures(without)["Learning rate"].count("<path") + 1


def test_malicious_names_and_texts_are_only_text(tmp_path: Path) -> None:
    evil = "</pre></style><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }} $\\alpha_"
    run = make_run(tmp_path / "run", name=evil)
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": evil, "text": evil}) + "\n")
    (run / "recipe.yaml").write_text(f"# {evil}\nmodel: {{kind: gpt}}\n")
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    (run / "outcome.json").write_text(json.dumps({"exit_code": 1, "reason": evil, "step": 1, "attempt": 2}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "attempt": 2, "evaluation": {evil: 1.0}}) + "\n")
    page = Page(build_report([run]))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>alert('x')</script>") >= 7
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (None, "No outcome yet"),
        ({"exit_code": 0, "reason": "x", "attempt": 1}, "No outcome yet"),  # of the attempt before the last
        ({"exit_code": 75, "reason": "asked to stop", "attempt": 2}, "Stopped early, ready to go on: asked to stop"),
        ({"exit_code": 78, "reason": "out of memory", "attempt": 2}, "Ended with exit code 78: out of memory; do not"),
        ({"exit_code": 1, "reason": "lost", "attempt": 2}, "Ended with exit code 1: lost"),
    ],
)
def test_how_a_run_ended_is_said(tmp_path: Path, outcome: dict[str, Any] | None, said: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "outcome.json").unlink()
    if outcome is not None:
        (run / "outcome.json").write_text(json.dumps(outcome))
    assert said in Page(build_report([run])).text


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "environment.json"])
def test_a_missing_file_is_said_on_the_page(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    assert f"{name} is missing." in Page(build_report([run])).text


@pytest.mark.parametrize("name", ["run.json", "environment.json", "outcome.json"])
@pytest.mark.parametrize("content", ['{"name": ', "[]", "\x00"])
def test_a_torn_file_is_said_on_the_page(tmp_path: Path, name: str, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    assert f"{name} is not readable" in Page(build_report([run])).text


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "outcome.json", "samples.jsonl"):
        (run / name).unlink()
    page = Page(build_report([run]))
    assert "No step has been recorded yet." in page.text
    assert "Curves" not in page.text


def test_a_run_that_crashed_in_a_line_is_reported_up_to_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 61, "pro')
    page = Page(build_report([run]))
    assert "Steps 60 2 attempts" in page.text
    assert "samples.jsonl: line 3 is not readable." in page.text


def test_losses_that_are_not_numbers_leave_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [step_line(step, 1, loss=None, gradient_norm=None, skipped=True, mfu=0.25) for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(build_report([run]))
    assert "Skipped steps 30 gradient not finite; steps 1, 2, 3, 4, 5, 6 and 24 more" in page.text
    assert "Steps 30 of 60" in page.text
    assert "MFU 25.0% median step" in page.text
    assert "Loss" not in figures(page)
    assert "Learning rate" in figures(page)


def test_what_a_run_found_amiss_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Loss spikes" not in Page(build_report([run])).text
    found: dict[int, dict[str, Any]] = {
        3: {"loss_spike": 12.5}, 4: {"stragglers": [1]}, 5: {"loss_spike": None}, 6: {"stragglers": [0, 1]},
        7: {"differing_ranks": [2]},
    }  # fmt: skip
    lines = [step_line(step, 1, **found.get(step, {})) for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(build_report([run]))
    assert "Loss spikes 2 steps 3, 5" in page.text
    assert "Slow ranks 0 1 steps 4, 6" in page.text
    assert "Ranks that differ 2 step 7" in page.text


def test_long_samples_and_many_evaluations_are_cut_and_it_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=500)
    samples = [{"step": step, "prompt": "", "text": "x" * 10_000} for step in range(20)]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = Page(build_report([run]))
    assert "8 earlier ones are in samples.jsonl" in page.text
    assert "cut here; all of it is in samples.jsonl" in page.text
    assert "12 of 50; all of them are in metrics.jsonl" in page.text
    assert "around the mean of neighbouring steps" in page.text


def test_a_directory_without_a_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no run") as caught:
            build_report([directory])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no run given"):
        build_report([])


def test_a_page_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be written"):
        build_report([run], tmp_path / "no" / "such" / "folder.html")


def test_the_report_imports_no_torch() -> None:
    code = "import sys, launch.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- curves ------------------------------------------------------------------------------------------------------------


def test_decimation_keeps_extremes_means_and_order() -> None:
    steps = np.arange(100_003, dtype=np.int64)
    values = np.sin(steps / 5000)
    values[77_777] = 40.0
    values[5:900:7] = np.nan
    at, mean, low, high = decimate(steps, values)
    assert len(at) == len(mean) == len(low) == len(high) == BUCKETS
    assert np.all(np.diff(at) > 0)
    assert high.max() == 40.0
    assert low.min() == np.nanmin(values)
    assert np.all((low <= mean) & (mean <= high))
    weights = np.diff(np.append(np.linspace(0, np.isfinite(values).sum(), BUCKETS, endpoint=False).astype(int), 99_875))
    assert np.average(mean, weights=weights) == pytest.approx(np.nanmean(values))


def test_a_short_curve_is_drawn_as_it_is() -> None:
    steps, values = np.array([1, 2, 4]), np.array([3.0, np.nan, 1.0])
    for part, expected in zip(decimate(steps, values), ([1, 4], [3, 1], [3, 1], [3, 1]), strict=True):
        assert part.tolist() == expected


def test_a_million_steps_make_a_small_picture() -> None:
    steps = np.arange(1_000_000, dtype=np.int64)
    values = np.random.default_rng(0).normal(size=1_000_000)
    svg = draw(Chart("Loss", [Curve(steps, values, 0)], {}, 0, 1_000_000))
    assert svg is not None
    ElementTree.fromstring(svg)
    assert len(svg) < 100_000


def test_a_curve_without_a_finite_value_is_not_drawn() -> None:
    assert draw(Chart("MFU", [Curve(np.array([1, 2]), np.array([np.nan, np.inf]), 0)], {}, 0, 2)) is None


def test_a_picture_takes_its_colours_from_the_page() -> None:
    svg = draw(Chart("Loss", [Curve(np.array([1, 2]), np.array([1.0, 2.0]), 9)], {9: [1]}, 1, 2))
    assert svg is not None
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()
    assert "var(--series-1)" in svg


def test_numbers_are_said_as_people_say_them() -> None:
    assert [short(value) for value in (0, 950, 12_500, 3.2e9, 0.25)] == ["0", "950", "12.5k", "3.2G", "0.25"]
    assert [scientific(value) for value in (0, 2.5e-4, 1e-3, 0.05)] == ["0", "2.5e-4", "1e-3", "0.05"]
    assert [duration(value) for value in (1.25, 75, 3725)] == ["1.2 s", "1 min 15 s", "1 h 02 min"]
