"""Which samples a rank reads in each step: the plan, cut into global steps, shares of ranks and micro-batches."""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data.order import Order
from data.plan import Plan

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """A rank's share of a step of some size: which of the step's samples it reads and how it cuts them.

    `offsets` (n,) are relative to the step's first position and `sizes` cut them into micro-batches; those from number
    `real` on are fillers of one sample, so that every rank runs the same number of forward passes.
    """

    offsets: Integers
    sizes: tuple[int, ...]
    real: int
    own_samples: int

    @classmethod
    def of(cls, samples: int, rank: int, world_size: int, micro_samples: int) -> "Share":
        """The contiguous part [floor(rB/R), floor((r+1)B/R)) of a step of B samples, for rank r of R."""
        start, stop = samples * rank // world_size, samples * (rank + 1) // world_size
        cuts = [*range(start, stop, micro_samples), stop]
        sizes = [after - before for before, after in itertools.pairwise(cuts)]
        fillers = math.ceil(math.ceil(samples / world_size) / micro_samples) - len(sizes)
        offsets = np.concatenate([np.arange(start, stop, dtype=np.int64), np.zeros(fillers, dtype=np.int64)])
        return cls(offsets, (*sizes, *[1] * fillers), len(sizes), stop - start)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """1.0 for each micro-batch, 0.0 for each filler."""
        return tuple(1.0 if number < self.real else 0.0 for number in range(len(self.sizes)))


@dataclass(frozen=True)
class StepBlock:
    """Consecutive steps as one rank reads them; `positions` and `ids` (n,) hold its samples of all of them in turn."""

    firsts: list[int]
    step_samples: list[int]
    shares: list[Share]
    positions: Integers
    ids: Integers

    @cached_property
    def rows(self) -> list[int]:
        """Where each step begins in `positions`, and the end."""
        return [0, *np.cumsum([len(share.offsets) for share in self.shares]).tolist()]


def sample_ids_of_step(plan: Plan, samples: int, stop_position: int) -> list[int]:
    """The ids of all samples of the step that ends at `stop_position`, over a dataset of so many samples."""
    first = stop_position - plan.segment_at(stop_position - 1).global_samples
    steps = Steps(plan, samples, rank=0, world_size=1, micro_samples=1, stop_position=stop_position)
    return steps.block(first, 1).ids.tolist()


class Steps:
    """The steps of a plan up to `stop_position`, over a dataset of so many samples, as one rank reads them."""

    def __init__(
        self, plan: Plan, samples: int, *, rank: int, world_size: int, micro_samples: int, stop_position: int
    ) -> None:
        self._plan, self._samples = plan, samples
        self._rank, self._world_size, self._micro_samples = rank, world_size, micro_samples
        self._stop_position = stop_position
        self._shares: dict[int, Share] = {}
        self._orders: dict[int, Order] = {}

    def block(self, position: int, count: int) -> StepBlock:
        """The next `count` steps from `position` on, or fewer where the run ends."""
        sizes = self._sizes(position, count)
        shares = [self._share(size) for size in sizes]
        firsts = position + np.cumsum([0, *sizes[:-1]])
        if len({*sizes}) == 1:
            positions = np.add.outer(firsts, shares[0].offsets).ravel()
        else:
            positions = np.concatenate([first + share.offsets for first, share in zip(firsts, shares, strict=True)])
        ids = self._ids(positions, position, position + sum(sizes))
        return StepBlock(firsts.tolist(), sizes, shares, positions, ids)

    def _sizes(self, position: int, count: int) -> list[int]:
        """Samples of each of the next steps: a step ends early only where its segment or the run ends."""
        sizes: list[int] = []
        while len(sizes) < count and position < self._stop_position:
            end = self._plan.segment_end(position)
            limit = self._stop_position if end is None else min(end, self._stop_position)
            global_samples = self._plan.segment_at(position).global_samples
            whole = min((limit - position) // global_samples, count - len(sizes))
            sizes += [global_samples] * whole if whole else [limit - position]
            position += whole * global_samples if whole else limit - position
        return sizes

    def _share(self, samples: int) -> Share:
        if samples not in self._shares:
            self._shares[samples] = Share.of(samples, self._rank, self._world_size, self._micro_samples)
        return self._shares[samples]

    def _ids(self, positions: Integers, first: int, stop: int) -> Integers:
        """Sample ids (n,) of positions (n,), all of them in [first, stop)."""
        end = self._plan.segment_end(first)
        if end is not None and end < stop:
            before = positions < end
            ids = np.empty_like(positions)
            ids[before] = self._ids(positions[before], first, end)
            ids[~before] = self._ids(positions[~before], end, stop)
            return ids
        origin = self._plan.order_origin(first)
        if origin not in self._orders:
            self._orders[origin] = Order(self._samples, self._plan.segment_at(first).seed)
        return self._orders[origin].sample_ids(positions - origin)[1]
