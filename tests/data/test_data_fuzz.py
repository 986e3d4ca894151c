"""Forged datasets: what a manifest or a shard claims is never trusted, whoever signed it.

Every file is hashed and the manifest signed anew after it was altered, so that nothing but its content is wrong: what a
forger would hand over. Each such dataset is read as it stands, or refused in one line; nothing outside its directory is
opened, and no memory is asked for that its files do not account for.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import DataConfig
from data.dataset import open_dataset
from data.examples import Examples
from data.image_shards import IMAGE_SCHEMA
from data.manifest import BLOCK_BYTES, fingerprint_of, parse_manifest
from data.packing import ensure_packing
from data.prepare import prepare
from data.store import LocalStore, read_manifest
from data.tokenizers import load_tokenizer
from data.verification import Verifier, items_of, packed_items, packings_among, unlisted_files
from tests.data.data_helpers import lorem, prepared_tokens, write_images, write_jsonl

CONFIGS = {
    "tokens": DataConfig(sequence_tokens=16),
    "apart": DataConfig(sequence_tokens=16, separate_documents=True),
    "packed": DataConfig(sequence_tokens=16, packing="best_fit"),
    "images": DataConfig(source="digits", image_size_pixels=8),
}
KINDS = sorted(CONFIGS)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of each kind, of several shards where it has some."""
    root = tmp_path_factory.mktemp("originals")
    source = write_jsonl(root / "texts.jsonl", [lorem(number) for number in range(12)])
    tokens, config = prepared_tokens(root, source=f"jsonl:{source}#text", shard_bytes=3000, tokenizer="bpe:260")
    ensure_packing(LocalStore(tokens), config.model_copy(update={"packing": "best_fit"}))
    folder = write_images(root / "images", count=20, size=(4, 4))
    images = DataConfig(
        source=f"images:{folder}", directory=root / "prepared-images", validation_fraction=0.4, shard_bytes=3000
    )
    made = {"tokens": tokens, "apart": tokens, "packed": tokens, "images": prepare(images)}
    Image.init()  # what libraries import when they are first used is not what a forger has them run
    for kind, directory in made.items():
        read_all(directory, kind)
    return made


