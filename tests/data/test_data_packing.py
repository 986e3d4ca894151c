"""Packed documents: every target exactly once, none across documents, and an index that is what it was or is refused."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData
from data.manifest import fingerprint_of
from data.packing import best_fit, ensure_packing, head_name, pack_shard
from data.plan import Plan, Segment, StreamPart
from data.prepare import prepare
from data.store import LocalStore, open_store, read_manifest
from data.stream import Stream
from data.token_dataset import TokenDataset
from tests.data.data_helpers import prepared_tokens, write_images, write_jsonl

END = 256


def opened(directory: Path, sequence_tokens: int, split: str = "train", **options: Any) -> TokenDataset:
    config = DataConfig(sequence_tokens=sequence_tokens, **options)
    store = LocalStore(directory)
    ensure_packing(store, config)
    dataset = open_dataset(store, config, split)  # type: ignore[arg-type]
    assert isinstance(dataset, TokenDataset)
    return dataset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 2 to 200 tokens, of one word each so that a token says whose it is; three shards and more."""
    root = tmp_path_factory.mktemp("corpus")
    texts = [chr(97 + number % 26) * (1 + number * number % 199) for number in range(150)]
    texts += ["0" * 15, "1" * 16, "2" * 17, "3" * 32, "4" * 33]  # lengths around one and two sequences of 16
    source = write_jsonl(root / "words.jsonl", texts)
    directory, _ = prepared_tokens(root, source=f"jsonl:{source}#text", shard_bytes=4000)
    assert len(read_manifest(LocalStore(directory)).splits["train"].shards) >= 3
    return directory


def shards(directory: Path, split: str = "train") -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    """Tokens and document ends of each shard, read without the code under test."""
    for data in sorted(directory.glob(f"{split}-*.bin")):
        yield np.fromfile(data, dtype="<u2"), np.fromfile(data.with_suffix(".docs"), dtype="<u8").astype(np.int64)


def documents_of(directory: Path, split: str = "train") -> list[bytes]:
    return [part.tobytes() for tokens, ends in shards(directory, split) for part in np.split(tokens, ends[:-1])]


lengths_and_room = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 20))


