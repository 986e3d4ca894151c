"""What a run will fetch of datasets at addresses, and whether the cache is large enough for its order. Known before it starts."""

from collections.abc import Mapping

import numpy as np

from data.cache import ShardCache
from data.plan import Plan, StreamPart
from data.samples import Dataset


def needed_cache_bytes(stream: StreamPart, dataset: Dataset, nodes: int) -> int:
    """The cache, on each of so many nodes, in which no file is fetched again while it is in use.

    Windowed: the windows of the lanes that a node reads and the next window of each, `lanes / nodes x window_shards x 2`
    of the largest shards. Global: everything, because every shard is always in use.
    """
    shard_bytes = np.sort(dataset.shard_bytes)[::-1]
    if stream.lanes is None or stream.window_shards is None:
        return int(shard_bytes.sum())
    # Where ranks do not divide the lanes, two nodes share one.
    lanes = min(stream.lanes, -(-stream.lanes // nodes) + (stream.lanes % nodes > 0))
    return int(shard_bytes[: lanes * stream.window_shards * 2].sum())


def describe_downloads(
    plan: Plan,
    datasets: Mapping[str, Dataset],
    *,
    position: int,
    stop_position: int,
    nodes: int,
    cache: ShardCache,
) -> list[str]:
    """A line for each stream that must be fetched: what a node downloads, and the smallest cache for that.

    ValueError where files would be fetched again and again, because of the cache's limit or its disk.
    """
    lines, needed, cache_bytes = [], 0, cache.limit_bytes
    read = np.subtract(plan.consumed(stop_position), plan.consumed(position))
    for stream in plan.segments[-1].streams:
        dataset = datasets[stream.name]
        if dataset.looks_ahead_samples == 0:
            continue
        total = int(dataset.shard_bytes.sum())
        needs = needed_cache_bytes(stream, dataset, nodes)
        passes = float(read[plan.number_of(stream)]) / dataset.samples
        fetched = total * passes / (nodes if stream.lanes is not None else 1)
        if total <= cache_bytes:  # what was fetched once stays
            fetched = min(total, fetched)
        lines.append(
            f"{dataset.address}: {_size(total)}; a node fetches about {_size(fetched)} and needs a cache of "
            f"{_size(needs)}, it has {_size(cache_bytes)}"
        )
        needed += needs
    if needed > cache_bytes:
        raise ValueError(
            f"data.cache_bytes {cache_bytes}: too small for data.order={_orders(plan)}, files would be fetched again and "
            f"again; set data.cache_bytes={needed} or more, or {_smaller(plan)}"
        )
    if needed and needed > (room_bytes := cache.room_bytes()):
        raise ValueError(
            f"data.cache_directory: its disk has room for {_size(room_bytes)}, and {_size(needed)} are needed; free some, "
            f"set data.cache_directory, or {_smaller(plan)}"
        )
    return lines


def _orders(plan: Plan) -> str:
    return "global" if plan.segments[-1].streams[0].lanes is None else "windowed"


def _smaller(plan: Plan) -> str:
    return "data.order=windowed" if _orders(plan) == "global" else "lower data.lanes or data.window_shards"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
