"""Where a run's steps come from: prepared datasets in the order of the plan, or a source that is read as it comes.

The one place that knows of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.downloads import describe_downloads
from data.making_time import MakingTime
from data.plan import Plan
from data.store import open_cache
from data.stream import GlobalStep, Stream
from distrib.world import World
from launch.config import RunConfig
from launch.materials import Materials
from launch.planning import check_orders, describe_epochs

if TYPE_CHECKING:
    from data.parts import Place
    from data.streaming import StreamedSteps


class Steps(Protocol):
    """The global steps of an attempt; to be closed. `making_time` is what this rank's part of them takes it."""

    making_time: MakingTime

    def __iter__(self) -> Iterator[GlobalStep]: ...
    def close(self) -> None: ...


class Feed(Protocol):
    """What an attempt asks of where its steps come from. Every rank calls the same in the same order."""

    def take_over(self, parts: list[dict[str, Any]] | None, checkpoint: Path, *, allow_change: bool) -> list[str]:
        """Goes on from the `parts` that a checkpoint holds. What that changes, a line each; ValueError where it may not be."""
        ...

    def check(self, plan: Plan, position: int, stop_position: int, steps: int, nodes: int) -> list[str]:
        """What will be read up to a position, after so many steps, and fetched to each of so many nodes, for a person, a line
        each; ValueError where it cannot be read or may not."""
        ...

    def open(self, plan: Plan, position: int, stop_position: int) -> Steps:
        """The steps from a position on. Called once."""
        ...

    def parts_at(self, position: int) -> list[dict[str, Any]] | None:
        """What a checkpoint must hold beside plan and position, after the last step that was taken."""
        ...


def make_feed(config: RunConfig, materials: Materials, world: World) -> Feed:
    """The feed that the recipe asks for. ValueError where it cannot be shared by these ranks."""
    feed = PreparedFeed if materials.streamed is None else StreamedFeed
    return feed(config, materials, world)


class PreparedFeed:
    """Prepared datasets: what is read at a position follows from the plan alone."""

    def __init__(self, config: RunConfig, materials: Materials, world: World) -> None:
        self._config, self._materials, self._world = config, materials, world

    def take_over(self, parts: list[dict[str, Any]] | None, checkpoint: Path, *, allow_change: bool) -> list[str]:
        return []

    def check(self, plan: Plan, position: int, stop_position: int, steps: int, nodes: int) -> list[str]:
        training = self._materials.training
        check_orders(plan, training)
        return describe_epochs(self._config, plan, training, stop_position, steps) + describe_downloads(
            plan,
            training,
            position=position,
            stop_position=stop_position,
            nodes=nodes,
            cache=open_cache(self._config.data),
        )

    def open(self, plan: Plan, position: int, stop_position: int) -> Steps:
        return Stream(
            self._materials.training,
            plan,
            **_common(self._config, self._materials, self._world, position, stop_position),
        )

    def parts_at(self, position: int) -> list[dict[str, Any]] | None:
        return None


class StreamedFeed:
    """A source that is read as it comes, in parts: a checkpoint holds where each of them stands."""

    def __init__(self, config: RunConfig, materials: Materials, world: World) -> None:
        from data.parts import Place

        assert materials.streamed is not None
        self._config, self._materials, self._world = config, materials, world
        self._source = materials.streamed
        self._steps: StreamedSteps | None = None
        self._places = [Place()] * (config.data.streaming_parts or world.data_size)

    def take_over(self, parts: list[dict[str, Any]] | None, checkpoint: Path, *, allow_change: bool) -> list[str]:
        from data.parts import Place

        assert parts is not None, "the checkpoint of a run with the same data.streaming"
        found, wanted = [Place(**part) for part in parts], self._config.data.streaming_parts
        workers = self._world.data_size
        if len(found) % workers == 0 and wanted in (None, len(found)):
            self._places = found
            return []
        epoch = 1 + max(place.epoch for place in found)
        anew = wanted or workers
        if not allow_change:
            raise ValueError(
                f"{checkpoint}: its stream is in {len(found)} parts, which cannot go on as {anew} parts with {workers} workers; "
                f"resume with a number of workers that divides {len(found)}, or with --allow-change from the beginning of "
                f"epoch {epoch} on"
            )
        self._places = [Place(epoch=epoch)] * anew
        return [
            f"stream: {anew} parts instead of {len(found)}: the order is another one from here on; what was not read yet of the "
            f"epochs before {epoch} is left out, and epoch {epoch} begins at the beginning of the source"
        ]

    def check(self, plan: Plan, position: int, stop_position: int, steps: int, nodes: int) -> list[str]:
        from data.streamed import CollectedSamples
        from data.streaming import describe_stream

        parts, workers = len(self._places), self._world.data_size
        if parts % workers:
            raise ValueError(
                f"data.streaming_parts {parts} cannot be shared by {workers} workers, which must all read as many; make it a "
                "multiple of their number"
            )
        samples = self._config.batch.global_samples
        if parts > samples:
            raise ValueError(
                f"batch.global_samples {samples} is less than the {parts} parts of the stream: some would never be read; raise it"
            )
        validation = self._materials.validation[""]
        assert isinstance(validation, CollectedSamples)
        return describe_stream(self._source, parts, validation)

    def open(self, plan: Plan, position: int, stop_position: int) -> Steps:
        from data.streaming import StreamedSteps

        common = _common(self._config, self._materials, self._world, position, stop_position)
        self._steps = StreamedSteps(self._source, plan, self._places, **common)
        return self._steps

    def parts_at(self, position: int) -> list[dict[str, Any]] | None:
        assert self._steps is not None, "saved before the first step"
        places: dict[int, Place] = {}
        for own in self._world.gather_objects(self._steps.places(position)):
            places |= own
        return [places[number].as_json() for number in range(len(places))]


def _common(config: RunConfig, materials: Materials, world: World, position: int, stop_position: int) -> dict[str, Any]:
    return {
        "rank": world.data_rank,
        "world_size": world.data_size,
        "micro_samples": config.batch.micro_samples,
        "position": position,
        "stop_position": stop_position,
        "count_items": materials.task.items,
        "reduce_items": world.sum_in_prefetch_thread if world.size > 1 else None,
        "prefetch_steps": config.data.prefetch_steps,
        "pin_memory": world.device.type == "cuda",
    }
