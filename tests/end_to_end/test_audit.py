"""The audit: proves what a run read through kills, world sizes and changes, and says where something does not agree."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.audit import AuditedData, Auditor, stretches
from data.digest import EMPTY_DIGEST, chain
from data.manifest import fingerprint_of
from data.plan import Plan, Segment, StreamPart
from distrib.manifest import write_manifest
from launch.auditing import read_told
from launch.cli import main
from launch.planning import plan_file_bytes, read_plan
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import (
    LOCKSTEP,
    WarmProcess,
    environment,
    started,
    stop_beyond_a_checkpoint,
    wait_until,
)
from tests.end_to_end.user_models import write_user_package

Audit = Callable[..., tuple[int, str]]
QUIET = ("tracking.wandb=off", "tracking.tensorboard=false")


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Audit:
    """The exit code and the last line of `lockstep data audit`."""

    def run(directory: Path, *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        words = ["data", "audit", str(directory), "--workers", "1", *map(str, arguments)]
        code = main(words)
        shown = capsys.readouterr()
        return code, (shown.out + shown.err).splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def battered(mixture: Path, tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Path:
    """A mixture in the windowed order: two workers killed, three workers with other weights and another batch killed,
    one worker with other weights again, to its end. Tests must not change it."""
    run = tmp_path_factory.mktemp("battered") / "run"
    words = [LOCKSTEP, "train", mixture, f"run.directory={run}", "run.steps=4000", "checkpoint.every_steps=4"]
    again = ["--resume", "auto", "--allow-change"]
    for attempt, arguments in enumerate(
        (
            ["--workers", 2],
            ["--workers", 3, *again, "data.streams.code.weight=9", "batch.global_samples=5"],
        ),
        start=1,
    ):
        before = max((record["step"] for record in read_metrics(run)[0]), default=0)
        with started(*words, *arguments, cwd=run.parent) as process:
            # Every attempt saves something that the next goes on with, and loses steps which that one does again.
            stop_beyond_a_checkpoint(process, run, attempt, saved=before + 1, steps=2)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_until(lambda: is_free(run), f"the end of the workers of {run}")
    steps = max(record["step"] for record in read_metrics(run)[0]) + 5
    last = [mixture, f"run.directory={run}", f"run.steps={steps}", *again, "data.streams.code.weight=2"]
    warm.worker(*last, cwd=run.parent).succeeded()
    return run


def is_free(run: Path) -> bool:
    """Whether no process trains in a run directory: one that is killed holds its lock until its last thread is gone."""
    with (run / "run.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@pytest.fixture
def copy(battered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(battered, tmp_path / "run"))


def test_a_battered_run_is_proven(battered: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "audit", str(battered), "--workers", "2"]) == 0
    *table, verdict = capfd.readouterr().out.splitlines()
    assert [row.split()[-4:-2] for row in table[2:]] == [["3", "native"], ["1", "native"]]
    last = read_metrics(battered)[0][-1]
    assert verdict.startswith(
        f"proven: steps 1 to {last['step']} read {last['samples']:,} samples as planned; stream code: "
    )
    for stream in ("web", "code"):
        assert re.search(rf"stream {stream}: \d+ samples, each read \d+ (or|to) \d+ times", verdict)


def test_a_run_that_goes_on_is_proven_so_far(copy: Path, audit: Audit) -> None:
    (copy / "outcome.json").unlink()
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9')  # being written
    code, verdict = audit(copy)
    assert code == 0
    assert "so far" in verdict


def rewrite_log(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = run / "metrics.jsonl"
    records = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_lines(records: list[dict[str, Any]], attempt: int) -> list[dict[str, Any]]:
    return [record for record in records if "digest" in record and record["attempt"] == attempt]


def flip(digest: str) -> str:
    return ("1" if digest[0] == "0" else "0") + digest[1:]


def alter_digest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    line = step_lines(records, 1)[2]
    line["digest"] = flip(line["digest"])
    return records


def alter_last_digest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    line = step_lines(records, 3)[-1]
    line["digest"] = flip(line["digest"])
    return records


def invent_all_digests(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chain of other folds: digests that agree with each other and with nothing else."""
    digest = EMPTY_DIGEST
    for line in step_lines(records, 1):
        digest = line["digest"] = chain(digest, line["step"])
    return records


