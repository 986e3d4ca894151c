"""The audit's reading: the folds that the stream makes, at any world size, and how often each sample was read."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.audit import AuditedData, Auditor, position_after, stretches
from data.config import DataConfig
from data.dataset import open_dataset
from data.digest import to_int64
from data.parallel import each
from data.plan import Plan, Segment, StreamPart
from data.prepare import prepare
from data.samples import Dataset
from data.steps import Steps
from data.store import LocalStore
from data.stream import Stream
from tests.data.data_helpers import lorem, plan_of, prepared_tokens, write_images, write_jsonl


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two datasets of several shards."""
    directories = {}
    for name, documents in (("web", 40), ("code", 25)):
        root = tmp_path_factory.mktemp(name)
        source = write_jsonl(root / f"{name}.jsonl", [lorem(number) for number in range(documents)])
        directories[name], _ = prepared_tokens(root, source=f"jsonl:{source}#text", shard_bytes=3000)
    return directories


def part(name: str, dataset: Dataset, quota: int, lanes: int | None) -> StreamPart:
    windowed = lanes is not None
    return StreamPart(
        name=name,
        fingerprint=dataset.fingerprint,
        quota=quota,
        order="windowed-1" if windowed else "global-1",
        lanes=lanes,
        window_shards=2 if windowed else None,
        sequence_tokens=16,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    steps=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    quotas=st.tuples(st.integers(1, 4095), st.integers(1, 4095)),
    lanes=st.none() | st.integers(1, 9),
    world_size=st.integers(1, 4),
    micro_samples=st.integers(1, 7),
)
def test_folds_are_those_of_the_stream(
    streams: dict[str, Path],
    sizes: tuple[int, int],
    steps: tuple[int, int],
    quotas: tuple[int, int],
    lanes: int | None,
    world_size: int,
    micro_samples: int,
) -> None:
    config = DataConfig(sequence_tokens=16)
    datasets = {name: open_dataset(LocalStore(path), config, "train") for name, path in streams.items()}
    starts = (0, sizes[0] * steps[0])
    plan = Plan.of(
        [
            Segment(
                start_position=start,
                streams=(
                    part("web", datasets["web"], quota, lanes),
                    part("code", datasets["code"], 4096 - quota, lanes),
                ),
                seed=5,
                global_samples=size,
            )
            for start, size, quota in zip(starts, sizes, quotas, strict=True)
        ]
    )
    stop = position_after(plan, sum(steps))
    assert stop == starts[1] + sizes[1] * steps[1]
    micro_samples = min(micro_samples, *sizes)
    folds = [0] * sum(steps)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(world_size):
        stream = Stream(
            datasets,
            plan,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            position=0,
            stop_position=stop,
            count_items=lambda _: 1,
            reduce_items=lambda counts: counts,
        )
        for number, step in enumerate(stream):
            folds[number] = to_int64(folds[number] + step.fold)
            for batch in step.micro_batches:
                if batch.weight:
                    assert batch.streams is not None
                    for stream_number, sample_id in zip(batch.streams.tolist(), batch.sample_ids.tolist(), strict=True):
                        seen[stream_number].append(sample_id)
        stream.close()
    data = AuditedData(plan, {name: str(path) for name, path in streams.items()}, config, 0, stop)
    auditor = Auditor(data)
    readings = [auditor(stretch) for stretch in stretches(plan, 0, stop)]
    assert [fold for reading in readings for fold in reading.folds] == folds
    assert [size for reading in readings for size in reading.sizes] == [sizes[0]] * steps[0] + [sizes[1]] * steps[1]
    for number, ids in seen.items():
        counted = np.zeros(datasets[plan.streams[number].name].samples, dtype=np.int64)
        for reading in readings:
            if number in reading.seen:
                counted[reading.seen[number][0]] += reading.seen[number][1]
        assert counted.tolist() == np.bincount(np.array(ids, dtype=np.int64), minlength=len(counted)).tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=4), st.integers(0, 80))
def test_the_position_after_a_step_is_where_the_next_begins(segments: list[tuple[int, int]], steps: int) -> None:
    starts = np.cumsum([0, *[size * count for size, count in segments]]).tolist()
    stream = StreamPart(fingerprint="f", sequence_tokens=None)
    plan = Plan.of(
        [
            Segment(start_position=start, streams=(stream,), seed=1, global_samples=size)
            for start, (size, _) in zip(starts, segments, strict=False)
        ]
    )
    position = 0
    reader = Steps(plan, [np.array([999])], rank=0, world_size=1, micro_samples=50, stop_position=1 << 40)
    for _ in range(steps):
        position += reader.block(position, 1).step_samples[0]
    assert position_after(plan, steps) == position
    jobs = list(stretches(plan, 0, position))
    assert sum(job.steps for job in jobs) == steps
    assert position_after(plan, 10**17) > 10**16


def test_images_and_tokens_are_hashed_without_being_decoded(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=30)
    images = DataConfig(
        source=f"images:{folder}", directory=tmp_path / "out", validation_fraction=0.4, shard_bytes=2000
    )
    tokens, config = prepared_tokens(tmp_path, shard_bytes=3000)
    for directory, chosen in ((prepare(images), images), (tokens, config)):
        dataset = open_dataset(LocalStore(directory), chosen, "train")
        ids = np.array([*range(dataset.samples), 3, 3, 0])
        assert dataset.content_hashes(ids).tolist() == dataset.gather(ids)[1].tolist()
        with pytest.raises(IndexError):
            dataset.content_hashes(np.array([dataset.samples]))


def test_a_step_that_cannot_be_read_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    directory, config = prepared_tokens(tmp_path, shard_bytes=3000)
    dataset = open_dataset(LocalStore(directory), config, "train")
    plan = plan_of(dataset, 2)
    data = AuditedData(plan, {"": str(directory)}, config, 0, dataset.samples // 2 * 2)
    (stretch,) = stretches(plan, 0, data.stop_position)
    (good,) = each(Auditor, data, [stretch], workers=2)
    path = directory / "train-00000_001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"?" + content[51:])
    bad = Auditor(data)(stretch)
    assert 0 < len(bad.unreadable) < len(bad.folds) == len(good.folds)
    for number, fold in enumerate(bad.folds):
        assert (number in bad.unreadable) or fold == good.folds[number]
    assert all("train-00000_001.bin: block 0" in reason for reason in bad.unreadable.values())
