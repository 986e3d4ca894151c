"""Streams of mixtures and windows: one order, digest and count whatever the world, micro-batch, restart and plan."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.digest import EMPTY_DIGEST, chain, mix64
from data.epochs import refuse_too_many_epochs
from data.mixture import quotas_of
from data.plan import Plan, Segment, StreamPart
from data.samples import Choices, DatasetFacts
from data.steps import Share, Steps, samples_of_step
from data.stream import GlobalStep, Stream
from data.windows import WINDOWED_ORDER


@dataclass
class Numbers:
    """A dataset whose samples hold their own ids, in shards of any sizes; mixing keeps what was mixed with what."""

    address: str
    shards: list[int]
    mixes: bool = False
    packing_identity: str | None = None
    sample_bytes: int = 16
    looks_ahead_samples: int = 0
    facts: DatasetFacts = field(default_factory=lambda: DatasetFacts(kind="images"))

    @property
    def fingerprint(self) -> str:
        return self.address

    @property
    def shard_samples(self) -> npt.NDArray[np.int64]:
        return np.array(self.shards)

    @property
    def samples(self) -> int:
        return sum(self.shards)

    def gather(self, ids: Any, choices: Choices | None = None) -> Any:
        assert choices is not None
        assert len(ids) == len(choices.epochs)
        hashes = mix64(ids.astype(np.uint64) + np.uint64(ord(self.address[0]) << 32))
        return {"ids": ids.copy(), "epochs": choices.epochs.copy(), "hash": hashes.view(np.int64)}, hashes

    def mix(self, fields: Any, partners: Any, words: Any) -> Any:
        rows = {name: values[: len(partners)] for name, values in fields.items()}
        return rows | {"partner": fields["hash"][partners], "word": words.view(np.int64)}


def count(batch: Mapping[str, torch.Tensor]) -> int:
    """Items: one and a number that differs from sample to sample."""
    return int((1 + batch["ids"] % 3).sum())


def read(
    datasets: Mapping[str, Numbers], plan: Plan, *, world_size: int, micro_samples: int, position: int, stop: int
) -> list[list[GlobalStep]]:
    """The steps that each rank of a world reads."""
    barrier = threading.Barrier(world_size, timeout=120)
    lists: list[list[int]] = [[] for _ in range(world_size)]

    def reducer(rank: int) -> Callable[[list[int]], list[int]]:
        def reduce_items(items: list[int]) -> list[int]:
            lists[rank] = items
            barrier.wait()
            total = [sum(column) for column in zip(*lists, strict=True)]
            barrier.wait()
            return total

        return reduce_items

    results: list[list[GlobalStep]] = [[] for _ in range(world_size)]

    def consume(rank: int) -> None:
        stream = Stream(
            datasets, plan, rank=rank, world_size=world_size, micro_samples=micro_samples, position=position,
            stop_position=stop, count_items=count, reduce_items=reducer(rank),
        )  # fmt: skip
        results[rank].extend(stream)
        stream.close()

    ranks = [threading.Thread(target=consume, args=(rank,)) for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    return results


def samples_in_order(ranks: list[list[GlobalStep]]) -> list[tuple[int, ...]]:
    """Position, stream, id, epoch and whatever mixing gave of each sample: rank after rank within each step."""
    found = []
    for steps in zip(*ranks, strict=True):
        for batch in (batch for step in steps for batch in step.micro_batches if batch.weight):
            streams = [0] * batch.samples if batch.streams is None else batch.streams.tolist()
            mixed = [
                batch.tensors[name].tolist() for name in ("epochs", "hash", "partner", "word") if name in batch.tensors
            ]
            found += list(zip(batch.positions.tolist(), streams, batch.tensors["ids"].tolist(), *mixed, strict=True))
    return found


def digest_of(ranks: list[list[GlobalStep]]) -> str:
    digest = EMPTY_DIGEST
    for steps in zip(*ranks, strict=True):
        digest = chain(digest, sum(step.fold for step in steps))
    return digest


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, Numbers], Plan]:
    """One to three streams over random shards, global or windowed, in one or two segments."""
    names = draw(st.sampled_from([[""], ["a", "b"], ["a", "b", "c"]]))
    mixes = draw(st.booleans())
    datasets = {
        name: Numbers(name or "x", draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)), mixes) for name in names
    }
    segments = []
    for start in draw(st.sampled_from([[0], [0, 37]])):
        weights = {name: draw(st.integers(1, 5)) for name in names}
        segments.append((start, weights, draw(st.integers(1, 24))))
    orders = {}
    for name, dataset in datasets.items():
        lanes = draw(st.integers(1, min(6, dataset.samples)))
        windowed = {"order": WINDOWED_ORDER, "lanes": lanes, "window_shards": draw(st.integers(1, 3))}
        orders[name] = windowed if draw(st.booleans()) else {}
    plan = Plan.of(
        [
            Segment(
                start_position=start,
                streams=tuple(
                    StreamPart(name=n, fingerprint=datasets[n].address, sequence_tokens=None, quota=quota, **orders[n])
                    for n, quota in zip(weights, quotas_of(weights), strict=True)
                ),
                seed=3,
                global_samples=global_samples,
            )
            for start, weights, global_samples in segments
        ]
    )
    return datasets, plan


@settings(deadline=None, max_examples=60)
@given(planned=plans(), world_size=st.integers(1, 5), micro=st.integers(1, 24), data=st.data())
def test_every_world_reads_the_order_of_one_process(
    planned: tuple[dict[str, Numbers], Plan], world_size: int, micro: int, data: st.DataObject
) -> None:
    datasets, plan = planned
    smallest = min(segment.global_samples for segment in plan.segments)
    stop = data.draw(st.integers(1, 260), label="stop")
    alone = read(datasets, plan, world_size=1, micro_samples=smallest, position=0, stop=stop)
    ends = np.cumsum([step.samples for step in alone[0]]).tolist()
    restart = data.draw(st.integers(0, len(ends) - 1), label="restart")
    position = [0, *ends][restart]
    micro = min(micro, smallest)
    split = read(datasets, plan, world_size=world_size, micro_samples=micro, position=position, stop=stop)

    assert samples_in_order(split) == samples_in_order(alone)[position:]
    assert digest_of(split) == digest_of([alone[0][restart:]])
    for steps in zip(alone[0][restart:], *split, strict=True):
        assert len({(step.samples, step.items, step.streams) for step in steps}) == 1
    assert sorted(sample[0] for sample in samples_in_order(alone)) == list(range(stop))
    _every_sample_as_often_as_planned(datasets, plan, samples_in_order(alone), stop)
    _streams_are_told_as_they_were_read(plan, datasets, alone[0])
    last = samples_of_step(plan, [datasets[stream.name].shard_samples for stream in plan.streams], ends[0])
    assert [sample for _, sample in last] == [sample[2] for sample in samples_in_order(alone)[: ends[0]]]


def _every_sample_as_often_as_planned(
    datasets: dict[str, Numbers], plan: Plan, samples: list[tuple[int, ...]], stop: int
) -> None:
    for number, stream in enumerate(plan.streams):
        seen = Counter(sample[2] for sample in samples if sample[1] == number)
        whole, rest = divmod(plan.consumed(stop)[number], datasets[stream.name].samples)
        assert set(seen.values()) <= {whole, whole + 1}
        assert sum(times == whole + 1 for times in seen.values()) == (rest if whole + 1 else 0)
        assert sum(seen.values()) == plan.consumed(stop)[number]


def _streams_are_told_as_they_were_read(plan: Plan, datasets: dict[str, Numbers], steps: list[GlobalStep]) -> None:
    position = 0
    for step in steps:
        position += step.samples
        if len(plan.streams) == 1:
            assert step.streams == ()
            continue
        assert sum(stream.items for stream in step.streams) == step.items
        read_numbers = [number for batch in step.micro_batches for number in batch.streams.tolist()]  # type: ignore[union-attr]
        for stream in step.streams:
            assert plan.streams[stream.number].name == stream.name
            assert stream.samples == read_numbers.count(stream.number)
            epochs = plan.consumed(position)[stream.number] / datasets[stream.name].samples
            assert stream.epochs == epochs


@settings(deadline=None, max_examples=100)
@given(samples=st.integers(1, 40), world_size=st.integers(1, 7), micro_samples=st.integers(1, 9))
def test_partners_are_neighbours_wherever_they_are_read(samples: int, world_size: int, micro_samples: int) -> None:
    for rank in range(world_size):
        share = Share.of(samples, rank, world_size, micro_samples, pairs=True)
        rows = np.concatenate([share.offsets, share.guests])
        wanted = [slot ^ 1 if slot ^ 1 < samples else max(slot - 1, 0) for slot in share.offsets.tolist()]
        assert rows[share.partners].tolist() == wanted
        assert len(share.guests) <= 3
        assert Share.of(samples, rank, world_size, micro_samples).guests.size == 0


def test_weights_change_where_a_segment_begins_and_epochs_go_on() -> None:
    datasets = {"a": Numbers("a", [50, 60]), "b": Numbers("b", [30])}

    def segment(start: int, quota: int) -> Segment:
        parts = [("a", quota), ("b", 4096 - quota)]
        streams = tuple(StreamPart(name=n, fingerprint=n, quota=q, sequence_tokens=None) for n, q in parts)
        return Segment(start_position=start, streams=streams, seed=1, global_samples=10)

    plan = Plan.of([segment(0, 3072)]).append(segment(100, 1024))
    (steps,) = read(datasets, plan, world_size=1, micro_samples=10, position=0, stop=220)
    straight = read(datasets, Plan.of([segment(0, 3072)]), world_size=1, micro_samples=10, position=0, stop=100)
    assert samples_in_order([steps])[:100] == samples_in_order(straight)
    for number, name in enumerate("ab"):
        mine = [sample[2] for sample in samples_in_order([steps]) if sample[1] == number]
        assert len(set(mine[: datasets[name].samples])) == min(len(mine), datasets[name].samples)
    early, late = steps[:10], steps[10:]
    share = [
        sum(step.streams[0].samples for step in part) / sum(step.samples for step in part) for part in (early, late)
    ]
    assert share[0] > 0.6
    assert share[1] < 0.4


def test_a_stream_that_is_read_too_often_is_refused_with_the_place() -> None:
    datasets = {"a": Numbers("a", [1000]), "b": Numbers("b", [100])}
    streams = tuple(StreamPart(name=n, fingerprint=n, quota=2048, sequence_tokens=None) for n in "ab")
    plan = Plan.of([Segment(start_position=0, streams=streams, seed=1, global_samples=10)])
    refuse_too_many_epochs(plan, datasets, {"a": None, "b": 2.0}, 390)
    with pytest.raises(
        ValueError, match=r"data.streams.b.max_epochs 2: the run reads .* epochs, and passes"
    ) as refused:
        refuse_too_many_epochs(plan, datasets, {"a": None, "b": 2.0}, 1000)
    first = int(str(refused.value).split("at sample ")[1].split(" ")[0])
    assert plan.consumed(first)[1] == 201
    assert plan.consumed(first - 1)[1] == 200
    single = Plan.of([segment_of_one(1000)])
    with pytest.raises(ValueError, match=r"^data.max_epochs 1.5: .* at sample 1,501 of 1,600"):
        refuse_too_many_epochs(single, {"": Numbers("x", [1000])}, {"": 1.5}, 1600)
    # 0.29 as it was written: in floating point its hundredfold is 28.999...
    refuse_too_many_epochs(single, {"": Numbers("x", [100])}, {"": 0.29}, 29)
    with pytest.raises(ValueError, match=r"at sample 30 of 30"):
        refuse_too_many_epochs(single, {"": Numbers("x", [100])}, {"": 0.29}, 30)


def segment_of_one(global_samples: int) -> Segment:
    return Segment(
        start_position=0,
        streams=(StreamPart(fingerprint="x", sequence_tokens=None),),
        seed=1,
        global_samples=global_samples,
    )


def test_the_parts_of_ranks_lie_in_lanes_of_their_own() -> None:
    shards = np.full(64, 100)
    part = StreamPart(fingerprint="x", sequence_tokens=None, order=WINDOWED_ORDER, lanes=8, window_shards=2)
    plan = Plan.of([Segment(start_position=0, streams=(part,), seed=1, global_samples=32)])
    touched = []
    for rank in range(4):
        steps = Steps(plan, [shards], rank=rank, world_size=4, micro_samples=8, stop_position=6400)
        touched.append(set((steps.block(0, 50).samples.ids // 100).tolist()))
    # Two lanes for each rank, which have read a quarter of their 8 shards: no shard is fetched by two ranks.
    assert all(len(shards) <= 2 * 2 * 2 for shards in touched)
    assert sum(map(len, touched)) - len(set.union(*touched)) <= 3  # a shard that a lane's border cuts
