"""`lockstep data info|verify|order`: what they say of real datasets, whole and broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.config import DataConfig
from data.dataset import open_dataset
from data.packing import ensure_packing, head_name
from data.plan import Plan
from data.prepare import prepare
from data.store import LocalStore
from data.stream import Stream
from data.tokenizers import load_tokenizer
from launch.cli import main
from launch.planning import segment_of
from launch.recipe import load_recipe
from tests.data.data_helpers import lorem, prepared_tokens, write_images, write_jsonl
from tests.data.faulty_server import serving

Say = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """The exit code and the lines of `lockstep data ...`, on a terminal of 100 characters."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["data", *map(str, words)])
        shown = capsys.readouterr()
        return code, (shown.out + shown.err).splitlines()

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    source = write_jsonl(root / "texts.jsonl", ["\x1b[31mred\nline two", *[lorem(number) for number in range(40)]])
    directory, config = prepared_tokens(root, source=f"jsonl:{source}#text", shard_bytes=3000)
    ensure_packing(LocalStore(directory), config.model_copy(update={"packing": "best_fit"}))
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    folder = write_images(root / "images", count=20, size=(12, 8))
    return prepare(DataConfig(source=f"images:{folder}", directory=root / "prepared", validation_fraction=0.4))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_manifest(tmp_path: Path, say: Say, make: Callable[[Path], None]) -> None:
    make(tmp_path / "manifest.json")
    code, lines = say("info", tmp_path)
    assert code == 78
    assert f"{tmp_path}/manifest.json: not a regular file" in lines[-1]


def test_info_of_texts(texts: Path, say: Say) -> None:
    manifest = json.loads((texts / "manifest.json").read_text())
    code, lines = say("info", texts, "--examples", 100)
    assert code == 0
    assert f"fingerprint  {manifest['fingerprint']}" in lines
    assert "tokenizer    bytes: 257 tokens, 256 ends a document" in lines
    train = manifest["manifest"]["splits"]["train"]
    row = next(line for line in lines if line.startswith("train  ")).replace(",", "").split()
    size = sum(path.stat().st_size for path in texts.glob("train-*"))
    assert row == ["train", str(train["documents"]), str(train["tokens"]), str(size), str(len(train["shards"]))]
    shown = [line for line in lines if ": " in line and line.startswith(("train ", "validation "))]
    assert len(shown) == 41
    (red,) = (line for line in shown if "red" in line)
    assert red.endswith("tokens: \\x1b[31mred\\nline two")
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


def test_info_of_one_split_and_of_images(texts: Path, images: Path, say: Say) -> None:
    lines = say("info", texts, "--split", "validation", "--examples", 0)[1]
    assert [line.split()[0] for line in lines[-2:]] == ["split", "validation"]
    code, lines = say("info", texts, "--split", "test")
    assert (code, "no such split, only train, validation" in lines[-1]) == (2, True)
    code, lines = say("info", images, "--examples", 2)
    assert code == 0
    assert "classes      2: cat, dog" in lines
    assert "images       colour, 12 x 8 pixels" in lines
    assert sum(line.startswith("train ") and "12 x 8 pixels, RGB, " in line for line in lines) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_lists_every_problem(texts: Path, tmp_path: Path, say: Say, workers: int) -> None:
    directory = Path(shutil.copytree(texts, tmp_path / "copy"))
    code, lines = say("verify", directory, "--workers", workers)
    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith(f"{directory}: good; ")
    for name in ("train-00000_001.bin", "validation-00000.docs", "packing-best_fit-T16-train-00000.index"):
        content = bytearray((directory / name).read_bytes())
        content[9] ^= 4
        (directory / name).write_bytes(content)
    (directory / "train-00000_002.docs").unlink()
    (directory / "train-00000_003.bin").write_bytes(b"short")
    (directory / "notes.txt").write_text("mine")
    code, lines = say("verify", directory, "--workers", workers)
    assert code == 78
    problems = [line for line in lines if line.startswith("BAD: ")]
    for name, why in (
        ("train-00000_001.bin", "block 0 of 1 (1 MiB each) altered"),
        ("validation-00000.docs", "block 0 of 1"),
        ("packing-best_fit-T16-train-00000.index", "block 0 of 1"),
        ("train-00000_002.docs", "missing"),
        ("train-00000_003.bin", "bytes short of"),
    ):
        assert sum(name in problem and why in problem for problem in problems) == 1
    assert len(problems) == 5
    assert f"not listed: {directory / 'notes.txt'} is not of the dataset; nothing reads it" in lines
    assert lines[-1].startswith(f"{directory}: BAD: 5 problems; ")


