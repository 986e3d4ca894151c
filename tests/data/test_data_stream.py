"""The stream: one order, one digest and one item count, however a step is split over ranks and micro-batches."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import open_dataset
from data.digest import EMPTY_DIGEST, chain
from data.plan import Plan
from data.samples import Dataset
from data.store import LocalStore
from data.stream import GlobalStep, MicroBatch, Stream, evaluation_batches
from tests.data.data_helpers import count_targets, plan_of, prepared_tokens, segment_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory, config = prepared_tokens(tmp_path_factory.mktemp("tokens"), shard_bytes=3000)
    opened = open_dataset(LocalStore(directory), config, "train")
    assert opened.samples > 300
    return opened


class ThreadSum:
    """Sums lists over ranks that run as threads of one process: every rank must make the same calls."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=120)
        self._lists: list[list[int]] = [[] for _ in range(world_size)]

    def of(self, rank: int) -> Callable[[list[int]], list[int]]:
        def reduce_items(items: list[int]) -> list[int]:
            self._lists[rank] = items
            self._barrier.wait()
            total = [sum(column) for column in zip(*self._lists, strict=True)]
            self._barrier.wait()
            return total

        return reduce_items


def read(
    dataset: Dataset,
    plan: Plan,
    *,
    world_size: int,
    micro_samples: int,
    position: int,
    stop: int,
    steps: int | None = None,
) -> list[list[GlobalStep]]:
    """The steps that each rank reads; with `steps` all ranks close after so many."""
    threads_sum = ThreadSum(world_size)
    streams = [
        Stream(
            {"": dataset},
            plan,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            position=position,
            stop_position=stop,
            count_items=count_targets,
            reduce_items=threads_sum.of(rank),
        )
        for rank in range(world_size)
    ]
    iterators = [iter(stream) for stream in streams]
    results: list[list[GlobalStep]] = [[] for _ in range(world_size)]

    def consume(rank: int) -> None:
        for step in iterators[rank]:
            results[rank].append(step)
            if steps is not None and len(results[rank]) == steps:
                break
        streams[rank].close()

    ranks = [threading.Thread(target=consume, args=(rank,)) for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    # No prefetch thread is left waiting in a reduction that the other ranks did not make.
    assert not prefetch_threads()
    return results


def prefetch_threads() -> list[threading.Thread]:
    """Those that do not end; `close` waits for them for some seconds alone."""
    threads = [thread for thread in threading.enumerate() if thread.name == "lockstep-prefetch"]
    for thread in threads:
        thread.join(60)
    return [thread for thread in threads if thread.is_alive()]


def real(step: GlobalStep) -> Iterator[MicroBatch]:
    return (batch for batch in step.micro_batches if batch.weight)


def ordered_ids(ranks: list[list[GlobalStep]]) -> list[int]:
    """Sample ids in the order of positions: rank after rank within each step."""
    return [
        sample
        for steps in zip(*ranks, strict=True)
        for step in steps
        for batch in real(step)
        for sample in batch.sample_ids.tolist()
    ]


def digests(ranks: list[list[GlobalStep]]) -> list[str]:
    chained, digest = [], EMPTY_DIGEST
    for steps in zip(*ranks, strict=True):
        digest = chain(digest, sum(step.fold for step in steps))
        chained.append(digest)
    return chained


@settings(deadline=None, max_examples=40)
@given(
    world_size=st.integers(1, 5),
    global_samples=st.integers(1, 20),
    micro_samples=st.integers(1, 20),
    steps=st.integers(1, 30),
    ragged=st.integers(0, 19),
    position=st.integers(0, 2000),
)
def test_the_order_over_ranks_is_the_order_of_one_process(
    dataset: Dataset, world_size: int, global_samples: int, micro_samples: int, steps: int, ragged: int, position: int
) -> None:
    micro_samples = min(micro_samples, global_samples)
    stop = position + steps * global_samples + ragged % global_samples
    plan = plan_of(dataset, global_samples)
    alone = read(dataset, plan, world_size=1, micro_samples=global_samples, position=position, stop=stop)
    split = read(dataset, plan, world_size=world_size, micro_samples=micro_samples, position=position, stop=stop)
    assert ordered_ids(split) == ordered_ids(alone)
    assert len(ordered_ids(alone)) == stop - position
    assert digests(split) == digests(alone)
    for ranks in zip(alone[0], *split, strict=True):
        assert len({(step.first_position, step.samples, step.items) for step in ranks}) == 1
        counts = {len(step.micro_batches) for step in ranks[1:]}
        assert counts == {math.ceil(math.ceil(ranks[0].samples / world_size) / micro_samples)}
    positions = [p for step in alone[0] for batch in step.micro_batches for p in batch.positions.tolist()]
    assert positions == list(range(position, stop))


@settings(deadline=None, max_examples=20)
@given(restart=st.integers(0, 40), global_samples=st.integers(1, 9), world_size=st.integers(1, 3))
def test_a_restart_at_any_step_continues_the_order(
    dataset: Dataset, restart: int, global_samples: int, world_size: int
) -> None:
    plan, stop = plan_of(dataset, global_samples), 41 * global_samples
    whole = read(dataset, plan, world_size=1, micro_samples=global_samples, position=0, stop=stop)
    rest = read(dataset, plan, world_size=world_size, micro_samples=1, position=restart * global_samples, stop=stop)
    assert ordered_ids(rest) == ordered_ids(whole)[restart * global_samples :]
    assert [step.items for step in rest[0]] == [step.items for step in whole[0]][restart:]


def test_every_sample_comes_once_an_epoch_with_its_own_tokens(dataset: Dataset) -> None:
    plan = plan_of(dataset, 7)
    (steps,) = read(dataset, plan, world_size=1, micro_samples=3, position=0, stop=2 * dataset.samples)
    ids = np.array(ordered_ids([steps]))
    assert np.array_equal(np.sort(ids[: dataset.samples]), np.arange(dataset.samples))
    assert np.array_equal(np.sort(ids[dataset.samples :]), np.arange(dataset.samples))
    assert (ids[: dataset.samples] != ids[dataset.samples :]).any()
    for batch in steps[5].micro_batches:
        fields, _ = dataset.gather(batch.sample_ids)
        assert np.array_equal(batch.tensors["tokens"].numpy(), fields["tokens"])
        assert batch.tensors["tokens"].dtype == torch.uint16
        assert batch.samples == len(batch.positions)
        assert batch.first_position == batch.positions[0]


def test_fillers_repeat_the_first_sample_and_weigh_nothing(dataset: Dataset) -> None:
    plan = plan_of(dataset, 5)
    ranks = read(dataset, plan, world_size=7, micro_samples=1, position=0, stop=10)
    for steps in zip(*ranks, strict=True):
        fillers = [batch for step in steps for batch in step.micro_batches if batch.weight == 0.0]
        assert len(fillers) == 2
        for filler in fillers:
            assert filler.fold == 0
            assert filler.positions.tolist() == [steps[0].first_position]
            assert filler.sample_ids.tolist() == next(real(steps[1])).sample_ids.tolist()
        assert steps[0].items == sum(count_targets(batch.tensors) for step in steps for batch in real(step))


def test_the_digest_sees_another_order_and_a_repeat(dataset: Dataset) -> None:
    plan = plan_of(dataset, 4)
    (steps,) = read(dataset, plan, world_size=1, micro_samples=4, position=0, stop=40)
    other = read(dataset, plan_of(dataset, 4, seed=2), world_size=1, micro_samples=4, position=0, stop=40)
    assert digests([steps])[0] != digests(other)[0]
    assert digests([steps[::-1]])[-1] != digests([steps])[-1]
    assert digests([[*steps[:5], steps[4], *steps[6:]]])[-1] != digests([steps])[-1]


def test_a_segment_may_change_the_size_of_a_step(dataset: Dataset) -> None:
    grown = plan_of(dataset, 4).append(segment_of(dataset, 6, start_position=20))
    (steps,) = read(dataset, grown, world_size=1, micro_samples=4, position=0, stop=40)
    assert [step.samples for step in steps] == [4] * 5 + [6] * 3 + [2]
    straight = read(dataset, plan_of(dataset, 4), world_size=1, micro_samples=4, position=0, stop=40)
    assert ordered_ids([steps]) == ordered_ids(straight)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 70])
