"""A mixture from a recipe to its log: the same samples on any workers, shares and losses of each stream, changed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data.plan import Plan
from launch.planning import read_plan
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import WarmProcess, digests, lockstep, losses, write_recipe


@pytest.fixture(scope="module")
def alone(mixture: Path, warm: WarmProcess) -> Path:
    run = mixture.parent / "alone"
    warm.worker(mixture, f"run.directory={run}", cwd=run.parent).succeeded()
    return run


def test_the_log_tells_share_epoch_and_loss_of_each_stream(alone: Path) -> None:
    steps, evaluations = read_metrics(alone)
    for record in steps:
        streams = record["streams"]
        assert set(streams) == {"web", "code"}
        assert sum(stream["share"] for stream in streams.values()) == pytest.approx(1.0)
        total = sum(stream["share"] * (stream["loss"] or 0.0) for stream in streams.values())  # as many tokens a sample
        assert total == pytest.approx(record["loss"], rel=1e-6)
    epochs = [record["streams"]["web"]["epoch"] for record in steps]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 0
    assert {"web/loss", "code/loss", "loss"} <= set(evaluations[-1]["evaluation"])
    assert evaluations[-1]["evaluation"]["loss"] == pytest.approx(
        (evaluations[-1]["evaluation"]["web/loss"] + evaluations[-1]["evaluation"]["code/loss"]) / 2, rel=1e-6
    )


def test_the_report_draws_each_stream(alone: Path, tmp_path: Path, warm: WarmProcess) -> None:
    warm.lockstep("report", alone, "--out", tmp_path / "report.html", cwd=tmp_path).succeeded()
    page = (tmp_path / "report.html").read_text()
    for title in ("Loss of stream web", "Epochs of stream code", "Evaluation: web/bits per byte"):
        assert title in page
    assert "Evaluation: web/tokens" not in page


def test_three_workers_read_what_one_reads(mixture: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "three"
    lockstep("train", mixture, f"run.directory={run}", "--workers", 3, cwd=tmp_path).succeeded()
    assert digests(run) == digests(alone)
    assert losses(run) == pytest.approx(losses(alone), rel=2e-6)
    for one, three in zip(read_metrics(alone)[0], read_metrics(run)[0], strict=True):
        for name, stream in one["streams"].items():
            assert three["streams"][name]["share"] == stream["share"]
            assert three["streams"][name]["epoch"] == stream["epoch"]
            assert three["streams"][name]["loss"] == pytest.approx(stream["loss"], rel=2e-6)


def test_weights_change_on_resume_and_what_was_read_stays(
    mixture: Path, alone: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    run = tmp_path / "changed"
    arguments = [mixture, f"run.directory={run}"]
    warm.worker(*arguments, "run.steps=6", cwd=tmp_path).succeeded()
    longer = [*arguments, "--resume", "auto", "data.streams.code.weight=9"]
    refused = warm.worker(*longer, "--allow-change", "data.streams.code.source=text:/nowhere", cwd=tmp_path)
    refused.failed_with(2, "/nowhere")
    warm.worker(*longer, cwd=tmp_path).failed_with(2, "data.streams.code.weight: 1.0 -> 9.0", "--allow-change")
    warm.worker(*longer, "--allow-change", cwd=tmp_path).succeeded()
    assert digests(run)[:6] == digests(alone)[:6]
    assert digests(run)[6] != digests(alone)[6]
    shares = [record["streams"]["code"]["share"] for record in read_metrics(run)[0]]
    assert sum(shares[6:]) > 0.5 * 6 > sum(shares[:6])
    state = json.loads((run / "checkpoints" / "step-00000012" / "state.json").read_text())
    plan = Plan.from_json(json.dumps(state["plan"]))
    assert [segment.start_position for segment in plan.segments] == [0, 48]
    assert sum(plan.consumed(96)) == 96


def test_weights_may_change_again_where_no_step_was_taken_with_those_before(
    mixture: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    run = tmp_path / "again"
    arguments = [mixture, f"run.directory={run}"]
    warm.worker(*arguments, "run.steps=6", cwd=tmp_path).succeeded()
    resumed = [*arguments, "--resume", "auto", "--allow-change"]
    warm.worker(*resumed, "run.steps=6", "data.streams.code.weight=9", cwd=tmp_path).succeeded()
    warm.worker(*resumed, "run.steps=7", "data.streams.code.weight=5", cwd=tmp_path).succeeded()
    plan = read_plan(run)
    assert [segment.start_position for segment in plan.segments] == [0, 48]
    assert {stream.name: stream.quota for stream in plan.segments[1].streams} == {"web": 1536, "code": 2560}
    warm.lockstep("data", "audit", run, "--workers", 1, cwd=tmp_path).succeeded()


def test_one_tokenizer_is_trained_on_all_streams(mixture: Path, tmp_path: Path, warm: WarmProcess) -> None:
    recipe = yaml.safe_load(mixture.read_text())
    recipe["data"]["tokenizer"] = "bpe:300"
    recipe["data"].update(sequence_tokens=16, lanes=2)
    for name, stream in recipe["data"]["streams"].items():
        stream["directory"] = str(tmp_path / name)
    path = write_recipe(tmp_path / "bpe.yaml", recipe)
    for run in ("first", "again"):  # the second time everything is there
        warm.worker(path, f"run.directory={run}", "run.steps=2", cwd=tmp_path).succeeded()
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    (trained,) = (tmp_path / "prepared").iterdir()
    for name in ("web", "code"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == trained.read_bytes()


def test_mistakes_are_told_before_anything_starts(mixture: Path, tmp_path: Path, warm: WarmProcess) -> None:
    for override, *parts in (
        ("data.source=digits", "data: source has no effect beside data.streams"),
        ("data.streams.web.wieght=2", "data.streams.web.wieght=2: unknown key", "weight"),
        ("data.streams.web.weight=0", "data.streams.web.weight=0", "greater than 0"),
        ("data.streams.web.max_epochs=0.01", "data.streams.web.max_epochs 0.01", "passes the limit"),
        ("data.order=global", "lanes, window_shards has no effect with data.order=global"),
        ("data.lanes=1000000", "data.lanes 1000000"),
    ):
        run = tmp_path / "refused"
        warm.worker(mixture, f"run.directory={run}", override, cwd=tmp_path).failed_with(2, *parts)
