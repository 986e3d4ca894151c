"""Samples of tokens, however many shards hold them, and the memory that they are lent in."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from data.buffers import RowBuffers
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData
from data.manifest import BLOCK_BYTES
from data.mapped_rows import MappedRows, address_of
from data.store import LocalStore, read_manifest
from data.token_dataset import TokenDataset
from tests.data.data_helpers import prepared_tokens

TOKENS = 16


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataConfig]:
    return prepared_tokens(tmp_path_factory.mktemp("many"), documents=200, shard_bytes=4096)


def opened(prepared: tuple[Path, DataConfig]) -> TokenDataset:
    directory, config = prepared
    dataset = open_dataset(LocalStore(directory), config, "train")
    assert isinstance(dataset, TokenDataset)
    return dataset


def stored_samples(directory: Path) -> list[bytes]:
    """All samples, cut by hand out of the shards' bytes."""
    samples = []
    for shard in read_manifest(LocalStore(directory)).splits["train"].shards:
        content = (directory / shard.data.name).read_bytes()
        assert shard.tokens is not None
        starts = range(0, 2 * TOKENS * ((shard.tokens - 1) // TOKENS), 2 * TOKENS)
        samples += [content[start : start + 2 * TOKENS + 2] for start in starts]
    return samples


def test_samples_of_many_shards_come_in_any_order_with_repeats(many_shards: tuple[Path, DataConfig]) -> None:
    stored, dataset = stored_samples(many_shards[0]), opened(many_shards)
    assert dataset.samples == len(stored)
    assert len(dataset.shard_samples) > 10
    generator = np.random.RandomState(0)
    for count in (0, 1, 7, 300, 3 * len(stored)):  # at first few of the shards, later all of them
        ids = generator.randint(0, len(stored), count)
        fields, hashes = dataset.gather(ids)
        assert [row.tobytes() for row in fields["tokens"]] == [stored[number] for number in ids]
        assert hashes.tolist() == [xxhash.xxh3_64_intdigest(stored[number]) for number in ids]


def test_pieces_smaller_than_a_request_change_nothing(
    many_shards: tuple[Path, DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(opened(many_shards).samples)[::-1].copy()
    whole, hashes = opened(many_shards).gather(ids)
    monkeypatch.setattr("data.token_dataset.PIECE_BYTES", 100)  # two samples and a rest
    pieces, hashes_of_pieces = opened(many_shards).gather(ids)
    assert (whole["tokens"] == pieces["tokens"]).all()
    assert (hashes == hashes_of_pieces).all()


def test_a_block_altered_before_it_is_first_touched_is_found_in_whichever_shard(tmp_path: Path) -> None:
    prepared = prepared_tokens(tmp_path, documents=200, shard_bytes=4096)
    shard = read_manifest(LocalStore(prepared[0])).splits["train"].shards[7].data
    content = bytearray((prepared[0] / shard.name).read_bytes())
    assert len(content) < BLOCK_BYTES
    content[100] ^= 1
    (prepared[0] / shard.name).write_bytes(content)
    dataset = opened(prepared)
    ends = np.cumsum(dataset.shard_samples)
    dataset.gather(np.arange(ends[6]))
    with pytest.raises(CorruptData, match=shard.name):
        dataset.gather(np.array([0, ends[7] - 1, 1]))


def test_a_shard_is_checked_once_all_its_samples_were_read_though_they_leave_a_rest(tmp_path: Path) -> None:
    # One shard of 1.2 blocks whose one sample ends in the first.
    directory, config = prepared_tokens(tmp_path, documents=2900, sequence_tokens=BLOCK_BYTES // 2 - 10)
    dataset = opened((directory, config))
    assert sum(entry.data.bytes for entry in read_manifest(LocalStore(directory)).splits["train"].shards) > BLOCK_BYTES
    dataset.gather(np.arange(dataset.samples))
    assert dataset._shards[0].checked


def test_rows_end_with_their_map(many_shards: tuple[Path, DataConfig]) -> None:
    dataset = opened(many_shards)
    dataset.gather(np.arange(dataset.samples))
    map = dataset._shards[0].map
    rows = MappedRows(5, "<u2")

    def copies(*addresses: int) -> list[bytes]:
        into = np.empty((len(addresses), 5), "<u2")
        rows.copy(np.array(addresses), into)
        return [row.tobytes() for row in into]

    rows.add(map)
    last = address_of(map) + len(map) - 10
    assert copies(last, last - 2) == [map[-10:], map[-12:-2]]
    with pytest.raises(IndexError):
        copies(last + 2)
    other = dataset._shards[1].map
    rows.add(other)
    assert copies(last, address_of(other)) == [map[-10:], other[:10]]
    rows.remove(map)
    assert copies(address_of(other)) == [other[:10]]
    rows.remove(other)
    with pytest.raises(IndexError):
        copies(last)


def test_memory_is_not_lent_again_while_anything_refers_to_it() -> None:
    buffers = RowBuffers(8)
    array, views = buffers.take(4)
    address = array.__array_interface__["data"][0]
    array[:] = np.arange(4).astype("<i8").view("V8")
    assert [bytes(view) for view in views] == [number.to_bytes(8, "little") for number in range(4)]
    part = torch.from_numpy(array.view("<i8")).reshape(2, 2)[1:].split(1)[0]
    del array
    gc.collect()
    other, _ = buffers.take(4)
    other[:] = np.full(4, -1, "<i8").view("V8")
    assert other.__array_interface__["data"][0] != address
    assert part.tolist() == [[2, 3]]
    del part
    again, _ = buffers.take(3)
    assert again.__array_interface__["data"][0] == address


def test_threads_never_share_memory() -> None:
    buffers, wrong = RowBuffers(8), []

    def work(number: int) -> None:
        held = []
        for turn in range(300):
            array, _ = buffers.take(1 + (turn * number) % 5)
            array[:] = np.full(len(array), number * 1000 + turn, "<i8").view("V8")
            held.append((number * 1000 + turn, array))
            if len(held) > 3:
                value, first = held.pop(0)
                if (first.view("<i8") != value).any():
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_targets_that_are_in_no_sample_are_counted(many_shards: tuple[Path, DataConfig]) -> None:
    directory, _ = many_shards
    dataset = opened(many_shards)
    shards = read_manifest(LocalStore(directory)).splits["train"].shards
    targets = sum((shard.tokens or 0) - 1 for shard in shards)
    sequence_tokens = dataset.facts.sequence_tokens
    assert sequence_tokens is not None
    assert dataset.facts.left_out_tokens == targets - dataset.samples * sequence_tokens > 0