def entry_of(name: str, content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
    return {
        "name": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "blocks": [xxhash.xxh3_64_hexdigest(block) for block in blocks],
    }


def sign(directory: Path, manifest: Any) -> None:
    document = {"fingerprint": fingerprint_of(manifest), "manifest": manifest}
    (directory / "manifest.json").write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")


def manifest_of(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())["manifest"]
    return manifest


def read_all(directory: Path, kind: str) -> None:
    """Everything that reads a dataset: training, `lockstep data info` and `verify`."""
    store, config = LocalStore(directory), CONFIGS[kind]
    for split in ("train", "validation"):
        dataset = open_dataset(store, config, split)  # type: ignore[arg-type]
        ids = np.arange(min(dataset.samples, 1000))
        fields, hashes = dataset.gather(ids)
        assert dataset.content_hashes(ids).tolist() == hashes.tolist()
        if kind == "images":
            assert dataset.facts.classes is not None
            assert ((fields["labels"] >= 0) & (fields["labels"] < dataset.facts.classes)).all()
    manifest = read_manifest(store)
    examples = Examples(store, manifest, "train")
    for number in examples.spread(3):
        assert "\n" not in examples.describe(number, 80)
    if kind != "images":
        load_tokenizer(store)


def refused_in_a_line(directory: Path, kind: str) -> str | None:
    """Why a dataset was refused; None where it was read."""
    try:
        read_all(directory, kind)
    except ValueError as error:
        reason = str(error)
    else:
        return None
    assert "\n" not in reason
    return reason


def verify_tells(directory: Path) -> list[str]:
    """The problems that `lockstep data verify` finds; it refuses nothing but a manifest that is none."""
    store = LocalStore(directory)
    problems: list[str] = []
    try:
        manifest = read_manifest(store)
    except ValueError as error:
        return [str(error)]
    items = [*items_of(manifest), *packed_items(store, manifest, packings_among(store.names()), problems)]
    unlisted_files(store.names(), items)
    verifier = Verifier(directory)
    problems += [problem for item in items for problem in verifier(item).problems]
    assert all("\n" not in problem for problem in problems)
    return problems


@contextlib.contextmanager
def forged(original: Path, parent: Path) -> Iterator[Path]:
    """A copy to alter; on leaving it is gone."""
    copy = parent / "forged"
    shutil.copytree(original, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


_watched: Path | None = None
_outside: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what is opened, and refuses what no reader has any business with."""
    if _watched is None:
        return
    if event in (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "pickle.find_class",
    ):
        _outside.append(event)
    if event == "exec" and "<string>" in str(arguments):
        _outside.append(str(arguments))
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.path.realpath(os.fsdecode(arguments[0])))
        code = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path(__file__).parents[2], Path("/proc"))
        if not any(path.is_relative_to(place) for place in (_watched, *code)):
            _outside.append(str(path))


@contextlib.contextmanager
def nothing_outside(directory: Path) -> Iterator[None]:
    """An audit hook of the interpreter cannot be passed by, and not be removed: it only looks while this holds."""
    global _watched
    _outside.clear()
    _watched = directory.resolve()
    try:
        yield
    finally:
        _watched = None
    assert _outside == []


sys.addaudithook(_watch)


def test_the_watch_sees_what_is_opened_outside(originals: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(AssertionError, match="secret"), nothing_outside(originals["tokens"]):
        (tmp_path / "secret").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_prepared_is_read(originals: dict[str, Path], kind: str) -> None:
    with nothing_outside(originals[kind]):
        read_all(originals[kind], kind)
        assert verify_tells(originals[kind]) == []


LEAVES = st.one_of(
    st.sampled_from(
        ["../../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "manifest.json", "x" * 300]
    ),
    st.sampled_from([0, -1, 1, 2, 2**31, 2**40, 2**61, 2**62, 2**63, 2**64, 2**200, -(2**63)]),
    st.integers(-3, 300),
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [{}], "f" * 64, "0" * 16, "uint32", "images", "tokens"]),
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a manifest."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from paths_in(inner, (*path, number))


def alter(manifest: Any, data: st.DataObject) -> None:
    """Replace, remove, repeat or add something, anywhere."""
    path = data.draw(st.sampled_from(list(paths_in(manifest))))
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "add", "nudge"]))
    if how == "remove":
        del holder[path[-1]]
    elif how == "repeat" and isinstance(holder, list):
        holder.append(holder[path[-1]])
    elif how == "add" and isinstance(holder, dict):
        holder[data.draw(st.text(max_size=5))] = data.draw(LEAVES)
    elif how == "nudge" and type(holder[path[-1]]) is int:
        holder[path[-1]] += data.draw(st.sampled_from([-8, -2, -1, 1, 2, 8]))
    else:
        holder[path[-1]] = data.draw(LEAVES)


@FUZZ
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_forged_manifest(originals: dict[str, Path], tmp_path: Path, kind: str, data: st.DataObject) -> None:
    with forged(originals[kind], tmp_path) as directory:
        manifest = manifest_of(directory)
        for _ in range(data.draw(st.integers(1, 3))):
            alter(manifest, data)
        sign(directory, manifest)
        with nothing_outside(directory):
            refused_in_a_line(directory, kind)
            verify_tells(directory)


def test_a_key_with_a_line_end_is_told_in_a_line(originals: dict[str, Path], tmp_path: Path) -> None:
    with forged(originals["tokens"], tmp_path) as directory:
        manifest = manifest_of(directory)
        manifest["unknown\nkey"] = None
        sign(directory, manifest)
        refused_in_a_line(directory, "tokens")


@FUZZ
@given(
    st.binary(max_size=300) | st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_any_content_of_a_manifest(content: Any) -> None:
    if not isinstance(content, bytes):
        document = {"fingerprint": fingerprint_of(content), "manifest": content}
        content = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
    with pytest.raises(ValueError, match=r"^forged/manifest\.json: [^\n]*$"):
        parse_manifest(content, "forged/manifest.json")


def replace_file(directory: Path, old: dict[str, Any], content: bytes) -> None:
    """Write a file anew, and into `old`, its entry in a manifest, what fits it."""
    (directory / old["name"]).write_bytes(content)
    old.update(entry_of(old["name"], content))


ENDS = st.lists(
    st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])),
    min_size=1,
    max_size=6,
)


@FUZZ
@given(kind=st.sampled_from(["tokens", "apart"]), ends=ENDS, keep_last=st.booleans(), in_order=st.booleans())
def test_forged_document_ends(
    originals: dict[str, Path], tmp_path: Path, kind: str, ends: list[int], keep_last: bool, in_order: bool
) -> None:
    with forged(originals[kind], tmp_path) as directory:
        manifest = manifest_of(directory)
        split = manifest["splits"]["train"]
        shard = split["shards"][0]
        if keep_last:
            ends = [*ends, shard["tokens"]]
        if in_order:
            ends = sorted({end for end in ends if end}) or [1]
        replace_file(directory, shard["docs"], np.array(ends, dtype="<u8").tobytes())
        split["documents"] += len(ends) - shard["documents"]
        shard["documents"] = len(ends)
        sign(directory, manifest)
        with nothing_outside(directory):
            refused = refused_in_a_line(directory, kind)
            told = verify_tells(directory)
        good = sorted(set(ends)) == ends and ends[0] > 0 and ends[-1] == shard["tokens"]
        assert (refused is None) == good
        assert any("do not rise" in problem for problem in told) != good


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["tokens", "packed"]))
def test_forged_tokens_and_packing_indexes(
    originals: dict[str, Path], tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    """Tokens beyond the vocabulary; and, packed, an index of any integers under a head that has its hash."""
    with forged(originals[kind], tmp_path) as directory:
        if kind == "tokens":
            manifest = manifest_of(directory)
            file = manifest["splits"]["train"]["shards"][0]["data"]
            content = bytearray((directory / file["name"]).read_bytes())
            for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
                content[at] = data.draw(st.integers(0, 255))
            replace_file(directory, file, bytes(content))
            sign(directory, manifest)
        else:
            head = directory / "packing-best_fit-T16.json"
            packing = json.loads(head.read_text())["packing"]
            entry = packing["splits"]["train"][0]
            numbers = np.frombuffer((directory / entry["index"]["name"]).read_bytes(), dtype="<i8").copy()
            for _ in range(data.draw(st.integers(1, 4))):
                value = data.draw(st.integers(-3, 40) | st.sampled_from([2**62, 2**63 - 1, -(2**63), 2**31, 2**32]))
                numbers[data.draw(st.integers(0, len(numbers) - 1))] = value
            replace_file(directory, entry["index"], numbers.tobytes())
            if data.draw(st.booleans()):
                alter(packing, data)
            document = {"packing": packing, "sha256": fingerprint_of(packing)}
            head.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
        with nothing_outside(directory):
            refused_in_a_line(directory, kind)
            verify_tells(directory)


def rewrite_images(directory: Path, change: Callable[[bytearray, dict[str, Any]], bytes]) -> None:
    """Alter an Arrow file and give it the hashes that fit; its batches stay where the manifest says unless that is altered."""
    manifest = manifest_of(directory)
    shard = manifest["splits"]["train"]["shards"][0]
    content = change(bytearray((directory / shard["data"]["name"]).read_bytes()), shard)
    replace_file(directory, shard["data"], content)
    sign(directory, manifest)


WORDS = st.sampled_from([0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_forged_arrow_files(originals: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Headers, lengths and offsets of any value anywhere in the file, which nevertheless has the hashes of the manifest."""

    def change(content: bytearray, shard: dict[str, Any]) -> bytes:
        # The magic number, the schema and the first batch's header lie at the start, the footer at the end.
        place = (
            st.integers(0, len(content) - 8) | st.integers(0, 700) | st.integers(len(content) - 900, len(content) - 8)
        )
        for _ in range(data.draw(st.integers(1, 4))):
            at, width = data.draw(place), data.draw(st.sampled_from([1, 2, 4, 8]))
            at = min(max(0, at), len(content) - width)
            content[at : at + width] = (data.draw(WORDS) % (1 << 8 * width)).to_bytes(width, "little")
        return bytes(content)

    with forged(originals["images"], tmp_path) as directory:
        rewrite_images(directory, change)
        with nothing_outside(directory):
            refused_in_a_line(directory, "images")
            verify_tells(directory)


@FUZZ
@given(data=st.data())
def test_arrow_files_with_other_rows_labels_and_offsets(
    originals: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    """Whole Arrow files that are right as such: rows, batches, labels and images that the dataset cannot have."""

    def change(_: bytearray, shard: dict[str, Any]) -> bytes:
        rows = data.draw(
            st.lists(st.tuples(st.binary(max_size=30), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=5)
        )
        sink = pa.BufferOutputStream()
        schema = data.draw(
            st.sampled_from([IMAGE_SCHEMA, pa.schema([("image", pa.large_binary()), ("label", pa.int64())])])
        )
        codec = data.draw(st.sampled_from([None, "lz4", "zstd"]))
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            offsets = [sink.tell()]
            for image, label in rows:
                columns = [pa.array([image], schema.field(0).type), pa.array([label], pa.int64())]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                offsets.append(sink.tell())
        if data.draw(st.booleans()):
            offsets = sorted({max(1, offset + data.draw(st.sampled_from([-8, 0, 8]))) for offset in offsets})
        shard["batch_offsets"] = offsets
        return sink.getvalue().to_pybytes()

    with forged(originals["images"], tmp_path) as directory:
        rewrite_images(directory, change)
        with nothing_outside(directory):
            refused_in_a_line(directory, "images")
            verify_tells(directory)


def test_labels_of_no_class_are_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    with forged(originals["images"], tmp_path) as directory:
        manifest = manifest_of(directory)
        manifest["images"]["class_names"] = ["cat"]
        sign(directory, manifest)
        assert "class" in (refused_in_a_line(directory, "images") or "")
        assert any("class" in problem for problem in verify_tells(directory))


LIMITED = """
import resource, sys
from pathlib import Path
import tests.data.test_data_fuzz as fuzz
fuzz.read_all(Path(sys.argv[2]), sys.argv[1])  # what libraries allocate once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for directory in sys.argv[3:]:
    reason = fuzz.refused_in_a_line(Path(directory), sys.argv[1])
    assert reason is not None, directory
    fuzz.verify_tells(Path(directory))
    print(reason)
"""


def forge_counts(kind: str, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Manifests that each claim something huge and agree with themselves as far as a forger can make them."""
    for huge in (2**33, 2**40, 2**61):
        for key in ("documents", "tokens"):
            if manifest["splits"]["train"].get(key) is not None:
                claim = json.loads(json.dumps(manifest))
                split = claim["splits"]["train"]
                shard = split["shards"][0]
                split[key] += huge - shard[key]
                shard[key] = huge
                if key == "documents" and shard["docs"]:
                    shard["docs"]["bytes"] = 8 * huge
                if key == "tokens":
                    shard["data"]["bytes"] = 2 * huge
                if kind == "images" or huge < 2**34:
                    for file in (shard["data"], shard["docs"]):
                        if file and file["bytes"] < 2**34:
                            file["blocks"] = ["0" * 16] * -(-file["bytes"] // BLOCK_BYTES)
                yield claim


def forge_compression(directory: Path) -> None:
    """An Arrow file with a compressed batch that claims to hold 2^40 bytes."""

    def change(_: bytearray, shard: dict[str, Any]) -> bytes:
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, IMAGE_SCHEMA, options=options) as writer:
            start = sink.tell()
            columns = [pa.array([b"x" * 5000] * shard["documents"], pa.binary()), pa.array([0] * shard["documents"])]
            writer.write_batch(pa.record_batch(columns, schema=IMAGE_SCHEMA))
            shard["batch_offsets"] = [start, sink.tell()]
        content = bytearray(sink.getvalue().to_pybytes())
        claimed = (5000 * shard["documents"]).to_bytes(8, "little")
        assert content.count(claimed) == 1
        return bytes(content.replace(claimed, (1 << 40).to_bytes(8, "little")))

    rewrite_images(directory, change)


@pytest.mark.parametrize("kind", ["tokens", "apart", "images"])
def test_forged_counts_ask_for_no_memory(originals: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Under a limit 64 MiB above what a good dataset takes: anything the size of what is claimed would end the process."""
    directories = []
    for number, manifest in enumerate(forge_counts(kind, manifest_of(originals[kind]))):
        directories.append(tmp_path / str(number))
        shutil.copytree(originals[kind], directories[-1])
        sign(directories[-1], manifest)
    if kind == "images":
        directories.append(tmp_path / "compressed")
        shutil.copytree(originals[kind], directories[-1])
        forge_compression(directories[-1])
    command = [sys.executable, "-c", LIMITED, kind, originals[kind], *directories]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(directories)
