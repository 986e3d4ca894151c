"""Steps of the set-up that all ranks must pass: where one fails, all end with its reason, told once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from data.errors import CorruptData
from distrib.manifest import BadCheckpoint
from distrib.world import World
from launch.exit_codes import DO_NOT_RESTART, USAGE, RunEnded

_Result = TypeVar("_Result")


def together(world: World, action: Callable[[], _Result]) -> _Result:
    """Runs `action` on every rank. A ValueError of any rank becomes the same RunEnded on all of them."""
    result: list[_Result] = []
    failure: tuple[str, int] | None = None
    try:
        result.append(action())
    except RunEnded as error:
        failure = (str(error), error.exit_code)
    except (CorruptData, BadCheckpoint) as error:
        failure = (str(error), DO_NOT_RESTART)
    except ValueError as error:
        failure = (str(error), USAGE)
    for other in world.gather_objects(failure):
        if other is not None:
            raise RunEnded(*other, told_by_all=True)
    return result[0]


def on_rank_zero(world: World, action: Callable[[], _Result]) -> _Result | None:
    """Runs `action` on rank 0 alone, with the same agreement on failure; its result there, None elsewhere."""
    return together(world, lambda: action() if world.rank == 0 else None)
