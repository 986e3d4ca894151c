"""The checksum by which ranks compare what they must hold alike, and what each engine says must be alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrib import copies
from distrib.copies import checksum, odd_ranks
from distrib.reduction import limbs_of_word, word_of_limbs
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, SGD_UNCLIPPED, global_batch, make_engine, share_of, take_step
from tests.distrib.test_sharding import mesh_of
from tests.worker_pool import WorkerPool


def some_tensors() -> list[torch.Tensor]:
    """All kinds: sizes that are no multiple of a word, a scalar, an empty one, views that begin within a word, strides."""
    torch.manual_seed(0)
    return [
        torch.randn(3, 5), torch.randn(7, dtype=torch.float64), torch.randn(()), torch.randn(0), torch.randn(9).bfloat16(),
        torch.randn(11)[3:10], torch.randn(4, 6).t(), torch.arange(5), torch.tensor([True, False, True]),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(501),
    ]  # fmt: skip


def flip(tensor: torch.Tensor, index: int, bit: int) -> None:
    """Flips a bit of the byte that is `index`-th in the order of the tensor's elements."""
    content = tensor.detach().reshape(-1).view(torch.uint8)
    content[index] ^= 1 << bit
    if content.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():  # a copy, of strides
        tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


@pytest.mark.parametrize("words", [copies._WORDS["cpu"], 16])
def test_every_flipped_bit_changes_it(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    """With few words at a time tensors are cut and joined in all ways."""
    monkeypatch.setitem(copies._WORDS, "cpu", words)
    copies._weights.cache_clear()
    tensors = some_tensors()
    before = checksum(tensors).item()
    flips = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        for index in range(0, size, max(1, size // 150)):
            for bit in range(8) if tensor.dtype != torch.bool else (0,):
                flip(tensor, index, bit)
                assert checksum(tensors).item() != before, (tensor.shape, tensor.dtype, index, bit)
                flip(tensor, index, bit)
                flips += 1
    assert flips > 3000
    assert checksum(tensors).item() == before
    copies._weights.cache_clear()


def test_order_and_place_matter_and_memory_does_not() -> None:
    first, second = torch.randn(300), torch.randn(300)
    assert checksum([first, second]) != checksum([second, first])
    assert checksum([first.flip(0)]) != checksum([first])
    assert checksum([first[:100], first[100:]]) == checksum([first])
    assert checksum([first.view(30, 10).t().contiguous().t()]) == checksum([first])
    assert checksum([]).item() == 0


def test_it_travels_whole() -> None:
    for word in (0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0):
        limbs = limbs_of_word(torch.tensor(word))
        assert limbs.tolist() == [float((word >> shift) & 0xFFFF) for shift in (0, 16, 32, 48)]
        assert word_of_limbs(limbs.tolist()) == word % 2**64


@pytest.mark.parametrize(
    ("checksums", "shards", "odd"),
    [
        ([5], 1, []),
        ([5, 5], 1, []),
        ([5, 6], 1, [0, 1]),  # nobody can say which
        ([5, 6, 5], 1, [1]),
        ([5, 6, 7], 1, [0, 1, 2]),
        ([5, 5, 6, 6], 1, [0, 1, 2, 3]),
        ([5, 7, 5, 7], 2, []),  # two copies over two shards each
        ([5, 7, 5, 8], 2, [1, 3]),
        ([5, 7, 5, 8, 5, 7], 2, [3]),
        ([1, 2, 3, 4], 4, []),  # one copy: nothing to compare
    ],
)
def test_the_odd_ranks_are_those_in_the_minority(checksums: list[int], shards: int, odd: list[int]) -> None:
    assert odd_ranks(checksums, shards) == odd


def test_one_process_has_no_copies() -> None:
    assert make_engine(single_process_world("cpu"), ADAMW_CLIPPED).copies() is None


def _compare(world: World, engine_kind: str, zero_stage: int, replicas: int | None) -> tuple[Any, Any, Any] | None:
    """Checksums of all ranks after three steps, after a flip of one mantissa bit of rank 1's, and the names that differ."""
    if engine_kind == "native":
        world = mesh_of(world, zero_stage, replicas or 1)
    options: dict[str, Any] = {"engine": engine_kind, "zero_stage": zero_stage}
    if replicas is not None:
        options["replicas"] = replicas
    engine = make_engine(world, ADAMW_CLIPPED if zero_stage != 1 else SGD_UNCLIPPED, **options)
    engine.dry_run(share_of(global_batch(0), 0, 0, 1, 2)[0])
    for step in range(3):
        take_step(engine, step, micro_samples=2)
    held = engine.copies()
    if held is None:
        return None
    before = world.gather_objects(checksum(held.tensors.values()).item())
    name, victim = list(held.tensors.items())[-1]
    if world.rank == 1:
        flip(victim, 0, 0)
    after = world.gather_objects(checksum(engine.copies().tensors.values()).item())
    return odd_ranks(before, held.shards), odd_ranks(after, held.shards), (name, held.shards, len(held.tensors))


@pytest.mark.parametrize(
    ("engine_kind", "zero_stage"),
    [
        ("native", 0),
        ("accelerate", 0),
        *(pytest.param("deepspeed", stage, marks=pytest.mark.long) for stage in (0, 1, 2)),
    ],
)
def test_ranks_agree_until_a_bit_of_one_is_flipped(gloo_pool: WorkerPool, engine_kind: str, zero_stage: int) -> None:
    for found in gloo_pool.run(_compare, 2, engine_kind, zero_stage, None):
        assert found is not None
        before, after, (name, shards, _) = found
        assert before == []
        assert after == [0, 1]
        assert shards == 1
        assert name.startswith("optimizer." if zero_stage == 0 else "model.")


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_replicas_of_a_sharded_model_agree(gloo_pool: WorkerPool, zero_stage: int) -> None:
    for found in gloo_pool.run(_compare, 4, "native", zero_stage, 2):
        assert found is not None
        before, after, (_, shards, _) = found
        assert (before, after, shards) == ([], [1, 3], 2)


@pytest.mark.parametrize("engine_kind", ["native", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_where_every_weight_is_on_one_rank_there_is_nothing_to_compare(gloo_pool: WorkerPool, engine_kind: str) -> None:
    assert gloo_pool.run(_compare, 2, engine_kind, 3, None) == [None, None]
