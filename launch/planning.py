"""From a recipe to the plan of a run: what each position reads, and how a resumed run goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data.epochs import refuse_too_many_epochs
from data.errors import CorruptData
from data.mixture import BLOCK_SAMPLES, quotas_of
from data.order import GLOBAL_ORDER
from data.plan import STREAMED_ORDER, Plan, Segment, StreamPart
from data.samples import Dataset
from data.steps import order_of
from data.windows import WINDOWED_ORDER
from launch.config import RunConfig
from launch.history import told_of

if TYPE_CHECKING:
    from data.streamed import StreamedSource

PLAN_FILE = "plan.json"
"""In a run's directory: the plan of its newest attempt, and the plan's hash."""


def segment_of(config: RunConfig, sources: Mapping[str, Dataset | StreamedSource], start_position: int = 0) -> Segment:
    """What the recipe asks for from a position on; `sources` holds what each stream reads."""
    data = config.data
    windowed = data.order == "windowed"
    weights = {name: stream.weight for name, stream in data.streams.items()} or {"": 1.0}
    streams = [
        StreamPart(
            name=name,
            fingerprint=sources[name].fingerprint,
            quota=quota,
            order=STREAMED_ORDER if data.streaming else WINDOWED_ORDER if windowed else GLOBAL_ORDER,
            lanes=data.lanes if windowed else None,
            window_shards=data.window_shards if windowed else None,
            sequence_tokens=sources[name].facts.sequence_tokens,
            packing=sources[name].packing_identity,
        )
        for name, quota in zip(weights, quotas_of(weights), strict=True)
    ]
    return Segment(
        start_position=start_position,
        streams=tuple(streams),
        seed=config.run.seed,
        global_samples=config.batch.global_samples,
    )


def continue_plan(plan: Plan, wanted: Segment, source: Path) -> Plan:
    """The plan of a checkpoint, with a new segment where the size of a step or the mixture changes from here on.

    ValueError where a stream is other data, or in another order, than in the checkpoint at `source`.
    """
    known = {stream.name: stream for stream in plan.streams}
    for stream in wanted.streams:
        before = known.get(stream.name)
        if before is not None and not stream.continues(before):
            named = f"stream {stream.name}, " if stream.name else ""
            raise ValueError(
                f"{source}: was trained on other data or in another order ({named}dataset {before.fingerprint[:12]}, "
                f"here {stream.fingerprint[:12]}); use the dataset of that run, or start a new run"
            )
    current = plan.segments[-1]
    same = wanted.reads_as(current) and wanted.global_samples == current.global_samples
    return plan if same else plan.append(wanted)


def check_orders(plan: Plan, training: Mapping[str, Dataset]) -> None:
    """ValueError where a stream's order is impossible over its dataset."""
    segment = plan.segments[-1]
    for stream in segment.streams:
        order_of(stream, training[stream.name].shard_samples, segment.seed)


def describe_epochs(
    config: RunConfig, plan: Plan, training: Mapping[str, Dataset], stop_position: int, steps: int
) -> list[str]:
    """A line a stream: how much there is of it, and how often it is read in the `steps` that end at `stop_position`.

    ValueError for a stream that would be read more often than its `max_epochs`.
    """
    limits = {name: stream.max_epochs for name, stream in config.data.by_stream().items()}
    refuse_too_many_epochs(plan, training, limits, stop_position)
    consumed = plan.consumed(stop_position)
    lines = []
    for stream in plan.segments[-1].streams:
        samples = training[stream.name].samples
        share = f"stream {stream.name}: {stream.quota / BLOCK_SAMPLES:.2%} of the samples" if stream.name else "data"
        epochs = consumed[plan.number_of(stream)] / samples
        left_out = training[stream.name].facts.left_out_tokens
        rest = f"; {left_out:,} tokens at the ends of shards are in no sample" if left_out else ""
        lines.append(f"{share}: {samples:,} training samples, {epochs:.2f} epochs in {steps} steps{rest}")
    return lines


def plan_file_bytes(plan: Plan) -> bytes:
    """The one form in which plan.json is written."""
    return f'{{"hash":"{plan.hash}","plan":{plan.to_json()}}}\n'.encode()


def read_plan(run_directory: Path) -> Plan:
    """The plan of a run's newest attempt. ValueError where there is none, CorruptData where a byte of it was altered."""
    path = run_directory / PLAN_FILE
    try:
        with told_of(path):
            content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{run_directory}: no {PLAN_FILE}, so nobody knows what its steps should read") from None
    damaged = f"{path}: altered or damaged; restore it from a checkpoint's state.json"
    try:
        plan = Plan.from_json(json.dumps(json.loads(content)["plan"]))
    except (ValueError, RecursionError, LookupError, TypeError):
        raise CorruptData(damaged) from None
    if plan_file_bytes(plan) != content:
        raise CorruptData(damaged)
    return plan