def test_ranks_that_stop_at_one_step_make_the_same_reductions(dataset: Dataset, steps: int) -> None:
    ranks = read(dataset, plan_of(dataset, 6), world_size=3, micro_samples=2, position=0, stop=6000, steps=steps)
    assert [len(rank) for rank in ranks] == [steps] * 3


def make(dataset: Dataset, plan: Plan, **changes: object) -> Stream:
    values = {"rank": 0, "world_size": 1, "micro_samples": 2, "position": 0, "stop_position": 100}
    return Stream({"": dataset}, plan, **{**values, "count_items": count_targets, **changes})  # type: ignore[arg-type]


def test_an_error_of_the_thread_reaches_the_consumer_unchanged(dataset: Dataset) -> None:
    trouble = RuntimeError("counting failed")

    def count(_: object) -> int:
        raise trouble

    stream = make(dataset, plan_of(dataset, 4), count_items=count)
    with pytest.raises(RuntimeError) as raised:
        next(iter(stream))
    assert raised.value is trouble
    stream.close()


def test_close_ends_the_thread_at_any_moment(dataset: Dataset) -> None:
    for consumed in (0, 1, 5):
        stream = make(dataset, plan_of(dataset, 4), stop_position=10**9)
        steps = iter(stream)
        for _ in range(consumed):
            next(steps)
        stream.close()
        stream.close()
        assert not prefetch_threads()


