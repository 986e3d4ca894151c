"""`lockstep data order`: what a step reads, computed from the plan without running anything. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.addresses import is_remote
from data.audit import open_audited, position_after, refuse_streamed
from data.dataset import open_dataset
from data.examples import Examples
from data.manifest import MANIFEST_NAME, Manifest
from data.naming import prepared_directory
from data.plan import Plan
from data.samples import Dataset
from data.steps import Share, Steps
from data.store import Store, open_store, read_manifest
from launch.config import RunConfig
from launch.exit_codes import DONE
from launch.history import read_attempts
from launch.places import dataset_places
from launch.planning import check_orders, read_plan, segment_of
from launch.recipe import load_recipe
from launch.tables import format_table

_MOST_SAMPLES = 1 << 62
_MOST_WORKERS = 1 << 20
# However narrow a terminal is, so much of a sample is shown.
_LEAST_ROOM = 40


@dataclass(frozen=True)
class _Opened:
    """A plan and the data that it reads."""

    config: RunConfig
    plan: Plan
    stores: Mapping[str, Store]
    datasets: Mapping[str, Dataset]


@dataclass(frozen=True)
class _Slot:
    """A sample of a step, and who reads it."""

    rank: int
    batch: int
    filler: bool
    position: int
    stream: int
    epoch: int
    sample_id: int


@dataclass(frozen=True)
class _Place:
    """Where the samples of a stream lie."""

    dataset: Dataset
    manifest: Manifest
    examples: Examples
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset, store: Store) -> _Place:
        manifest = read_manifest(store)
        return cls(dataset, manifest, Examples(store, manifest, "train"), np.cumsum(dataset.shard_samples))

    def shard_and_row(self, sample_id: int) -> tuple[str, int]:
        """The file in which a sample lies, and its number in it."""
        shard = int(np.searchsorted(self.ends, sample_id, side="right"))
        row = sample_id - int(self.ends[shard] - self.dataset.shard_samples[shard])
        return self.manifest.splits["train"].shards[shard].data.name, row

    def content(self, sample_id: int, characters: int) -> str:
        """A sample in a line of so many characters."""
        if self.manifest.kind == "images":
            return self.examples.describe(sample_id, characters)
        fields, _ = self.dataset.gather(np.array([sample_id], dtype=np.int64))
        return self.examples.describe_tokens(fields["tokens"][0], characters)


def show_order(
    target: str,
    overrides: Sequence[str],
    datasets: Sequence[str],
    *,
    step: int,
    world: int | None,
    micro_samples: int | None,
    decode: bool,
) -> int:
    """Prints the samples of a step in the order in which they are read, by rank and micro-batch where `world` is given.

    Returns an exit code; ValueError in one line where the plan or the data is not there.
    """
    _check_numbers(step, world, micro_samples)
    opened = (_of_run if _is_run(target) else _of_recipe)(target, overrides, datasets)
    plan = opened.plan
    first, stop = position_after(plan, step - 1), position_after(plan, step)
    if stop > _MOST_SAMPLES:
        raise ValueError(f"--step {step}: lies beyond 2^62 samples; give a smaller one")
    check_orders(plan, opened.datasets)
    micro_samples = micro_samples or opened.config.batch.micro_samples
    if world is not None and micro_samples > stop - first:
        raise ValueError(f"--micro-samples {micro_samples}: the step has {stop - first} samples; lower it")
    print(f"step {step:,}: positions {first:,} to {stop - 1:,}, {stop - first:,} samples, plan {plan.hash[:12]}")
    places = {name: _Place.of(dataset, opened.stores[name]) for name, dataset in opened.datasets.items()}
    slots = list(_slots(opened, first, stop, world or 1, micro_samples))
    named, by_rank = len(plan.streams) > 1, world is not None
    rows = [_title(named, by_rank), *(_row(plan, places, slot, named, by_rank) for slot in slots)]
    lines = format_table(rows).splitlines()
    if decode:
        room = shutil.get_terminal_size().columns - max(map(len, lines)) - 2
        lines = _with_contents(lines, slots, plan, places, max(room, _LEAST_ROOM))
    print("\n".join(lines))
    return DONE


def _check_numbers(step: int, world: int | None, micro_samples: int | None) -> None:
    for name, value in (("--step", step), ("--world", world), ("--micro-samples", micro_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    if world is not None and world > _MOST_WORKERS:
        raise ValueError(f"--world {world}: at most {_MOST_WORKERS}; lower it")
    if micro_samples is not None and world is None:
        raise ValueError(f"--micro-samples {micro_samples}: has no effect without --world; remove it")


def _is_run(target: str) -> bool:
    if Path(target).is_dir() and not (Path(target) / "run.json").is_file():
        raise ValueError(f"{target}: not a run of Lockstep (no run.json); give such a directory, or a recipe")
    return Path(target).is_dir()


def _of_run(target: str, overrides: Sequence[str], given: Sequence[str]) -> _Opened:
    run = Path(target)
    if overrides:
        raise ValueError(f"override {overrides[0]!r}: has no effect on {run}, which has its plan; remove it")
    config = load_recipe(str(run / "recipe.yaml"))
    plan = read_plan(run)
    refuse_streamed(plan, str(run))
    places = dataset_places(run, read_attempts(run), plan, given)
    stores = {name: open_store(place, config.data) for name, place in places.items()}
    return _Opened(config, plan, stores, open_audited(plan, places, config.data))


def _of_recipe(recipe: str, overrides: Sequence[str], given: Sequence[str]) -> _Opened:
    if given:
        raise ValueError(f"--dataset {given[0]}: is for a run; a recipe names its data by data.directory=DIR")
    config = load_recipe(recipe, overrides)
    stores, datasets = {}, {}
    for name, stream in config.data.by_stream().items():
        place = stream.directory if is_remote(stream.directory) else prepared_directory(stream)
        stores[name] = open_store(place, stream)
        if stores[name].read(MANIFEST_NAME) is None:
            raise ValueError(f"{place}: {stream.source} is not prepared yet; run `lockstep prepare`, or train")
        datasets[name] = open_dataset(stores[name], stream, "train")
    return _Opened(config, Plan.of([segment_of(config, datasets)]), stores, datasets)


def _slots(opened: _Opened, first: int, stop: int, world: int, micro_samples: int) -> Iterator[_Slot]:
    """The samples of the step, rank after rank."""
    shard_samples = [
        opened.datasets[stream.name].shard_samples if stream.name in opened.datasets else None
        for stream in opened.plan.streams
    ]
    count = stop - first
    whole = Steps(opened.plan, shard_samples, rank=0, world_size=1, micro_samples=count, stop_position=stop)
    samples = [*zip(*(field.tolist() for field in whole.block(first, 1).samples), strict=True)]
    for rank in range(world):
        share = Share.of(count, rank, world, micro_samples)
        batches = np.repeat(np.arange(len(share.sizes)), share.sizes).tolist()
        for batch, offset in zip(batches, share.offsets.tolist(), strict=True):
            yield _Slot(rank, batch, batch >= share.real, *samples[offset])


def _title(named: bool, by_rank: bool) -> list[str]:
    return [
        *(["rank", "micro-batch"] if by_rank else []),
        "position",
        *(["stream"] if named else []),
        *["epoch", "sample", "shard", "row"],
    ]


def _row(plan: Plan, places: Mapping[str, _Place], slot: _Slot, named: bool, by_rank: bool) -> list[str]:
    stream = plan.streams[slot.stream].name
    shard, row = places[stream].shard_and_row(slot.sample_id)
    return [
        *([str(slot.rank), f"{slot.batch}{' (weight 0)' if slot.filler else ''}"] if by_rank else []),
        str(slot.position),
        *([stream] if named else []),
        *[str(slot.epoch), str(slot.sample_id), shard, str(row)],
    ]


def _with_contents(
    lines: list[str], slots: Sequence[_Slot], plan: Plan, places: Mapping[str, _Place], characters: int
) -> list[str]:
    width = max(map(len, lines))
    contents = [places[plan.streams[slot.stream].name].content(slot.sample_id, characters) for slot in slots]
    return [f"{line:{width}}  {content}" for line, content in zip(lines, ["content", *contents], strict=True)]