def remove_line(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    line = step_lines(records, 3)[1]
    return [record for record in records if record is not line]


def remove_the_end(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gone = step_lines(records, 3)[-2:]
    return [record for record in records if record not in gone]


def repeat_line(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    line = step_lines(records, 3)[1]
    return [*records, {**line, "digest": flip(line["digest"]), "loss": 1.0}]


def remove_all(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return []


def absurd_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 1)[0]["step"] = 1 << 80
    return records


def far_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the one that was repeated, where a line counts as missing."""
    repeated_line(records)["step"] = (1 << 62) - 1
    return remove_line(records)


def alter_samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 3)[1]["samples"] += 1
    return records


def alter_tokens(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 3)[1]["tokens"] -= 64
    return records


def repeated_line(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first line of a step that was repeated later, with another after it."""
    told = {(record["attempt"], record["step"]) for record in records if "digest" in record}
    later = {attempt: min(step for other, step in told if other == attempt) for attempt in (2, 3)}
    return next(
        record
        for record in records
        if "digest" in record
        and record["attempt"] == 1
        and record["step"] >= later[2]
        and (1, record["step"] + 1) in told
    )


def alter_repeated_digest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    repeated_line(records)["digest"] = "f" * 32
    return records


def alter_repeated_tokens(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    repeated_line(records)["tokens"] += 1
    return records


def remove_repeated(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records.remove(repeated_line(records))
    return records


def alter_share(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 3)[0]["streams"]["web"]["share"] += 0.1
    return records


def alter_epoch(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 1)[0]["streams"]["code"]["epoch"] = 99.0
    return records


def remove_streams(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records:
        record.pop("streams", None)
    return records


def other_attempt(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step_lines(records, 3)[1]["attempt"] = 4
    return records


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (alter_digest, r"step 3 \(line \d+ of metrics.jsonl, attempt 1\): expected digest \w+, found \w+; the next line goes "
                       r"on from the expected one: this line was altered"),
        (alter_last_digest, r"attempt 3\): expected digest .* no line follows it"),
        (invent_all_digests, r"step 1 \(.*the next line goes on from neither: other samples or other bytes were read"),
        (remove_line, r"step \d+ has no line: next is step \d+, line \d+"),
        (remove_the_end, r"checkpoint step-\d+ has digest \w+ at position \d+, but no line|outcome.json: says that attempt 3"),
        (remove_all, r"no step is in metrics.jsonl: checkpoint step-\d+ has digest \w+ at position \d+, but no line"),
        (absurd_step, r"metrics.jsonl: line \d+ is not a JSON object with a whole-number `step` that a run can have"),
        (far_step, r"step \d+ has no line|follows step \d+ of the same attempt"),
        (repeat_line, r"step \d+ has two lines: line \d+ .*, and line \d+"),
        (alter_samples, r"says \d+ samples, the plan \d+"),
        (alter_tokens, r"says \d+ tokens, with its samples there are \d+"),
        (other_attempt, r"run.json knows no such attempt"),
        (alter_repeated_digest, r"step \d+ \(line \d+ of metrics.jsonl, attempt 1\): expected digest"),
        (alter_repeated_tokens, r"attempt 1\): says \d+ tokens"),
        (remove_repeated, r"follows step \d+ of the same attempt"),
        (alter_share, r"says of its streams .*, the plan"),
        (alter_epoch, r"says of its streams .*99.0.*, the plan"),
        (remove_streams, r"step 1 .*says of its streams None, the plan"),
    ],
)  # fmt: skip
def test_a_log_that_was_tampered_with(
    copy: Path, audit: Audit, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], why: str
) -> None:
    rewrite_log(copy, change)
    code, verdict = audit(copy)
    assert code == 78
    assert verdict.startswith("not proven: ")
    assert re.search(why, verdict), verdict


def test_a_broken_line_is_named(copy: Path, audit: Audit) -> None:
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], lines[5][:20] + "\n", *lines[6:]]))
    code, verdict = audit(copy)
    assert (code, "line 6 is not a JSON object" in verdict) == (78, True)


def test_a_log_that_is_gone(copy: Path, audit: Audit) -> None:
    (copy / "metrics.jsonl").unlink()
    code, verdict = audit(copy)
    assert (code, "not proven: no step is in metrics.jsonl: checkpoint" in verdict) == (78, True)
    shutil.rmtree(copy / "checkpoints")
    code, verdict = audit(copy)
    assert (code, "outcome.json: says that attempt 3 ended after step" in verdict) == (78, True)
    (copy / "outcome.json").unlink()
    code, verdict = audit(copy)
    assert (code, "no step is in its log yet" in verdict) == (2, True)  # as of a run that has just begun


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nest(path: Path) -> None:
    path.write_text("[" * 100_000 + "\n{}\n")


