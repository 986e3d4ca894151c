"""Preparation: whole or not at all, the same bytes every time, and a split that does not look at order."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.build import split_of
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData
from data.naming import prepared_directory
from data.prepare import Part, prepare
from data.schedule import Progress
from data.store import LocalStore, read_manifest
from tests.data.data_helpers import contents, lorem, token_config, write_jsonl

PREPARE = """
import sys
from pathlib import Path
from data.config import DataConfig
from data.prepare import prepare
config = DataConfig(source=sys.argv[1], directory=Path(sys.argv[2]), validation_fraction=0.2, shard_bytes=20000)
print(prepare(config))
"""


def test_several_processes_at_once_make_one_dataset(tmp_path: Path) -> None:
    source = f"jsonl:{write_jsonl(tmp_path / 'corpus.jsonl', [lorem(number) for number in range(2000)])}#text"
    command = [sys.executable, "-c", PREPARE, source, str(tmp_path / "shared")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], printed
    assert {out.strip() for out, _ in printed} == {str(tmp_path / "shared")}
    config = DataConfig(sequence_tokens=16)
    assert open_dataset(LocalStore(tmp_path / "shared"), config, "train").samples > 1000
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "shared"]


def test_a_prepared_dataset_is_used_as_it_is(tmp_path: Path) -> None:
    config = token_config(tmp_path)
    directory = prepare(config)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    Path(config.source.removeprefix("jsonl:").removesuffix("#text")).unlink()  # not needed any more
    assert prepare(config) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    other = config.model_copy(update={"validation_fraction": 0.3})
    with pytest.raises(ValueError, match=r"prepared with data.validation_fraction 0.2, but the recipe has 0.3"):
        prepare(other)
    assert contents(directory).keys() == before.keys()


def test_what_lies_in_the_way_is_left_alone(tmp_path: Path) -> None:
    config = token_config(tmp_path)
    assert config.directory is not None
    config.directory.mkdir()
    (config.directory / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a prepared dataset"):
        prepare(config)
    assert (config.directory / "thesis.txt").read_text() == "precious"
    (config.directory / "thesis.txt").unlink()
    assert prepare(config) == config.directory  # an empty directory is no obstacle
    (config.directory / "manifest.json").write_text("{")
    with pytest.raises(CorruptData, match="altered or damaged"):
        prepare(config)


def test_a_place_that_no_dataset_can_take_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "empty")
    for place, message in (
        ("/proc", r"^/proc: is a mount point, which no dataset can replace; give a directory below it$"),
        (tmp_path / "link", r"link: is a link, which no dataset can replace; give what it leads to \(.*empty\)"),
        (tmp_path / "nowhere", r"nowhere: is a link, which"),
        (".", r"^\.: a dataset's directory needs a name of its own"),
        ("..", r"^\.\.: a dataset's directory needs a name of its own"),
    ):
        config = DataConfig(source=f"text:{tmp_path}/no such file", directory=Path(place))
        for work in (lambda config=config: prepare(config), lambda config=config: prepare(config, part=Part(1, 2))):
            with pytest.raises(ValueError, match=message):
                work()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "nowhere"]
    config = token_config(tmp_path)
    (tmp_path / "made").symlink_to(prepare(config))  # a link to what is made is as good as that
    assert prepare(config.model_copy(update={"directory": tmp_path / "made"})) == tmp_path / "made"


def test_a_source_of_several_splits_is_told(tmp_path: Path) -> None:
    texts = f"jsonl:{write_jsonl(tmp_path / 'corpus.jsonl', [lorem(number) for number in range(60)])}#text"
    for number, (sources, where) in enumerate(
        (
            ((f"train={texts}", f"validation={texts}"), "for train and for validation"),
            ((texts, f"test={texts}"), "for train and validation and for test"),
            ((f"train={texts}", f"train={texts}", "validation=stdlib"), None),
        )
    ):
        told: list[str] = []
        prepare(DataConfig(source=sources, directory=tmp_path / str(number)), tell=told.append)
        warnings = [line for line in told if line.startswith("warning: ")]
        text = f"warning: source {texts} is given {where}: the same documents are in several splits"
        assert warnings == ([text] if where else [])


def test_the_derived_name_follows_all_that_determines_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "corpus.jsonl", [lorem(number) for number in range(60)])
    config = DataConfig(source="jsonl:corpus.jsonl#text", validation_fraction=0.2)
    changes = [
        {"tokenizer": "bpe:300"},
        {"validation_fraction": 0.3},
        {"shard_bytes": 9000},
        {"source": f"text:{source}"},
    ]
    names = {prepared_directory(config.model_copy(update=change)) for change in [{}, *changes]}
    same = [{"sequence_tokens": 9}, {"prefetch_steps": 5}, {"image_size_pixels": 3}]
    names |= {prepared_directory(config.model_copy(update=change)) for change in same}
    assert len(names) == 5
    first = prepare(config)
    assert first.parent == Path("prepared")
    assert first.name.startswith("jsonl-corpus-jsonl-text-")
    write_jsonl(source, [lorem(number) for number in range(70)])
    second = prepare(config)
    assert second != first  # another corpus under the same name is another dataset
    assert read_manifest(LocalStore(first)).fingerprint != read_manifest(LocalStore(second)).fingerprint
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("1")
    by_file = config.model_copy(update={"tokenizer": str(tokenizer)})
    before = prepared_directory(by_file)
    tokenizer.write_text("2")
    assert prepared_directory(by_file) != before


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    texts = [lorem(number) for number in range(60)]
    fingerprints = []
    for name in ("a", "b"):
        source = write_jsonl(tmp_path / "corpus.jsonl", texts)
        os.utime(source, ns=(time.time_ns(), 1 if name == "a" else 2))
        config = DataConfig(source=f"jsonl:{source}#text", directory=tmp_path / name, validation_fraction=0.2)
        fingerprints.append(read_manifest(LocalStore(prepare(config))).fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_the_split_does_not_depend_on_order_or_neighbours(tmp_path: Path) -> None:
    texts = [lorem(number) for number in range(200)]
    held_out = {text for text in texts if split_of(text.encode(), 0.2) == "validation"}
    assert 20 < len(held_out) < 60
    more = {text for text in texts if split_of(text.encode(), 0.3) == "validation"}
    assert held_out < more  # a larger fraction only adds documents
    random.Random(3).shuffle(texts)
    for name, corpus in (("shuffled", texts), ("half", texts[:100])):
        directory = tmp_path / name
        source = write_jsonl(tmp_path / f"{name}.jsonl", corpus)
        prepare(DataConfig(source=f"jsonl:{source}#text", directory=directory, validation_fraction=0.2))
        stored = b"".join((directory / "validation-00000.bin").read_bytes()[::2].split(b"\x00"))
        for text in corpus:
            assert (text.encode() in stored) == (text in held_out)


def test_shards_are_cut_at_document_ends(tmp_path: Path) -> None:
    config = token_config(tmp_path, documents=100, shard_bytes=2000)
    manifest = read_manifest(LocalStore(prepare(config)))
    shards = manifest.splits["train"].shards
    assert len(shards) > 5
    assert all(shard.data.bytes <= 2000 for shard in shards)
    names = ["train-00000.bin", *(f"train-00000_{number:03d}.bin" for number in range(1, len(shards)))]
    assert [shard.data.name for shard in shards] == names == sorted(names)
    tiny = token_config(tmp_path, documents=100, shard_bytes=1, directory=tmp_path / "tiny")
    assert all(shard.documents == 1 for shard in read_manifest(LocalStore(prepare(tiny))).splits["train"].shards)


def test_progress_counts_documents_tokens_and_bytes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    config = token_config(tmp_path)
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"text": ""}\n' * 2)
    prepare(config, watch=seen.append)
    size_bytes = sum(len(lorem(number).encode()) for number in range(60))
    input_bytes = (tmp_path / "corpus.jsonl").stat().st_size
    assert seen[-1] == Progress(
        documents=60,
        empty=2,
        tokens=size_bytes + 60,
        size_bytes=size_bytes,
        found_bytes=0,
        read_bytes=input_bytes,
        input_bytes=input_bytes,
    )


LIMITED = """
import resource, sys
from pathlib import Path
from data.config import DataConfig
from data.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    prepare(DataConfig(source=sys.argv[1], directory=Path(sys.argv[2]), tokenizer=sys.argv[4], validation_fraction=0.2))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(("tokenizer", "limit_bytes"), [("bytes", 100_000), ("bytes", 5000), ("bpe:300", 5000)])
def test_a_full_disk_leaves_nothing_but_what_was_there(tmp_path: Path, tokenizer: str, limit_bytes: int) -> None:
    earlier = prepare(token_config(tmp_path, directory=tmp_path / "earlier"))
    before = contents(earlier)
    texts = [lorem(number) for number in range(2000)]
    source = f"jsonl:{write_jsonl(tmp_path / 'large.jsonl', texts)}#text"
    command = [sys.executable, "-c", LIMITED, source, str(tmp_path / "full"), str(limit_bytes), tokenizer]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Two bytes for each of the source's, and as many while units and shards lie side by side.
    size_bytes = 4 * (tmp_path / "large.jsonl").stat().st_size
    assert printed.startswith(f"{tmp_path / 'full'}: disk full after ")
    assert f"up to {size_bytes} bytes are needed" in printed
    assert printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["earlier"]
    assert contents(earlier) == before


def test_images_on_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, "digits", str(tmp_path / "full"), "20000", "bytes"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"{tmp_path / 'full'}: disk full after ")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = token_config(tmp_path, directory=tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"file/below: cannot be written \(.*/file: File exists\); set data.directory"):
        prepare(config)
    with pytest.raises(ValueError, match=r"file: is a file, and a dataset is a directory"):
        prepare(token_config(tmp_path, directory=tmp_path / "file"))
