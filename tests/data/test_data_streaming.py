"""Steps of a streamed source: one order on any ranks that divide its parts, and nothing lost or doubled in an epoch."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import data.parts
from data.digest import EMPTY_DIGEST, chain
from data.parts import Place
from data.plan import STREAMED_ORDER, Plan, Segment, StreamPart
from data.steps import samples_of_step
from data.stream import GlobalStep
from data.streamed import StreamedSource
from data.streaming import StreamedSteps, describe_stream
from launch.recipe import load_recipe
from tests.data.data_helpers import count_targets
from tests.data.streamed_helpers import (
    SEQUENCE_TOKENS,
    documents_in,
    documents_of,
    streamed_config,
    write_source,
)


@dataclass(frozen=True)
class Read:
    """What the ranks of a world read: their steps, and where all parts stood after each."""

    ranks: list[list[GlobalStep]]
    places: list[list[Place]]

    @property
    def digest(self) -> str:
        digest = EMPTY_DIGEST
        for steps in zip(*self.ranks, strict=True):
            digest = chain(digest, sum(step.fold for step in steps))
        return digest

    def samples(self) -> list[tuple[int, bytes]]:
        """Position and tokens of each sample, rank after rank within each step."""
        found = []
        for steps in zip(*self.ranks, strict=True):
            for batch in (batch for step in steps for batch in step.micro_batches if batch.weight):
                rows = batch.tensors["tokens"].numpy()
                found += [(int(p), row.tobytes()) for p, row in zip(batch.positions, rows, strict=True)]
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StreamedSource:
    path = write_source(tmp_path_factory.mktemp("source") / "jsonl", "jsonl")
    return StreamedSource(streamed_config(path, "jsonl", shuffle_buffer_samples=6))


@pytest.fixture(autouse=True, scope="module")
def small_groups() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(data.parts, "GROUP_EXAMPLES", 5)
    yield
    patch.undo()


def plan_of(source: StreamedSource, *segments: tuple[int, int]) -> Plan:
    """A plan of segments (start position, samples of a step)."""
    part = StreamPart(fingerprint=source.fingerprint, sequence_tokens=SEQUENCE_TOKENS, order=STREAMED_ORDER)
    return Plan.of(
        [Segment(start_position=start, streams=(part,), seed=3, global_samples=samples) for start, samples in segments]
    )


def read(
    source: StreamedSource,
    plan: Plan,
    places: list[Place],
    *,
    world_size: int = 1,
    micro_samples: int = 2,
    position: int = 0,
    stop: int = 60,
    take: int | None = None,
) -> Read:
    """Reads on every rank of a world, each in a thread; `take`: only so many steps."""
    barrier = threading.Barrier(world_size, timeout=120)
    lists: list[list[int]] = [[] for _ in range(world_size)]
    steps: list[list[GlobalStep]] = [[] for _ in range(world_size)]
    stood: list[list[dict[int, Place]]] = [[] for _ in range(world_size)]

    def reducer(rank: int) -> Callable[[list[int]], list[int]]:
        def reduce_items(items: list[int]) -> list[int]:
            lists[rank] = items
            barrier.wait()
            total = [sum(column) for column in zip(*lists, strict=True)]
            barrier.wait()
            return total

        return reduce_items

    def consume(rank: int) -> None:
        stream = StreamedSteps(
            source, plan, places, rank=rank, world_size=world_size, micro_samples=micro_samples, position=position,
            stop_position=stop, count_items=count_targets, reduce_items=reducer(rank) if world_size > 1 else None,
        )  # fmt: skip
        for step in stream:
            steps[rank].append(step)
            stood[rank].append(stream.places(step.first_position + step.samples))
            if len(steps[rank]) == take:
                break
        stream.close()

    ranks = [threading.Thread(target=consume, args=(rank,)) for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    merged = [{number: place for own in step for number, place in own.items()} for step in zip(*stood, strict=True)]
    return Read(steps, [[step[number] for number in sorted(step)] for step in merged])


@settings(deadline=None, max_examples=40)
@given(
    parts=st.sampled_from([1, 2, 3, 4, 6]),
    samples=st.integers(6, 15),
    later=st.integers(6, 15),
    micro=st.integers(1, 5),
    data=st.data(),
)
def test_every_world_that_divides_the_parts_reads_one_order(
    source: StreamedSource, parts: int, samples: int, later: int, micro: int, data: st.DataObject
) -> None:
    """Over many epochs, with steps that change their size, a ragged last one, and a restart anywhere."""
    plan = plan_of(source, (0, samples), (samples * 3, later))
    stop = data.draw(st.integers(samples * 3, 200), label="stop")
    alone = read(source, plan, [Place()] * parts, stop=stop)
    world_size = data.draw(st.sampled_from([size for size in (1, 2, 3, 4, 6) if parts % size == 0]), label="world")
    split = read(source, plan, [Place()] * parts, world_size=world_size, micro_samples=micro, stop=stop)
    assert split.samples() == alone.samples()
    assert split.digest == alone.digest
    for steps in zip(*alone.ranks, *split.ranks, strict=True):
        assert len({(step.first_position, step.samples, step.items) for step in steps}) == 1
        assert len({len(step.micro_batches) for step in steps[1:]}) == 1

    restart = data.draw(st.integers(0, len(alone.places) - 1), label="restart")
    step = alone.ranks[0][restart]
    position = step.first_position + step.samples
    resumed = read(
        source, plan, split.places[restart], world_size=world_size, micro_samples=micro, position=position, stop=stop
    )
    assert resumed.samples() == alone.samples()[position:]


@pytest.mark.parametrize("worlds", [(1, 3)])
def test_one_worker_and_three_read_the_same_documents_in_another_order(tmp_path: Path, worlds: tuple[int, int]) -> None:
    path = write_source(tmp_path / "jsonl", "jsonl")
    source = StreamedSource(streamed_config(path, "jsonl"))
    expected = documents_of(path, "jsonl", "train")
    found = []
    for parts in worlds:
        taken = read(source, plan_of(source, (0, 6)), [Place()] * parts, world_size=parts, stop=240)
        epoch: list[Any] = []
        for rank in range(parts):
            rows = [
                batch.tensors["tokens"].numpy()
                for step in taken.ranks[rank]
                for batch in step.micro_batches
                if batch.weight
            ]
            documents = documents_in({"tokens": np.concatenate(rows)})
            own = len([found for found in source.read(source.part(rank, parts), "train") if found is not None])
            assert len(documents) > own
            epoch += documents[:own]
        assert Counter(epoch) == Counter(expected)
        found.append(taken)
    assert found[0].digest != found[1].digest


def test_places_belong_to_the_step_that_was_taken_and_not_to_the_one_made_ready(source: StreamedSource) -> None:
    plan = plan_of(source, (0, 6))
    straight = read(source, plan, [Place()] * 2, stop=120)
    for steps in (1, 4, 9):
        stopped = read(source, plan, [Place()] * 2, stop=120, take=steps)
        assert stopped.places == straight.places[:steps]
    stream = StreamedSteps(
        source, plan, [Place()], rank=0, world_size=1, micro_samples=2, position=0, stop_position=60,
        count_items=count_targets, prefetch_steps=4,
    )  # fmt: skip
    steps = iter(stream)
    next(steps)
    with pytest.raises(AssertionError, match="asked for 12, at 6"):
        stream.places(12)
    stream.close()
    with pytest.raises(ValueError, match="read once"):
        next(iter(stream))


def test_places_of_another_step_would_show_in_the_digest(source: StreamedSource) -> None:
    plan = plan_of(source, (0, 6))
    straight = read(source, plan, [Place()] * 2, stop=120)
    right = read(source, plan, straight.places[3], position=24, stop=120)
    wrong = read(source, plan, straight.places[4], position=24, stop=120)
    assert right.digest != wrong.digest
    assert straight.samples()[24:] == right.samples() != wrong.samples()


def test_a_failure_in_the_thread_is_raised_where_steps_are_taken(tmp_path: Path) -> None:
    path = write_source(tmp_path / "jsonl", "jsonl")
    source = StreamedSource(streamed_config(path, "jsonl"))
    for file in path.iterdir():
        file.write_text('{"text": null}\n')
    stream = StreamedSteps(
        source, plan_of(source, (0, 6)), [Place()], rank=0, world_size=1, micro_samples=2, position=0, stop_position=60,
        count_items=count_targets,
    )  # fmt: skip
    with pytest.raises(ValueError, match="is not text but None"):
        list(stream)
    stream.close()


def test_samples_of_a_step_are_named_by_their_positions(source: StreamedSource) -> None:
    plan = plan_of(source, (0, 6), (12, 4))
    assert samples_of_step(plan, [None], 16) == [("", position) for position in range(12, 16)]
    assert samples_of_step(plan, [None], 11) == [("", position) for position in range(6, 11)]


def test_what_a_stream_promises_is_told_as_it_is(tmp_path: Path) -> None:
    source = StreamedSource(streamed_config(write_source(tmp_path / "jsonl", "jsonl"), "jsonl"))
    validation = source.validation(2)
    text = {parts: "\n".join(describe_stream(source, parts, validation)) for parts in (1, 2, 3)}
    assert "in one part (4 shards)" in text[1]
    assert "2 parts side by side, each of which reads shards of its own" in text[2]
    assert "3 parts side by side, each of which reads everything and keeps one of 3 documents" in text[3]
    assert source.part(1, 2).num_shards == 2
    assert source.part(1, 3).num_shards == 4
    for part in text.values():
        assert "documents come in the order of the source, not shuffled" in part
        assert "goes on into its next epoch" in part
        assert f"2 samples from the first {validation.examples_read} documents" in part
    shuffled = StreamedSource(streamed_config(tmp_path / "jsonl", "jsonl", shuffle_buffer_samples=1000))
    assert "shuffled with their neighbours, 1,000 together" in describe_stream(shuffled, 1, validation)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "x"}, "directory has no effect with data.streaming=true"),
        ({"max_epochs": 2.0}, "max_epochs has no effect with data.streaming=true"),
        ({"order": "windowed", "lanes": 4}, "order, lanes has no effect with data.streaming=true"),
        ({"shard_bytes": 1000}, "shard_bytes has no effect with data.streaming=true"),
        ({"packing": "best_fit"}, "packing has no effect with data.streaming=true"),
        ({"separate_documents": True}, "separate_documents has no effect with data.streaming=true"),
        ({"augmentation": {"flip": 0.5}, "workers": 2}, "augmentation, workers has no effect with data.streaming=true"),
        ({"source": "text:x"}, "data.streaming=true reads hf:NAME only, not 'text:x'"),
        ({"source": ["hf:x", "hf:y"]}, r"reads one source, not several \(hf:x, hf:y\)"),
        ({"source": "train=hf:x"}, "a source is always divided by content; remove train="),
        ({"directory": "s3://bucket/x"}, "directory has no effect with data.streaming=true"),
        (
            {"cache_bytes": 9, "download_threads": 2},
            "cache_bytes, download_threads has no effect with data.streaming=true",
        ),
        ({"tokenizer": "bpe:300"}, "data.tokenizer=bpe:300 is trained on the whole corpus"),
        (
            {"streaming": False, "shuffle_buffer_samples": 9},
            "shuffle_buffer_samples has no effect with data.streaming=fal",
        ),
        ({"streaming": False, "streaming_parts": 9}, "streaming_parts has no effect with data.streaming=false"),
        ({"shuffle_buffer_samples": -1}, "greater than or equal to 0"),
        ({"streaming_parts": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_without_effect_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        streamed_config(Path("somewhere"), "jsonl", **changes)


def test_streaming_with_a_mixture_is_refused() -> None:
    streams = ['data.streams={"a": {"source": "hf:x", "weight": 1}, "b": {"source": "hf:y", "weight": 1}}']
    with pytest.raises(ValueError, match=r"streams has no effect with data\.streaming=true"):
        load_recipe("gpt-stdlib", ["data.source=stdlib", "data.streaming=true", *streams])


def test_a_recipe_must_say_how_much_validation_and_give_every_part_samples() -> None:
    overrides = ["data.source=hf:x", "data.streaming=true", "data.tokenizer=bytes", "evaluation.samples=null"]
    with pytest.raises(ValueError, match=r"evaluation\.samples is not set; with data\.streaming=true"):
        load_recipe("gpt-stdlib", overrides)
    several = [*overrides[:-1], "evaluation.samples=4", "data.streaming_parts=64", "batch.global_samples=32"]
    with pytest.raises(ValueError, match=r"data\.streaming_parts 64 is more than batch\.global_samples 32"):
        load_recipe("gpt-stdlib", several)