def flip(path: Path, at: int = 9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_reads_what_lies_at_the_address_and_not_what_the_cache_kept(
    texts: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for variable in ("XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr("tempfile.tempdir", None)  # found out once a process
    directory = Path(shutil.copytree(texts, tmp_path / "copy"))
    with serving(directory) as server:
        assert say("info", server.address, "--examples", 100)[0] == 0  # fills the cache
        kept = sorted((tmp_path / "XDG_CACHE_HOME" / "lockstep" / "shards" / "files").iterdir())
        assert len(kept) > 10
        server.requests.clear()
        assert say("verify", server.address, "--workers", workers)[0] == 0
        assert all(count == 1 for name, count in server.requests.items() if name.startswith(("train", "validation")))
        shards = sorted(directory.glob("train-*.bin"))
        for shard in shards:
            flip(shard)
        code, lines = say("verify", server.address, "--workers", workers)
    assert code == 78
    for shard in shards:
        (line,) = (line for line in lines if f"/{shard.name}: " in line)
        assert line.startswith(f"BAD: {server.address}/")
        assert "never what the manifest lists" in line
    assert f": BAD: {len(shards)} problems; " in lines[-1]
    assert sorted((tmp_path / "XDG_CACHE_HOME" / "lockstep" / "shards" / "files").iterdir()) == kept
    assert list((tmp_path / "TMPDIR").iterdir()) == []


def test_verify_of_an_address_reads_its_packing_indexes(texts: Path, tmp_path: Path, say: Say) -> None:
    directory = Path(shutil.copytree(texts, tmp_path / "copy"))
    (directory / "notes of mine.txt").write_text("mine")
    not_checked = "cannot be listed, so that only what its manifest lists was read; name its packing indexes by --pack"
    with serving(directory, lists=True) as listing, serving(directory) as silent:
        for address in (f"file://{directory}", listing.address):
            code, lines = say("verify", address, "--workers", 1)
            assert code == 0
            assert lines[0] == f"not listed: {address}/notes of mine.txt is not of the dataset; nothing reads it"
            assert len(lines) == 2
        code, lines = say("verify", silent.address, "--workers", 1)
        assert (code, len(lines)) == (0, 2)
        assert lines[0].startswith(f"not checked: {silent.address} {not_checked}")
        flip(directory / "packing-best_fit-T16-train-00000.index")
        for words in ([f"file://{directory}"], [listing.address], [silent.address, "--pack-tokens", 16]):
            code, lines = say("verify", *words, "--workers", 1)
            assert code == 78
            (problem,) = (line for line in lines if line.startswith("BAD: "))
            assert f"{words[0]}/packing-best_fit-T16-train-00000.index: " in problem
        assert say("verify", silent.address, "--workers", 1)[0] == 0
        flip(directory / "packing-best_fit-T16.json", 40)
        for words in ([f"file://{directory}"], [silent.address, "--pack-tokens", 16]):
            code, lines = say("verify", *words, "--workers", 1)
            assert code == 78
            assert "packing-best_fit-T16.json: altered or damaged" in lines[0]
        assert say("verify", silent.address, "--workers", 1, "--pack-tokens", 99)[0] == 78
    assert say("verify", texts, "--workers", 1, "--pack-tokens", 16)[0] == 0
    assert say("verify", texts, "--workers", 1, "--pack-tokens", 99)[0] == 78


def test_verify_of_what_is_no_dataset(tmp_path: Path, images: Path, say: Say) -> None:
    assert say("verify", tmp_path)[0] == 2
    assert say("verify", images, "--workers", 1)[0] == 0
    directory = Path(shutil.copytree(images, tmp_path / "copy"))
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"cat", b"cow"))
    assert say("verify", directory)[0] == 78


@pytest.fixture
def recipe(texts: Path, tmp_path: Path) -> Path:
    """A mixture of the texts and of others, with a small batch."""
    source = write_jsonl(tmp_path / "more.jsonl", [lorem(number) for number in range(50, 90)])
    other, _ = prepared_tokens(tmp_path, source=f"jsonl:{source}#text", shard_bytes=3000)
    of_texts = json.loads((texts / "manifest.json").read_text())["manifest"]["sources"][0]["address"]
    values = {
        "run": {"name": "x", "steps": 10},
        "model": {"kind": "transformer", "layers": 1, "width": 16, "heads": 2},
        "task": {"kind": "language_modelling"},
        "data": {
            "sequence_tokens": 16,
            "validation_fraction": 0.2,
            "shard_bytes": 3000,
            "order": "windowed",
            "lanes": 3,
            "window_shards": 2,
            "streams": {
                "one": {"source": of_texts, "directory": str(texts), "weight": 2},
                "two": {"source": f"jsonl:{source}#text", "directory": str(other), "weight": 1},
            },
        },
        "batch": {"global_samples": 10, "micro_samples": 2},
        "optimizer": {"lr": 0.001},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cells(lines: list[str]) -> list[dict[str, str]]:
    title = lines[1].replace("micro-batch", "batch").split()
    return [
        dict(zip(title, line.replace(" (weight 0)", "*").split(maxsplit=len(title) - 1), strict=True))
        for line in lines[2:]
    ]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_order_is_what_the_stream_reads(recipe: Path, say: Say, world_size: int) -> None:
    config = load_recipe(str(recipe))
    streams = config.data.by_stream()
    datasets = {name: open_dataset(LocalStore(stream.directory), stream, "train") for name, stream in streams.items()}  # type: ignore[arg-type]
    tokenizer = load_tokenizer(LocalStore(streams["one"].directory))  # type: ignore[arg-type]
    plan = Plan.of([segment_of(config, datasets)])
    code, lines = say("order", recipe, "--step", 4, "--world", world_size, "--decode")
    assert code == 0
    assert lines[0] == f"step 4: positions 30 to 39, 10 samples, plan {plan.hash[:12]}"
    shown = cells(lines)
    for rank in range(world_size):
        stream = Stream(
            datasets,
            plan,
            rank=rank,
            world_size=world_size,
            micro_samples=2,
            position=30,
            stop_position=40,
            count_items=lambda _: 1,
            reduce_items=lambda counts: counts,
        )
        (step,) = stream
        expected = []
        for number, batch in enumerate(step.micro_batches):
            assert batch.streams is not None
            for slot, sample_id in enumerate(batch.sample_ids.tolist()):
                name = plan.streams[int(batch.streams[slot])].name
                ends = np.cumsum(datasets[name].shard_samples)
                shard = int(np.searchsorted(ends, sample_id, side="right"))
                text = tokenizer.decode(batch.tensors["tokens"][slot].tolist())
                expected.append(
                    {
                        "rank": str(rank),
                        "batch": f"{number}{'' if batch.weight else '*'}",
                        "position": str(batch.positions[slot]),
                        "stream": name,
                        "sample": str(sample_id),
                        "shard": f"train-00000_{shard:03d}.bin" if shard else "train-00000.bin",
                        "row": str(sample_id - (ends[shard] - datasets[name].shard_samples[shard])),
                        "content": text.replace("\n", "\\n").strip(),
                    }
                )
        stream.close()
        found = [row for row in shown if row["rank"] == str(rank)]
        assert [{**row, "epoch": "", "content": row["content"].strip()} for row in found] == [
            {**row, "epoch": ""} for row in expected
        ]
    alone = cells(say("order", recipe, "--step", 4)[1])
    assert [row["position"] for row in alone] == [row["position"] for row in shown if not row["batch"].endswith("*")]


def test_order_of_a_far_step_and_with_overrides(recipe: Path, say: Say) -> None:
    code, lines = say("order", recipe, "--step", 10**15, "batch.global_samples=3")
    assert code == 0
    assert lines[0].startswith(
        "step 1,000,000,000,000,000: positions 2,999,999,999,999,997 to 2,999,999,999,999,999, 3 "
    )
    assert say("order", recipe, "--step", 10**15, "batch.global_samples=3")[1] == lines
    assert say("order", recipe, "--step", 10**15, "batch.global_samples=3", "run.seed=1")[1][2:] != lines[2:]


def test_order_of_more_workers_than_samples(recipe: Path, say: Say) -> None:
    code, lines = say("order", recipe, "--step", 4, "--world", 20_000)
    assert code == 0
    shown = cells(lines)
    assert len(shown) == 20_000
    assert sorted(int(row["position"]) for row in shown if not row["batch"].endswith("*")) == [*range(30, 40)]


def test_order_that_nobody_reads_to_its_end_ends_quietly(recipe: Path) -> None:
    words = [Path(sys.executable).parent / "lockstep", "data", "order", recipe, "--step", "4", "--world", "20000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"step 4: ")
    process.stdout.close()
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 1


def test_order_of_images(images: Path, tmp_path: Path, say: Say) -> None:
    manifest = json.loads((images / "manifest.json").read_text())["manifest"]
    given = {
        "data.source": manifest["sources"][0]["address"],
        "data.directory": images,
        "data.validation_fraction": 0.4,
        "batch.global_samples": 5,
        "batch.micro_samples": 5,
    }
    words = [f"{key}={value}" for key, value in given.items()]
    code, lines = say("order", "lenet-digits", *words, "--step", 2, "--decode")
    assert code == 0
    assert all("12 x 8 pixels, RGB" in line for line in lines[2:])
    assert {row["content"].split()[0] for row in cells(lines)} <= {"cat", "dog"}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--step", "0"], "--step 0: must be at least 1"),
        (["--step", "1", "--world", "0"], "--world 0: must be at least 1"),
        (["--step", "1", "--world", str(10**12)], "--world 1000000000000: at most 1048576"),
        (["--step", "1", "--micro-samples", "2"], "--micro-samples 2: has no effect without --world"),
        (["--step", "1", "--world", "2", "--micro-samples", "11"], "--micro-samples 11: the step has 10 samples"),
        (["--step", str(10**30)], "lies beyond 2^62 samples"),
        (["--step", "1", "--dataset", "somewhere"], "--dataset somewhere: is for a run"),
        (["--step", "1", "data.lanes=100000"], "data.lanes 100000"),
        (["--step", "1", "data.streams.two.directory=nowhere"], "nowhere: jsonl:"),
    ],
)
def test_order_refuses_in_a_line(recipe: Path, say: Say, words: list[str], part: str) -> None:
    code, lines = say("order", recipe, *words)
    assert code == 2
    assert part in lines[-1]


def test_they_need_no_torch(texts: Path) -> None:
    for words in (["info", texts], ["verify", texts, "--workers", "1"], ["order", "--help"], ["audit", "--help"]):
        code = (
            "import sys; from launch.cli import main\n"
            "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code, "data", *words], check=True)


def test_documents_are_packed_when_a_dataset_is_prepared(
    texts: Path, tmp_path: Path, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((texts / "manifest.json").read_text())["manifest"]["sources"][0]["address"]
    words = ["prepare", source, "--out", str(tmp_path / "packed"), "--pack-tokens", "16", "--pack-tokens", "24"]
    assert main(words) == 0
    heads = [tmp_path / "packed" / head_name(tokens) for tokens in (16, 24)]
    assert all(head.is_file() for head in heads)
    assert say("verify", tmp_path / "packed")[0] == 0
    parts = [["prepare", source, "--out", str(tmp_path / "parts"), "--part", f"{part}/2"] for part in (1, 2)]
    assert [main(part) for part in parts] == [0, 0]
    assert main(["data", "merge", str(tmp_path / "parts"), "--pack-tokens", "16", "--pack-tokens", "24"]) == 0
    for head in heads:
        assert (tmp_path / "parts" / head.name).read_bytes() == head.read_bytes()
    assert main([*parts[0], "--pack-tokens", "16"]) == 2
    with pytest.raises(SystemExit):
        main([*words[:-1], "0"])
    told = capsys.readouterr().err
    assert "give it to `lockstep data merge`" in told
    assert "--pack-tokens: 0: must be a whole number of at least 1" in told


def test_a_merge_of_what_was_merged_before_claims_to_have_verified_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", [lorem(number) for number in range(40)])
    made = tmp_path / "made"
    assert main(["prepare", f"jsonl:{source}#text", "--out", str(made), "--part", "1/1"]) == 0
    capsys.readouterr()
    assert main(["data", "merge", str(made)]) == 0
    assert capsys.readouterr().out.startswith(f"merged {made}: every byte verified in ")
    flip(made / "train-00000.bin")
    assert main(["data", "merge", str(made)]) == 0
    told = f"{made}: was made before; `lockstep data verify {made}` reads its bytes"
    assert capsys.readouterr().out.splitlines() == [told, str(made)]
    assert main(["data", "verify", str(made), "--workers", "1"]) == 78


def test_only_text_is_prepared_with_a_tokenizer(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = json.loads((images / "manifest.json").read_text())["manifest"]["sources"][0]["address"]
    texts = f"jsonl:{write_jsonl(tmp_path / 'texts.jsonl', [lorem(number) for number in range(40)])}#text"
    for name, source, words in (("images", pictures, ""), ("texts", texts, " (tokenizer bytes)")):
        assert main(["prepare", source, "--out", str(tmp_path / name), "--validation-fraction", "0.4"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"preparing {source}{words}, once"


def test_a_file_is_no_dataset(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = json.loads((texts / "manifest.json").read_text())["manifest"]["sources"][0]["address"]
    path = tmp_path / "one.txt"
    path.write_text("mine")
    for command in (["prepare", source, "--out"], ["data", "merge"], ["data", "verify"], ["data", "info"]):
        assert main([*command, str(path)]) == 2
        told = capsys.readouterr().err
        assert told == f"lockstep: error: {path}: is a file, and a dataset is a directory; name another\n"
    assert [file.name for file in tmp_path.iterdir()] == ["one.txt"]
    assert path.read_text() == "mine"