def test_a_stream_is_read_once(dataset: Dataset) -> None:
    stream = make(dataset, plan_of(dataset, 4), stop_position=8)
    assert len(list(stream)) == 2
    with pytest.raises(ValueError, match="read once"):
        next(iter(stream))
    stream.close()
    assert list(make(dataset, plan_of(dataset, 4), position=8, stop_position=8)) == []


def test_what_does_not_fit_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"micro_samples 5 is larger than batch.global_samples 4"):
        make(dataset, plan_of(dataset, 4), micro_samples=5)
    with pytest.raises(ValueError, match="micro_samples 5"):
        make(dataset, plan_of(dataset, 6).append(segment_of(dataset, 4, start_position=12)), micro_samples=5)
    segment = segment_of(dataset, 4)
    (part,) = segment.streams
    for change in (
        {"fingerprint": "0" * 64},
        {"sequence_tokens": 17},
        {"order": "global-0"},
        {"name": "web"},
        {"packing": "x"},
    ):
        altered = segment.model_copy(update={"streams": (part.model_copy(update=change),)})
        with pytest.raises(ValueError, match="plan: from position 0"):
            make(dataset, Plan.of([altered]))


@settings(deadline=None, max_examples=40)
@given(world_size=st.integers(1, 5), micro_samples=st.integers(1, 9), samples=st.none() | st.integers(1, 400))
def test_evaluation_reads_each_sample_once_in_stored_order(
    dataset: Dataset, world_size: int, micro_samples: int, samples: int | None
) -> None:
    ranks = [
        list(
            evaluation_batches(dataset, rank=rank, world_size=world_size, micro_samples=micro_samples, samples=samples)
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [sample for batches in ranks for batch in batches if batch.weight for sample in batch.sample_ids.tolist()]
    assert ids == list(range(min(dataset.samples, samples or dataset.samples)))
    assert all(batch.fold == 0 for batches in ranks for batch in batches if not batch.weight)


GLOO_RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from tests.data.data_helpers import count_targets, plan_of
from data.config import DataConfig
from data.dataset import open_dataset
from data.store import LocalStore
from data.digest import EMPTY_DIGEST, chain
from data.stream import Stream

rank, world_size, init, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[5])
dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size, timeout=timedelta(seconds=200))
own_group = dist.new_group(backend="gloo")

def reduce_items(items):
    total = torch.tensor(items, dtype=torch.int64)
    dist.all_reduce(total, group=own_group)
    return total.tolist()

dataset = open_dataset(LocalStore(directory), DataConfig(sequence_tokens=16), "train")
stream = Stream({"": dataset}, plan_of(dataset, 10), rank=rank, world_size=world_size, micro_samples=3, position=20,
                stop_position=10**7, count_items=count_targets, reduce_items=reduce_items)
digest = EMPTY_DIGEST
for number, step in enumerate(stream):
    fold = torch.tensor(step.fold)
    dist.all_reduce(fold)
    digest = chain(digest, int(fold))
    if number == 19:
        break
stream.close()
print(digest, step.items)
dist.barrier()
dist.destroy_process_group()
"""


def test_real_gloo_processes_agree_with_one_process(dataset: Dataset, tmp_path: Path) -> None:
    alone = read(dataset, plan_of(dataset, 10), world_size=1, micro_samples=10, position=20, stop=220)
    init = f"file://{tmp_path / 'rendezvous'}"
    command = [sys.executable, "-c", GLOO_RANK]
    arguments = ["3", init, str(Path(__file__).parent), dataset.address]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1"}
        )
        for rank in range(3)
    ]
    printed = [process.communicate(timeout=240)[0].split() for process in ranks]
    assert printed == [[digests(alone)[-1], str(alone[0][-1].items)]] * 3
