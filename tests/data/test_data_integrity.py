"""Altered, truncated, missing and foreign files: each is found out before its bytes reach a model."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData
from data.manifest import BLOCK_BYTES, Manifest
from data.origin import ORIGIN_NAME, read_origin
from data.prepare import prepare
from data.store import LocalStore, read_manifest
from data.stream import Stream
from data.tokenizers import load_tokenizer
from tests.data.data_helpers import plan_of, prepared_tokens, rewrite, token_config, write_images, write_jsonl


def read_everything(directory: Path, config: DataConfig) -> None:
    for split in ("train", "validation"):
        dataset = open_dataset(LocalStore(directory), config, split)  # type: ignore[arg-type]
        dataset.gather(np.arange(dataset.samples))


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[Path, DataConfig]:
    directory, config = prepared_tokens(tmp_path, documents=14, shard_bytes=2000, sequence_tokens=8)
    read_everything(directory, config)
    return directory, config


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_every_flipped_byte_of_every_file_is_detected(tmp_path: Path, kind: str) -> None:
    if kind == "tokens":
        source = write_jsonl(tmp_path / "short.jsonl", [f"short text {number}" for number in range(12)])
        directory, config = prepared_tokens(
            tmp_path, source=f"jsonl:{source}#text", sequence_tokens=4, tokenizer="bpe:257"
        )
    else:
        folder = write_images(tmp_path / "images", count=16, size=(3, 3))
        for path in folder.glob("*/*.jpg"):
            path.unlink()
        config = DataConfig(source=f"images:{folder}", directory=tmp_path / "prepared", validation_fraction=0.4)
        directory = prepare(config)
    read_everything(directory, config)
    unseen, long_winded = [], 0
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        # The tokenizer is a large file of many equal parts: a prime step still meets every kind of place in it.
        for at in range(0, len(content), 1 if len(content) < 20_000 else 13):
            altered = bytearray(content)
            altered[at] ^= 1 << at % 8
            path.write_bytes(altered)
            try:
                if path.name == "tokenizer.json":
                    load_tokenizer(LocalStore(directory))
                elif path.name == ORIGIN_NAME:
                    read_origin(LocalStore(directory))
                else:
                    read_everything(directory, config)
            except ValueError as error:
                long_winded += "\n" in str(error)
            else:
                unseen.append((path.name, at))
        path.write_bytes(content)
    assert unseen == []
    assert long_winded == 0


def test_an_altered_block_is_named_with_its_bytes(tmp_path: Path) -> None:
    directory, config = prepared_tokens(tmp_path, documents=12_000)
    path = directory / "train-00000.bin"
    assert path.stat().st_size > 3 * BLOCK_BYTES
    content = bytearray(path.read_bytes())
    content[2 * BLOCK_BYTES + 77] ^= 4
    path.write_bytes(content)
    dataset = open_dataset(LocalStore(directory), config, "train")
    dataset.gather(np.arange(1000))  # other blocks are as good as before
    with pytest.raises(CorruptData, match=rf"train-00000.bin: block 2 \(bytes {2 * BLOCK_BYTES} to .* altered"):
        dataset.gather(np.array([2 * BLOCK_BYTES // 32 + 1]))
    stream = Stream(
        {"": dataset},
        plan_of(dataset, 64),
        rank=0,
        world_size=1,
        micro_samples=64,
        position=0,
        stop_position=dataset.samples,
        count_items=lambda _: 1,
    )
    with pytest.raises(CorruptData, match="block 2"):
        list(stream)
    stream.close()


def test_samples_that_span_blocks_are_checked_in_all_of_them(tmp_path: Path) -> None:
    directory, config = prepared_tokens(tmp_path, documents=12_000, sequence_tokens=1_200_000)
    path = directory / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[BLOCK_BYTES + 5] ^= 1  # neither the first nor the last block of the sample of 2.4 MB
    path.write_bytes(content)
    dataset = open_dataset(LocalStore(directory), config, "train")
    with pytest.raises(CorruptData, match="block 1 "):
        dataset.gather(np.array([0]))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.docs", "validation-00000.bin"])
def test_truncated_grown_and_missing_files_are_named(tokens: tuple[Path, DataConfig], name: str) -> None:
    directory, config = tokens
    path = directory / name
    content = path.read_bytes()
    path.write_bytes(content[:-12])
    with pytest.raises(CorruptData, match=rf"{name}: 12 bytes short of the manifest's {len(content)}; re-run"):
        read_everything(directory, config)
    path.write_bytes(content + b"x")
    with pytest.raises(CorruptData, match="1 bytes more than"):
        read_everything(directory, config)
    path.unlink()
    with pytest.raises(CorruptData, match="missing"):
        read_everything(directory, config)


def test_a_newer_manifest_says_so(tokens: tuple[Path, DataConfig]) -> None:
    directory, config = tokens
    rewrite(directory, lambda manifest: manifest.update(format_version=3, invented_later=[1]))
    with pytest.raises(ValueError, match="format_version 3 is newer than the 2"):
        open_dataset(LocalStore(directory), config, "train")


def test_an_older_manifest_says_so(tokens: tuple[Path, DataConfig]) -> None:
    directory, config = tokens
    rewrite(directory, lambda manifest: manifest.update(format_version=1))
    with pytest.raises(ValueError, match=r"format_version 1 is older than the 2 .* prepare the dataset again"):
        open_dataset(LocalStore(directory), config, "train")


def test_no_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a prepared dataset; run `lockstep prepare`"):
        open_dataset(LocalStore(tmp_path), DataConfig(), "train")


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/hostname", "a/b.bin", "..", "", "a\\b", "a\0b", "\ud800", 300 * "x"]
)
def test_names_never_leave_the_directory(tokens: tuple[Path, DataConfig], name: str) -> None:
    directory, config = tokens

    def rename(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][0]["data"]["name"] = name

    rewrite(directory, rename)
    with pytest.raises(CorruptData, match=r"plain name|longer than any|Invalid JSON"):
        open_dataset(LocalStore(directory), config, "train")


def test_a_link_out_of_the_directory_is_refused(tokens: tuple[Path, DataConfig], tmp_path: Path) -> None:
    directory, config = tokens
    path = directory / "train-00000.bin"
    shutil.move(path, tmp_path / "elsewhere.bin")
    path.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(CorruptData, match="link to outside"):
        open_dataset(LocalStore(directory), config, "train")
    path.unlink()
    path.mkdir()
    with pytest.raises(CorruptData, match="not a regular file"):
        open_dataset(LocalStore(directory), config, "train")


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.update(tokens=2**40),
        lambda shard: shard.update(documents=2**40),
        lambda shard: shard["data"].update(bytes=2**50),
        lambda shard: shard["data"].update(bytes=-2),
        lambda shard: shard["data"].update(blocks=[]),
        lambda shard: shard.update(docs=None),
        lambda shard: shard.update(batch_offsets=[0, 1]),
        lambda shard: shard["data"].update(name=shard["docs"]["name"]),
        lambda shard: shard.update(extra=1),
        lambda shard: shard.update(tokens=float(shard["tokens"])),
    ],
)
def test_forged_counts_are_refused_before_anything_is_read(
    tokens: tuple[Path, DataConfig], change: Callable[[dict[str, Any]], None]
) -> None:
    directory, config = tokens
    rewrite(directory, lambda manifest: change(manifest["splits"]["train"]["shards"][0]))
    with pytest.raises(CorruptData) as refused:
        open_dataset(LocalStore(directory), config, "train")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"manifest": {}}', b"null", b"1" * 9999]
)
def test_a_manifest_that_is_none_is_refused(tokens: tuple[Path, DataConfig], content: bytes) -> None:
    directory, _ = tokens
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptData, match="altered or damaged"):
        read_manifest(LocalStore(directory))


def test_document_ends_that_do_not_rise_are_refused(tokens: tuple[Path, DataConfig]) -> None:
    directory, config = tokens
    path = directory / "train-00000.docs"
    path.write_bytes(np.zeros(path.stat().st_size // 8, dtype="<u8").tobytes())

    def rehash(manifest: dict[str, Any]) -> None:
        docs = manifest["splits"]["train"]["shards"][0]["docs"]
        docs["blocks"] = [xxhash.xxh3_64_hexdigest(path.read_bytes())]

    rewrite(directory, rehash)
    with pytest.raises(CorruptData, match="do not rise"):
        read_everything(directory, config)


def test_the_fingerprint_is_the_hash_of_the_canonical_manifest(tokens: tuple[Path, DataConfig]) -> None:
    directory, config = tokens
    document = json.loads((directory / "manifest.json").read_text())
    canonical = json.dumps(document["manifest"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == document["fingerprint"]
    assert open_dataset(LocalStore(directory), config, "train").fingerprint == document["fingerprint"]
    manifest = read_manifest(LocalStore(directory))
    assert isinstance(manifest, Manifest)
    for entry in manifest.files():
        assert hashlib.sha256((directory / entry.name).read_bytes()).hexdigest() == entry.sha256


def test_a_sequence_longer_than_the_data_names_both_numbers(tmp_path: Path) -> None:
    directory = prepare(token_config(tmp_path))
    with pytest.raises(ValueError, match=r"data.sequence_tokens 99999 is longer .* shard has \d+ tokens"):
        open_dataset(LocalStore(directory), DataConfig(sequence_tokens=99_999), "train")