@settings(max_examples=400, deadline=None)
@given(lengths_and_room)
def test_every_token_but_its_documents_first_is_a_target_once(case: tuple[list[int], int]) -> None:
    lengths, sequence_tokens = case
    ends = np.cumsum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    bin_ends, starts, tokens = pack_shard(ends, sequence_tokens)
    assert bin_ends[0] == 0
    assert bin_ends[-1] == len(starts)
    targets: Counter[int] = Counter()
    for low, high in itertools.pairwise(bin_ends):
        assert 2 <= tokens[low:high].sum() <= sequence_tokens + 1
        assert (np.diff(starts[low:high]) > 0).all()
        for start, count in zip(starts[low:high], tokens[low:high], strict=True):
            assert len(set(document[start : start + count].tolist())) == 1
            targets.update(range(start + 1, start + count))
    first = ends - lengths
    assert targets == Counter(set(range(int(ends[-1]))) - set(first.tolist()))
    assert (np.diff(starts[bin_ends[:-1]]) > 0).all()  # bins in stored order
    # No document that fits is cut, and a longer one no more often than it must.
    pieces = Counter(document[starts].tolist())
    assert all(pieces[number] == -(-(length - 1) // sequence_tokens) for number, length in enumerate(lengths))


def plain_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The textbook's algorithm: rooms left, by bin."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [contents for contents in bins if sum(contents) + length <= room]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 17), max_size=50), st.integers(17, 40))
def test_best_fit_is_the_textbooks(lengths: list[int], room: int) -> None:
    bins = best_fit(np.array(lengths, dtype=np.int64), room)
    ours = [sorted(np.array(lengths)[bins == number].tolist()) for number in range(bins.max(initial=-1) + 1)]
    # Bins that are equally full may change places, which changes no fill.
    assert sorted(map(sum, ours)) == sorted(map(sum, plain_best_fit(lengths, room)))


def read_in_parts(dataset: TokenDataset, seed: int) -> dict[str, npt.NDArray[Any]]:
    """All samples, asked for in another order and in parts, put back in order."""
    order = np.random.RandomState(seed).permutation(dataset.samples)
    fields: dict[str, list[npt.NDArray[Any]]] = {}
    for ids in np.array_split(order, 7):
        gathered, hashes = dataset.gather(ids)
        for name, field in {**gathered, "hashes": hashes}.items():
            fields.setdefault(name, []).append(field)
    back = np.argsort(order)
    return {name: np.concatenate(parts)[back] for name, parts in fields.items()}


@pytest.mark.parametrize(
    ("sequence_tokens", "apart"),
    [(1, False), (2, True), (16, False), (16, True), (33, True), (250, False), (250, True)],
)
def test_samples_of_whole_documents(corpus: Path, sequence_tokens: int, apart: bool) -> None:
    dataset = opened(corpus, sequence_tokens, packing="best_fit", separate_documents=apart)
    fields = read_in_parts(dataset, sequence_tokens)
    assert set(fields) == {"tokens", "loss_mask", "hashes"} | ({"documents"} if apart else set())
    assert fields["tokens"].shape == (dataset.samples, sequence_tokens + 1)
    assert fields["loss_mask"].dtype == np.bool_
    found: Counter[bytes] = Counter()
    for row, mask in zip(fields["tokens"], fields["loss_mask"], strict=True):
        # Where a target does not count, something else begins.
        pieces = np.split(row, np.flatnonzero(~mask) + 1)
        found.update(piece.tobytes() for piece in pieces if len(piece) > 1)
        rest = np.concatenate([piece for piece in pieces if len(piece) == 1] or [row[:0]])
        assert (rest == END).all()  # padding
    expected: Counter[bytes] = Counter()
    for text in documents_of(corpus):
        document = np.frombuffer(text, dtype="<u2")
        for start in range(0, len(document) - 1, sequence_tokens):
            expected[document[start : start + sequence_tokens + 1].tobytes()] += 1
    assert found == expected
    assert fields["loss_mask"].sum() == sum(len(text) // 2 - 1 for text in documents_of(corpus))
    assert fields["loss_mask"].any(axis=1).all()
    for row, content_hash in zip(fields["tokens"], fields["hashes"], strict=True):
        assert xxhash.xxh3_64_intdigest(row.tobytes()) == content_hash
    if apart:
        documents = fields["documents"]
        assert documents.dtype == np.int16
        assert (documents[:, 0] == 0).all()
        begins = documents[:, 1:] != documents[:, :-1]
        assert (np.diff(documents, axis=1) == begins).all()
        # A document begins exactly where the target before it did not count; all padding is one.
        assert (~fields["loss_mask"][:, :-1] >= begins).all()
        padding = (~fields["loss_mask"][:, :-1]) & ~begins
        assert (fields["tokens"][:, 1:-1][padding] == END).all()


@pytest.mark.parametrize("sequence_tokens", [2, 16, 33, 250])
def test_concatenated_documents_kept_apart(corpus: Path, sequence_tokens: int) -> None:
    plain, _ = opened(corpus, sequence_tokens).gather(np.arange(opened(corpus, sequence_tokens).samples))
    dataset = opened(corpus, sequence_tokens, separate_documents=True)
    assert dataset.packing_identity is None
    fields = read_in_parts(dataset, 5)
    assert (fields["tokens"] == plain["tokens"]).all()
    assert set(fields) == {"tokens", "documents", "loss_mask", "hashes"}
    row = 0
    for tokens, ends in shards(corpus):
        number = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        for start in range(0, len(tokens) - sequence_tokens, sequence_tokens):
            whose = number[start : start + sequence_tokens + 1]
            assert (fields["documents"][row] == whose[:-1] - whose[0]).all()
            assert (fields["loss_mask"][row] == (whose[1:] == whose[:-1])).all()
            row += 1
    assert row == dataset.samples
    assert fields["loss_mask"].any(axis=1).all()


def test_documents_beyond_16_bits_are_numbered(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "many.jsonl", ["a"] * 40_000 + [f"b{number}" for number in range(9)])
    directory, _ = prepared_tokens(tmp_path, source=f"jsonl:{source}#text", shard_bytes=10**9, validation_fraction=0.3)
    split = max(("train", "validation"), key=lambda split: len(documents_of(directory, split)))
    dataset = opened(directory, 70_000, split, separate_documents=True)
    fields, _ = dataset.gather(np.array([0]))
    assert fields["documents"].dtype == np.int32
    assert fields["documents"].max() == (~fields["loss_mask"][0, :-1]).sum()
    assert fields["documents"].max() >= 1 << 15


def test_the_identity_is_the_algorithm_and_its_bytes(corpus: Path) -> None:
    identities = {opened(corpus, tokens, packing="best_fit").packing_identity for tokens in (16, 17)}
    assert len(identities) == 2
    dataset = opened(corpus, 16, packing="best_fit")
    head = json.loads((corpus / head_name(16)).read_text())
    assert dataset.packing_identity == f"best_fit-1:{head['sha256']}"
    assert dataset.packing_identity == opened(corpus, 16, "validation", packing="best_fit").packing_identity
    assert dataset.fingerprint == opened(corpus, 16).fingerprint
    for entries in head["packing"]["splits"].values():
        for entry in entries:
            content = (corpus / entry["index"]["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["index"]["sha256"]


def test_a_packing_never_changes_under_its_version() -> None:
    ends = np.cumsum([1 + number * number % 37 for number in range(2000)])
    content = b"".join(array.astype("<i8").tobytes() for array in pack_shard(ends, 24))
    assert hashlib.sha256(content).hexdigest() == "c44a31c636e217416a5f5d083195ce45be9e6b040cbe0c1af0aeac0a2972dea5"


def test_a_mixture_of_packed_streams_keeps_its_documents_apart(corpus: Path) -> None:
    """Whatever the chunks: a step holds, field by field, what each stream's dataset has of the samples."""
    datasets = {
        split: opened(corpus, 16, split, packing="best_fit", separate_documents=True)
        for split in ("train", "validation")
    }
    parts = tuple(
        StreamPart(
            name=name,
            fingerprint=dataset.fingerprint,
            sequence_tokens=16,
            quota=quota,
            packing=dataset.packing_identity,
        )
        for (name, dataset), quota in zip(datasets.items(), (3000, 1096), strict=True)
    )
    plan = Plan.of([Segment(start_position=0, streams=parts, seed=3, global_samples=20)])
    steps = list(
        Stream(
            datasets,
            plan,
            rank=0,
            world_size=1,
            micro_samples=7,
            position=0,
            stop_position=200,
            count_items=lambda batch: int(batch["loss_mask"].sum()),
        )
    )
    assert len(steps) == 10
    seen = set()
    for step in steps:
        assert step.items == sum(int(batch.tensors["loss_mask"].sum()) for batch in step.micro_batches)
        for batch in step.micro_batches:
            assert batch.streams is not None
            assert set(batch.tensors) == {"tokens", "documents", "loss_mask"}
            for row, (stream, sample) in enumerate(zip(batch.streams, batch.sample_ids, strict=True)):
                name = plan.streams[int(stream)].name
                expected, _ = datasets[name].gather(np.array([sample]))
                assert all((batch.tensors[field][row].numpy() == expected[field][0]).all() for field in expected)
                seen.add(name)
    assert seen == set(datasets)


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    source = write_jsonl(tmp_path / "short.jsonl", [f"text {number}" * (number % 4 + 1) for number in range(12)])
    directory, _ = prepared_tokens(tmp_path, source=f"jsonl:{source}#text", sequence_tokens=24, shard_bytes=150)
    read_everything(directory)
    return directory


def read_everything(directory: Path) -> None:
    for split in ("train", "validation"):
        dataset = opened(directory, 24, split, packing="best_fit", separate_documents=True)
        dataset.gather(np.arange(dataset.samples))


def test_every_flipped_byte_of_the_index_is_detected(small: Path) -> None:
    paths = sorted(small.glob("packing-*"))
    assert len(paths) > 3
    unseen, told = [], set()
    for path in paths:
        content = path.read_bytes()
        for at in range(len(content)):
            altered = bytearray(content)
            altered[at] ^= 1 << at % 8
            path.write_bytes(altered)
            try:
                read_everything(small)
            except ValueError as error:
                told.add(str(error).split("; ")[-1])
            else:
                unseen.append((path.name, at))
        path.write_bytes(content)
    assert unseen == []
    hint = "remove packing-best_fit-T24.json, and `lockstep train` builds it anew"
    assert told == {hint, f"or {hint}"}


@pytest.mark.parametrize("change", ["cut", "grown", "missing", "link"])
def test_an_index_file_that_is_not_what_it_was(small: Path, change: str, tmp_path: Path) -> None:
    path = small / "packing-best_fit-T24-train-00000.index"
    content = path.read_bytes()
    if change == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif change == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-8] if change == "cut" else content + b"12345678")
    with pytest.raises(CorruptData, match=r"packing-best_fit-T24-train-00000.index: .*builds it anew"):
        read_everything(small)
    (small / head_name(24)).unlink()
    if change == "link":
        path.unlink()
    read_everything(small)
    assert path.read_bytes() == content


def forge(directory: Path, change: Callable[[dict[str, Any], npt.NDArray[np.int64]], None]) -> None:
    """Alter the head and the first index file, and give them the hashes that fit."""
    head = directory / head_name(24)
    packing = json.loads(head.read_text())["packing"]
    entry = packing["splits"]["train"][0]
    index = directory / entry["index"]["name"]
    numbers = np.fromfile(index, dtype="<i8")
    change(packing, numbers)
    index.write_bytes(numbers.tobytes())
    entry["index"]["blocks"] = [xxhash.xxh3_64_hexdigest(numbers.tobytes())]
    head.write_text(
        json.dumps({"packing": packing, "sha256": fingerprint_of(packing)}, sort_keys=True, indent=1) + "\n"
    )


def first(packing: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = packing["splits"]["train"][0]
    return entry


@pytest.mark.parametrize(
    "change",
    [
        lambda head, _: first(head).update(bins=2**50),
        lambda head, _: first(head).update(pieces=2**59),
        lambda head, _: first(head).update(pieces=-1),
        lambda head, _: first(head)["index"].update(bytes=2**55, blocks=[]),
        lambda head, _: first(head)["index"].update(name="../outside"),
        lambda head, _: first(head)["index"].update(name=head["splits"]["train"][1]["index"]["name"]),
        lambda head, _: first(head).update(shard="train-00000_001.bin"),
        lambda head, _: head["splits"].update(train=head["splits"]["train"][:-1]),
        lambda head, _: head["splits"].pop("train") and None,
        lambda head, _: head.update(fingerprint="0" * 64),
        lambda head, _: head.update(sequence_tokens=25),
        lambda head, _: head.update(more=1),
        lambda _, numbers: numbers.__setitem__(0, 1),
        lambda _, numbers: numbers.__setitem__(0, -1),
        lambda _, numbers: numbers.__setitem__(1, 2**62),
        lambda _, numbers: numbers.__setitem__(1, 0),
        lambda head, numbers: numbers.__setitem__(first(head)["bins"] + 1, -5),
        lambda head, numbers: numbers.__setitem__(first(head)["bins"] + 1, 2**62),
        lambda _, numbers: numbers.__setitem__(-1, 2**62),
        lambda _, numbers: numbers.__setitem__(-1, 0),
        lambda _, numbers: numbers.__setitem__(-1, 26),
    ],
)
def test_a_forged_index_is_refused(
    small: Path, change: Callable[[dict[str, Any], npt.NDArray[np.int64]], None]
) -> None:
    forge(small, change)
    with pytest.raises(CorruptData, match="builds it anew") as refused:
        read_everything(small)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"packing": {}}', b"null"])
def test_a_head_that_is_none_is_refused(small: Path, content: bytes) -> None:
    (small / head_name(24)).write_bytes(content)
    with pytest.raises(CorruptData, match="altered or damaged; remove"):
        read_everything(small)


def test_another_algorithm_is_not_taken_for_ours(small: Path) -> None:
    forge(small, lambda head, _: head.update(algorithm="best_fit-2"))
    with pytest.raises(ValueError, match=r"algorithm 'best_fit-2', which this Lockstep does not read"):
        read_everything(small)


def test_a_missing_packing_says_how_to_have_it(small: Path) -> None:
    (small / head_name(24)).unlink()
    config = DataConfig(sequence_tokens=24, packing="best_fit")
    with pytest.raises(ValueError, match=r"T24.json: missing, .* `lockstep train` builds it"):
        open_dataset(LocalStore(small), config, "train")
    (small / ".packing.lock").unlink()
    (small / ".packing.lock").mkdir()
    with pytest.raises(ValueError, match=r"T24.json, .*is not there and cannot be written \(Is a directory\); run"):
        ensure_packing(LocalStore(small), config)


def test_nothing_is_written_through_a_link(small: Path, tmp_path: Path) -> None:
    expected = index_files(small)
    forget_packing(small)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in expected:
        (small / f".{name}.writing").symlink_to(outside)
        (small / name).symlink_to(outside)
    (small / head_name(24)).unlink()
    read_everything(small)
    assert index_files(small) == expected
    forget_packing(small)
    (small / ".packing.lock").symlink_to(outside)
    with pytest.raises(ValueError, match="cannot be written"):
        read_everything(small)
    assert outside.read_text() == "precious"


def test_a_packing_elsewhere_is_read_and_not_written(small: Path, tmp_path: Path) -> None:
    config = DataConfig(sequence_tokens=24, packing="best_fit")
    address = f"file://{small.absolute()}"
    elsewhere = open_store(address, DataConfig(directory=address, cache_directory=tmp_path / "cache"))
    ensure_packing(elsewhere, config)
    here, there = (open_dataset(store, config, "train") for store in (LocalStore(small), elsewhere))
    assert there.gather(np.arange(there.samples))[1].tolist() == here.gather(np.arange(here.samples))[1].tolist()
    forget_packing(small)
    with pytest.raises(ValueError, match=r"file://.*: packing-.*because it is no directory of this machine; run"):
        ensure_packing(elsewhere, config)


def test_images_have_no_documents(tmp_path: Path) -> None:
    source = f"images:{write_images(tmp_path / 'images')}"
    with pytest.raises(ValidationError, match="packing, separate_documents means nothing to"):
        DataConfig(source=source, packing="best_fit", separate_documents=True)
    directory = prepare(DataConfig(source=source, directory=tmp_path / "prepared", validation_fraction=0.4))
    # What a source of the hub holds is known only when it is there.
    for options in ({"packing": "best_fit"}, {"separate_documents": True}):
        config = DataConfig.model_validate({"source": "hf:pictures", **options})
        with pytest.raises(ValueError, match=f"{next(iter(options))} means nothing to .*, which is images"):
            open_dataset(LocalStore(directory), config, "train")
    with pytest.raises(ValueError, match="means nothing to"):
        ensure_packing(LocalStore(directory), DataConfig(source="hf:pictures", packing="best_fit"))


def test_one_token_is_too_little_to_keep_documents_apart() -> None:
    with pytest.raises(ValidationError, match="separate_documents needs sequence_tokens of at least 2, not 1"):
        DataConfig(sequence_tokens=1, separate_documents=True)


BUILD = """
import sys
from pathlib import Path
from data.config import DataConfig
from data.packing import ensure_packing
from data.store import LocalStore
ensure_packing(LocalStore(Path(sys.argv[1])), DataConfig(sequence_tokens=24, packing="best_fit"), tell=print)
"""
# Kills its own process when it comes to a file system call for the n-th time.
KILL = """
import os, signal, sys
left = int(sys.argv[2])
def hook(event, arguments):
    global left
    if event in ("open", "os.rename") and "packing" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def index_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("packing-*"))}


def forget_packing(directory: Path) -> None:
    for path in [*directory.glob("packing-*"), *directory.glob(".packing*")]:
        path.unlink()


def build(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_a_build_killed_at_any_call_is_built_again_to_the_same_bytes(small: Path) -> None:
    expected = index_files(small)
    moments = 0
    while True:
        forget_packing(small)
        process = build(KILL + BUILD, small, moments + 1)
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        moments += 1
        # A head is there only when all that it lists is.
        assert head_name(24) not in index_files(small) or index_files(small) == expected
        read_everything(small)
        assert index_files(small) == expected
        assert not list(small.glob(".*.writing"))
    assert moments > 2 * len(expected)


def test_two_processes_build_one_index(small: Path) -> None:
    expected = index_files(small)
    for _ in range(3):
        forget_packing(small)
        processes = [build(BUILD, small) for _ in range(3)]
        outs = [process.communicate()[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert "".join(outs).count("packing documents into sequences of 24 tokens, once") == 1
        assert index_files(small) == expected


def test_a_shard_without_a_target_has_no_samples() -> None:
    """Possible where a tokenizer makes nothing of a text."""
    bin_ends, starts, lengths = pack_shard(np.array([1, 2, 3]), 8)
    assert (bin_ends.tolist(), starts.tolist(), lengths.tolist()) == ([0], [], [])