@pytest.mark.parametrize(
    ("name", "damage", "code", "why"),
    [
        ("metrics.jsonl", make_directory, 78, "metrics.jsonl: a directory, where a run writes a file"),
        ("plan.json", make_directory, 78, "plan.json: a directory, where a run writes a file"),
        ("outcome.json", make_directory, 78, "outcome.json: a directory, where a run writes a file"),
        ("run.json", make_directory, 2, "no run.json"),
        ("recipe.yaml", make_directory, 2, "no recipe.yaml"),
        ("metrics.jsonl", nest, 78, "metrics.jsonl: line 1 is not a JSON object"),
        ("plan.json", nest, 78, "plan.json: altered or damaged"),
        ("outcome.json", nest, 78, "outcome.json: not what a run writes"),
        ("run.json", nest, 78, "run.json: not what a run writes"),
        ("recipe.yaml", nest, 2, "recipe.yaml.*: not valid YAML"),
        ("recipe.yaml", lambda path: path.write_bytes(b"\xff\xfe"), 2, "recipe.yaml: cannot be read .*decode"),
        ("recipe.yaml", lambda path: path.write_bytes(b""), 2, "recipe.yaml: must hold sections"),
        ("outcome.json", lambda path: path.write_bytes(b"\xff\xfe"), 78, "outcome.json: not what a run writes"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(
    copy: Path, audit: Audit, name: str, damage: Callable[[Path], object], code: int, why: str
) -> None:
    damage(copy / name)
    found, verdict = audit(copy)
    assert found == code
    assert re.search(why, verdict), verdict


def test_an_altered_loss_is_no_fault_of_the_data(copy: Path, audit: Audit) -> None:
    def alter(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in step_lines(records, 3):
            line["loss"] = 0.0
        return records

    rewrite_log(copy, alter)
    assert audit(copy)[0] == 0


def data_of(run: Path, to: Path) -> list[str]:
    """A copy of the run's datasets, and the arguments that name it."""
    datasets = json.loads((run / "run.json").read_text())["attempts"][-1]["datasets"]
    for name, place in datasets.items():
        shutil.copytree(place["directory"], to / name)
    return [word for name in datasets for word in ("--dataset", f"{name}={to / name}")]


def put(path: Path, content: bytes) -> None:
    """New bytes under the old times."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_altered_and_swapped_shards_are_named(battered: Path, audit: Audit, tmp_path: Path) -> None:
    where = data_of(battered, tmp_path / "data")
    assert audit(battered, *where)[0] == 0
    shard, other = (tmp_path / "data" / "web" / f"train-00000_00{number}.bin" for number in (1, 2))
    content = shard.read_bytes()
    put(shard, content[:600] + bytes([content[600] ^ 1]) + content[601:])
    code, verdict = audit(battered, *where)
    assert code == 78
    assert re.search(r"what it read cannot be read again: .*web/train-00000_001.bin: block 0 .* was altered", verdict)
    put(shard, (other.read_bytes() * 2)[: len(content)])
    code, verdict = audit(battered, *where)
    assert (code, "train-00000_001.bin: block 0" in verdict) == (78, True)
    shard.unlink()
    code, verdict = audit(battered, *where)
    assert (code, "train-00000_001.bin: listed in manifest.json but missing" in verdict) == (78, True)


def test_a_dataset_signed_anew_is_another_one(battered: Path, audit: Audit, tmp_path: Path) -> None:
    where = data_of(battered, tmp_path / "data")
    path = tmp_path / "data" / "code" / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]
    manifest["shard_bytes"] += 1
    document = {"fingerprint": fingerprint_of(manifest), "manifest": manifest}
    path.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
    code, verdict = audit(battered, *where)
    assert (code, "but the run read" in verdict) == (78, True)


def other_plan(run: Path) -> Plan:
    return Plan.of([segment.model_copy(update={"seed": 99}) for segment in read_plan(run).segments])


def test_an_altered_plan(copy: Path, audit: Audit) -> None:
    path = copy / "plan.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"seed":0', b'"seed":1'))
    code, verdict = audit(copy)
    assert (code, "plan.json: altered or damaged" in verdict) == (78, True)
    path.write_bytes(content)
    other = other_plan(copy)
    path.write_bytes(plan_file_bytes(other))
    code, verdict = audit(copy)
    assert (code, "plan.json is not the plan that attempt 3 put on record" in verdict) == (78, True)
    forge_run(copy, lambda attempts: [attempt.update(plan=other.hash) for attempt in attempts])
    code, verdict = audit(copy)
    assert (code, "not proven: step 1 (line" in verdict) == (78, True)


def forge_run(run: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    identity = json.loads((run / "run.json").read_text())
    change(identity["attempts"])
    (run / "run.json").write_text(json.dumps(identity))


def name_place(attempt: dict[str, Any], **changes: str) -> None:
    for place in attempt["datasets"].values():
        place.update(changes)


def move_resumption(attempt: dict[str, Any], steps: int) -> None:
    attempt["resumed_from_step"] += steps


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda attempts: move_resumption(attempts[1], 1), "another plan|two lines|began after"),
        (lambda attempts: move_resumption(attempts[1], -1), "began at position"),
        (lambda attempts: attempts[1].update(resumed_from_digest="0" * 32), "attempt 2 began from digest 0000"),
        (lambda attempts: attempts.pop(), "knows no such attempt|is not the plan"),
        (lambda attempts: attempts.pop(0), "not numbered 1, 2"),
        (lambda attempts: attempts[2].update(world_size=2), "saved by 1 workers of native, but attempt 3 had 2"),
        (lambda attempts: attempts[2].update(engine=["native"]), "attempts.2.engine"),
        (lambda attempts: attempts[0].update(resumed_from_step=3), "says only in part"),
        (lambda attempts: attempts[0].update(plan="0" * 64), "attempt 1 had another plan than plan.json"),
        (lambda attempts: attempts[1].update(plan=attempts[0]["plan"]), "attempt 2 had another plan than plan.json"),
        (lambda attempts: attempts[2].update(resumed_from_position=1), "attempt 3 began at position 1, but step"),
        (lambda attempts: attempts[1].update(resumed_from_position=1), "attempt 2 began at position 1, but step"),
        (lambda attempts: name_place(attempts[0], fingerprint="x"), "attempt 1 read dataset x, but its plan reads"),
        (lambda attempts: attempts[2]["datasets"].update(other=attempts[2]["datasets"]["web"]), "has no such stream"),
        (lambda attempts: attempts.append({**attempts[2], "attempt": 4, "resumed_from_step": 2}), "attempt 4 began at position"),
    ],
)  # fmt: skip
def test_a_forged_list_of_attempts(
    copy: Path, audit: Audit, change: Callable[[list[dict[str, Any]]], object], why: str
) -> None:
    forge_run(copy, change)
    code, verdict = audit(copy)
    assert code == 78
    assert re.search(why, verdict), verdict


def test_a_forged_checkpoint_and_a_forged_end(copy: Path, audit: Audit) -> None:
    newest = max((copy / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    for key in ("format_version", "manifest_sha256"):
        del manifest[key]
    files = manifest.pop("files")
    for change in ({"digest": "0" * 32}, {"position": 7}, {"plan": "0" * 64}):
        write_manifest(newest, manifest | change, files)
        code, verdict = audit(copy)
        assert (code, f"checkpoint {newest.name}" in verdict) == (78, True)
    (newest / "MANIFEST.json").write_text("{}")
    assert audit(copy)[0] == 78
    shutil.rmtree(newest)
    assert audit(copy)[0] == 0
    outcome = json.loads((copy / "outcome.json").read_text())
    (copy / "outcome.json").write_text(json.dumps({**outcome, "step": outcome["step"] + 1}))
    code, verdict = audit(copy)
    assert (code, "outcome.json: says that attempt 3 ended after step" in verdict) == (78, True)


def test_one_step_that_read_something_else(copy: Path, audit: Audit) -> None:
    """What a log looks like where one step read other bytes and the following ones did not."""
    told = read_told(copy)
    first = told.history.steps[0]
    data = AuditedData(
        told.plan,
        {name: place.directory for name, place in told.history.attempts[0].datasets.items()},
        told.config.data,
        0,
        first.samples * 3,
    )
    folds = [fold for stretch in stretches(data.plan, 0, data.stop_position) for fold in Auditor(data)(stretch).folds]
    assert chain(EMPTY_DIGEST, folds[0]) == first.digest

    def alter(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        digest = first.digest
        for line, fold in zip(step_lines(records, 1)[1:3], (folds[1] + 1, folds[2]), strict=True):
            digest = line["digest"] = chain(digest, fold)
        return records

    rewrite_log(copy, alter)
    code, verdict = audit(copy)
    assert code == 78
    assert "step 2 (line" in verdict
    assert "the next line goes on from the one found: the step read something else" in verdict


def test_a_fork_is_audited_from_where_it_began(
    mixture: Path, battered: Path, audit: Audit, tmp_path: Path, warm: WarmProcess
) -> None:
    origin = min((battered / "checkpoints").glob("step-*"))
    step = int(origin.name.removeprefix("step-"))
    run = tmp_path / "fork"
    arguments = [mixture, f"run.directory={run}", f"run.steps={step + 5}", "--resume", origin, "--allow-change"]
    warm.worker(*arguments, cwd=tmp_path).succeeded()
    code, verdict = audit(run)
    assert code == 0
    assert f"proven: steps {step + 1} to {step + 5} read 40 samples" in verdict
    assert f"from the digest of {origin} on" in verdict
    forge_run(run, lambda attempts: attempts[0].update(resumed_from_digest="0" * 32))
    assert audit(run)[0] == 78
    forge_run(run, lambda attempts: attempts[0].update(resumed_from_position=1))
    assert audit(run)[0] == 78


def test_images_are_audited(audit: Audit, tmp_path: Path, warm: WarmProcess) -> None:
    arguments = ["lenet-digits", "run.directory=run", "batch.global_samples=700", *QUIET]
    warm.worker(*arguments, "run.steps=3", "schedule.warmup_steps=0", cwd=tmp_path).succeeded()
    code, verdict = audit(tmp_path / "run", "--dataset", next((tmp_path / "prepared").glob("digits-*")))
    assert code == 0
    assert re.search(
        r"proven: steps 1 to 3 read 2,100 samples as planned; 1,\d\d\d samples, each read 1 or 2 times", verdict
    )


def test_packed_documents_are_audited_and_their_targets_counted(
    recipe: Path, audit: Audit, tmp_path: Path, warm: WarmProcess
) -> None:
    """How many tokens a sample has to predict is told by its documents alone."""
    arguments = [recipe, "run.directory=run", "run.steps=6", "data.packing=best_fit", "data.separate_documents=true"]
    warm.worker(*arguments, cwd=tmp_path).succeeded()
    code, verdict = audit(tmp_path / "run")
    assert code == 0, verdict

    def alter(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        step_lines(records, 1)[3]["tokens"] += 1
        return records

    rewrite_log(tmp_path / "run", alter)
    code, verdict = audit(tmp_path / "run")
    assert (code, "step 4 (line" in verdict, "tokens, with its samples there are" in verdict) == (78, True, True)


def test_a_run_that_read_altered_bytes(
    recipe_values: Callable[..., dict[str, Any]], dataset: Path, audit: Audit, tmp_path: Path, warm: WarmProcess
) -> None:
    """The bytes change after they were checked, while the run reads on, and nothing can be seen of it afterwards."""
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    shard = data / "train-00000.bin"
    content = shard.read_bytes()
    recipe = tmp_path / "recipe.yaml"
    values = recipe_values(data={"directory": str(data)})
    values["model"] = {"kind": "own_package.models_of_mine:build_alters_its_data"}
    recipe.write_text(json.dumps(values))
    env = environment(SHARD=str(shard), PYTHONPATH=str(write_user_package(tmp_path / "own")))
    warm.worker(recipe, f"run.directory={tmp_path / 'run'}", "run.steps=300", cwd=tmp_path, env=env).succeeded()
    assert shard.read_bytes() != content
    put(shard, content)
    code, verdict = audit(tmp_path / "run")
    assert code == 78
    assert "other bytes were read" in verdict


def test_what_cannot_be_audited_says_so(copy: Path, audit: Audit, tmp_path: Path) -> None:
    assert audit(tmp_path / "nowhere")[0] == 2
    code, verdict = audit(copy, "--dataset", "nobody=/tmp")
    assert (code, "the run's streams are code, web" in verdict) == (2, True)
    code, verdict = audit(copy, "--dataset", f"web={tmp_path / 'gone'}")
    assert (code, "gone: the dataset of" in verdict) == (2, True)
    forge_run(copy, lambda attempts: name_place(attempts[2], directory=f"/tmp/{'x' * 5000}"))
    code, verdict = audit(copy)
    assert (code, "x: the dataset of" in verdict) == (2, True)
    stream = StreamPart(fingerprint="0" * 64, order="streamed-1", sequence_tokens=64)
    plan = Plan.of([Segment(start_position=0, streams=(stream,), seed=0, global_samples=8)])
    (copy / "plan.json").write_bytes(plan_file_bytes(plan))
    code, verdict = audit(copy)
    assert (code, "reads a source as it comes" in verdict) == (2, True)
    assert main(["data", "order", str(copy), "--step", "1"]) == 2
    (copy / "plan.json").unlink()
    code, verdict = audit(copy)
    assert (code, "no plan.json" in verdict) == (2, True)
