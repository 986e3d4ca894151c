"""One dataset, byte for byte: whoever prepares it, in how many processes and parts, and however often they are killed."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import units
from data.build import Builder
from data.config import DataConfig
from data.prepare import Part, merge, prepare
from data.schedule import Progress
from data.store import LocalStore, read_manifest
from tests.data.data_helpers import lorem, write_images, write_jsonl
from tests.data.preparing_helpers import action, hash_of, prepare_apart, run_program, serves

SMALL_UNIT = 4000


def small(root: Path, *, documents: int = 50, **changes: object) -> dict[str, object]:
    """A corpus of four units in two groups, to be prepared in `root/made`."""
    source = root / "corpus.jsonl"
    if not source.exists():
        write_jsonl(source, [lorem(number) for number in range(documents)])
    values: dict[str, object] = {"source": f"jsonl:{source}#text", "directory": str(root / "made")}
    return values | {"validation_fraction": 0.2, "shard_bytes": 20_000} | changes


def small_images(root: Path, count: int = 40) -> dict[str, object]:
    folder = root / "photos"
    if not folder.exists():
        write_images(folder, count=count, size=(20, 20))
    return {
        "source": f"images:{folder}",
        "directory": str(root / "made"),
        "shard_bytes": 12_000,
        "validation_fraction": 0.2,
    }


@pytest.fixture
def in_small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", SMALL_UNIT)


def made_straight(config: dict[str, object], directory: Path) -> str:
    """The hash of the dataset that nothing disturbs."""
    return hash_of(prepare(DataConfig.model_validate({**config, "directory": directory}), workers=1))


@pytest.mark.parametrize("tokenizer", [pytest.param("bytes", marks=pytest.mark.long), "bpe:300"])
def test_the_bytes_do_not_depend_on_workers_or_parts(tmp_path: Path, tokenizer: str) -> None:
    config = small(tmp_path, tokenizer=tokenizer, documents=200, shard_bytes=20_000 if tokenizer == "bytes" else 5000)
    hashes = set()
    for workers in (1, 2, 3):
        directory = tmp_path / f"workers-{workers}"
        prepare_apart(config | {"directory": directory}, workers=workers)
        hashes.add(hash_of(directory))
    for parts in (1, 2, 3):
        directory = tmp_path / f"parts-{parts}"
        for number in random.Random(parts).sample(range(1, parts + 1), parts):
            told = prepare_apart(config | {"directory": directory}, part=f"{number}/{parts}")
            assert f"part {number} of {parts}: " in told
            assert not directory.exists()
        merge(directory, workers=1)
        hashes.add(hash_of(directory))
    assert len(hashes) == 1
    manifest = read_manifest(LocalStore(directory))
    names = {shard.data.name[: len("train-00000")] for shard in manifest.splits["train"].shards}
    assert len(names) > 2  # several groups
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".preparing")]


SWEEP = """
inside()
before, killed, after, expected, made = json.loads(sys.argv[1])
import hashlib, shutil
from tests.data.preparing_helpers import hash_of
made = Path(made)
home, lock = (made.parent / f".{made.name}.{what}" for what in ("preparing", "lock"))
number = moments = 0
while True:
    number += 1
    for path in (made, home):
        if path.exists():
            shutil.rmtree(path)
    for one in before:
        in_child(one, 0)
    ended = in_child(killed, number)
    if not ended:
        moments += 1
        assert not made.exists() or hash_of(made) == expected, f"half a dataset after call {number}"
        for one in [killed, *after]:
            in_child(one, 0)
    else:
        for one in after:
            in_child(one, 0)
    assert hash_of(made) == expected, f"other bytes after a kill at call {number}"
    assert not home.exists() and not lock.exists(), f"left over after a kill at call {number}"
    if ended:
        break
print("killed at", moments, "moments")
"""


def sweep(tmp_path: Path, config: dict[str, object], what: str) -> int:
    """Kill a preparation, a part or a merge at each of its calls that alter a directory; the number of these."""
    expected = made_straight(config, tmp_path / "straight")
    whole = action(config)
    first, second = (action(config, part=f"{number}/2") for number in (1, 2))
    merging = action(config, do="merge")
    before, killed, after = {
        "prepare": ([], whole, []),
        "part": ([first], second, [merging]),
        "merge": ([first, second], merging, []),
        "prepare after parts": ([first], whole, []),
    }[what]
    done = run_program(SWEEP, [before, killed, after, expected, config["directory"]])
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-2])


@pytest.mark.usefixtures("in_small_units")
@pytest.mark.parametrize(
    ("kind", "what", "least"),
    [
        ("text", "prepare", 50),
        ("text", "part", 20),
        ("text", "merge", 15),
        pytest.param("text", "prepare after parts", 40, marks=pytest.mark.long),
        pytest.param("bpe", "prepare", 50, marks=pytest.mark.long),
        pytest.param("images", "prepare", 50, marks=pytest.mark.long),
        pytest.param("images", "merge", 10, marks=pytest.mark.long),
    ],
)
def test_killed_at_every_moment_and_started_again_gives_the_same_bytes(
    tmp_path: Path, kind: str, what: str, least: int
) -> None:
    config = small_images(tmp_path, 18) if kind == "images" else small(tmp_path)
    if kind == "bpe":
        config |= {"tokenizer": "bpe:300", "shard_bytes": 4000}
    assert sweep(tmp_path, config, what) >= least


# The parent, or one of its two workers, is killed when so many documents are told of; the pids of the workers are printed.
KILL_WHILE_WORKING = """
one, who, documents = json.loads(sys.argv[1])
import data.child, data.prepare
pids = []
started = data.child.Child.__init__
def start(self, *arguments):
    started(self, *arguments)
    pids.append(self.pid)
data.child.Child.__init__ = start
def watch(progress):
    if progress.documents >= documents and documents:
        globals()["documents"] = 0
        print(*pids, flush=True)
        os.kill(pids[0] if who == "worker" else os.getpid(), signal.SIGKILL)
data.prepare.prepare(DataConfig.model_validate_json(json.dumps(one["config"])), workers=2, watch=watch)
"""


@pytest.mark.parametrize(("who", "documents"), [("worker", 10), ("parent", 40), ("worker", 90), ("parent", 150)])
def test_killed_with_workers(tmp_path: Path, who: str, documents: int) -> None:
    config = small(tmp_path, documents=200)
    prepare_apart(config | {"directory": str(tmp_path / "straight")}, workers=1)
    done = run_program(KILL_WHILE_WORKING, [action(config), who, documents])
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    if who == "worker":
        assert done.returncode == 1
        assert "ValueError: a worker process that prepares data was killed by SIGKILL" in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(serves(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.01)
    assert not (tmp_path / "made").exists()
    told = prepare_apart(config, workers=2)
    if documents > 10:  # and so more than what the two units hold that both workers may just be at
        assert "going on; " in told
    assert hash_of(tmp_path / "made") == hash_of(tmp_path / "straight")
    assert not (tmp_path / ".made.preparing").exists()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, in_small_units: None) -> list[int]:
    """Preparations in this process. The list fills with the numbers of the units that are made."""
    from data import prepare as module

    real, build = module.work_through, Builder.build_unit
    made: list[int] = []

    def counted(self: Builder, number: int, *arguments: Any) -> Any:
        record = build(self, number, *arguments)
        made.append(number)
        return record

    monkeypatch.setattr(Builder, "build_unit", counted)
    monkeypatch.setattr(module, "work_through", lambda schedule, job, processes: real(schedule, job, 0))
    return made


def stop_after(documents: int) -> Callable[[Progress], None]:
    """Ctrl-C once so many documents are there."""

    def watch(progress: Progress) -> None:
        if progress.documents >= documents:
            raise KeyboardInterrupt

    return watch


def interrupted(config: dict[str, object], documents: int) -> Path:
    """Prepare, with Ctrl-C on the way; the workspace that is left."""
    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig.model_validate(config), watch=stop_after(documents))
    (workspace,) = (Path(str(config["directory"])).parent / ".made.preparing").iterdir()
    return workspace


def test_what_was_finished_is_not_done_again(tmp_path: Path, inside: list[int]) -> None:
    config = small(tmp_path, documents=120)
    expected = made_straight(config, tmp_path / "straight")
    every = sorted(inside)
    inside.clear()
    workspace = interrupted(config, 100)
    assert len(list((workspace / "groups").iterdir())) > 1
    assert not (tmp_path / "made").exists()
    told: list[str] = []
    seen: list[Progress] = []
    prepare(DataConfig.model_validate(config), watch=seen.append, tell=told.append)
    assert sorted(inside) == every  # each once, though there were two calls
    assert re.search(r"going on; [2-9] of \d+ groups and \d units of others were finished before", told[0])
    assert seen[-1].documents == 120
    assert seen[-1].read_bytes == seen[-1].input_bytes
    assert 0 < seen[-1].found_bytes < seen[-1].size_bytes
    assert hash_of(tmp_path / "made") == expected


def test_another_source_or_option_starts_anew_and_says_so(tmp_path: Path, inside: list[int]) -> None:
    config = small(tmp_path)
    for change in ({}, {"validation_fraction": 0.3}, {"shard_bytes": 9000}, {"tokenizer": "bpe:300"}):
        interrupted(config, 20)
        if not change:
            write_jsonl(tmp_path / "corpus.jsonl", [lorem(number) for number in range(1, 50)])
        told: list[str] = []
        with pytest.raises(ValueError, match="remove it and start all of them again"):
            prepare(DataConfig.model_validate(config | change), part=Part(1, 2))
        prepare(DataConfig.model_validate(config | change), tell=told.append)
        assert "the source or an option has changed since this was begun: starting anew" in told[0]
        assert hash_of(tmp_path / "made") == made_straight(config | change, tmp_path / "straight")
        shutil.rmtree(tmp_path / "made")
        shutil.rmtree(tmp_path / "straight")


def forge(path: Path) -> None:
    """Alter what a record says, and give it the hash that fits."""
    document = json.loads(path.read_text())
    record = document["record"]
    if path.name == "tokenizer.json":
        record["entry"]["end_of_document"] = 5
    elif path.parent.name == "units":
        record["content"]["documents"] += 1
    else:
        shard = record["splits"]["train"][0]
        shard["documents"] += 1
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"hash": hashlib.sha256(body.encode()).hexdigest(), "record": record}))


def damages(path: Path) -> list[tuple[str, Callable[[], object]]]:
    """Ways of damaging a file of the workspace."""
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    ways: list[tuple[str, Callable[[], object]]] = [
        ("flipped", lambda: path.write_bytes(flipped)),
        ("cut", lambda: path.write_bytes(content[: len(content) // 2])),
        ("empty", lambda: path.write_bytes(b"")),
        ("missing", path.unlink),
        ("grown", lambda: path.write_bytes(content + b"0")),
    ]
    if path.suffix == ".json" and path.name != "plan.json" and path.parent.name != "dataset":
        ways.append(("forged", lambda: forge(path)))
    return ways


@pytest.mark.parametrize(
    "kind",
    ["text", pytest.param("images", marks=pytest.mark.long), pytest.param("bpe", marks=pytest.mark.long)],
)
def test_nothing_in_the_workspace_is_believed(tmp_path: Path, inside: list[int], kind: str) -> None:
    config = small_images(tmp_path) if kind == "images" else small(tmp_path, documents=70)
    config |= {"tokenizer": "bpe:300", "shard_bytes": 5000} if kind == "bpe" else {}
    expected = made_straight(config, tmp_path / "straight")
    whole = len(inside)
    workspace = interrupted(config, 36 if kind == "images" else 50)
    kept = shutil.copytree(workspace.parent, tmp_path / "kept")
    files = sorted(path.relative_to(workspace) for path in workspace.rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} >= {"units", "groups", "dataset", "plan.json"}
    for file in files:
        if file.parts[0] == "temporary":
            continue
        for name, damage in damages(workspace / file):
            damage()
            inside.clear()
            prepare(DataConfig.model_validate(config))
            assert hash_of(tmp_path / "made") == expected, f"{file} {name}"
            assert 0 < len(inside) <= whole
            shutil.rmtree(tmp_path / "made")
            shutil.copytree(kept, workspace.parent)


def test_a_link_in_the_place_of_a_shard_is_not_followed(tmp_path: Path, inside: list[int]) -> None:
    config = small(tmp_path, documents=70)
    expected = made_straight(config, tmp_path / "straight")
    workspace = interrupted(config, 50)
    shard = next((workspace / "dataset").glob("train-*.bin"))
    shutil.move(shard, tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    prepare(DataConfig.model_validate(config))
    assert hash_of(tmp_path / "made") == expected
    assert not any(path.is_symlink() for path in (tmp_path / "made").iterdir())


def test_merge_names_the_parts_to_run_again(tmp_path: Path, inside: list[int]) -> None:
    config = DataConfig.model_validate(small(tmp_path, documents=200))
    expected = made_straight(small(tmp_path), tmp_path / "straight")
    made = tmp_path / "made"
    with pytest.raises(ValueError, match="nothing was prepared for it; run `lockstep prepare"):
        merge(made)
    assert not (tmp_path / ".made.lock").exists()
    for number in (1, 3):
        prepare(config, part=Part(number, 4))
    with pytest.raises(ValueError, match=r"groups are missing \(1, 3, 5.*run --part 2/4 --part 4/4 again, then merge"):
        merge(made)
    for number in (2, 4):
        prepare(config, part=Part(number, 4))
    (workspace,) = (tmp_path / ".made.preparing").iterdir()
    shard = workspace / "dataset" / "train-00002.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"1 of \d+ groups are damaged \(2\); run --part 3/4 again"):
        merge(made)
    inside.clear()
    prepare(config, part=Part(3, 4))
    assert 0 < len(inside) <= 3  # the damaged group alone
    (workspace / "dataset" / "foreign.txt").write_text("not part of it")
    assert merge(made)
    assert not merge(made)  # again: there is nothing left to do
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".made")]
    assert hash_of(made) == expected
    assert prepare(config, part=Part(1, 4)) == made


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", ""])
def test_parts_are_numbered_from_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be I/N with I from 1 to N, such as 1/8"):
        Part.parse(text)
    assert Part.parse("4/4") == Part(4, 4)


def test_a_file_that_changes_on_the_way_is_noticed(tmp_path: Path, inside: list[int]) -> None:
    config = DataConfig.model_validate(small(tmp_path, documents=70))

    def touch(progress: Progress) -> None:
        os.utime(tmp_path / "corpus.jsonl", ns=(1, 1))

    with pytest.raises(ValueError, match=r"corpus.jsonl: was changed while it was being prepared; prepare again"):
        prepare(config, watch=touch)
