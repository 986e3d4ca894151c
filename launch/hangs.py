"""When a worker counts as hung, and which of them is the cause. Imports no torch.

A rank that waits for another in a collective is not the cause. Training threads go through the same phases, so the rank
to judge is the one that has come least far; among equals it is the one that does not wait for others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.addresses import is_remote
from distrib.phases import Phase
from launch.config import RunConfig
from launch.heartbeats import Beat, Board

_OF_A_STEP: tuple[Phase, ...] = ("data", "forward", "backward", "reduce", "step", "report")
_TIMES_THE_LONGEST = 5.0
# Evaluations, saves and data from elsewhere depend on other machines, and on how much there is: they may take so much longer.
# So may a model that is compiled, at any step: a micro-batch of another size compiles it anew.
_BESIDE_STEPS = 10.0
_COMPILED: tuple[Phase, ...] = ("forward", "backward")
# A phase that has never come to its end compiles, meets the others or reads for the first time.
_UNKNOWN = 3.0
# A pause of this process itself, or of the machine, is not held against the workers.
_LONGEST_LOOK_SECONDS = 1.0
_LAST_CALL = re.compile(r"most recent call first\):\n  File \"([^\"]*)\"")
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "distrib/reduction.py")


@dataclass(frozen=True)
class Limits:
    """How long phases may last."""

    floor_seconds: float
    """The least for a phase of a step, however quick it was so far."""
    unknown_seconds: float
    """For phases that nothing is known of yet."""
    data_is_near: bool
    """Whether steps read files that were prepared; what is fetched on the way has retries of its own, which take time."""
    compiles: bool
    """Whether the model is compiled."""

    @classmethod
    def of_run(cls, config: RunConfig) -> Limits | None:
        """None: nobody is ever taken for hung."""
        floor = config.run.hang_timeout_seconds
        if floor is None:
            return None
        unknown = max(_UNKNOWN * config.parallel.timeout_seconds, _BESIDE_STEPS * floor)
        near = not any(data.streaming or is_remote(data.directory) for data in config.data.by_stream().values())
        return cls(floor, unknown, near, config.parallel.compile)

    def seconds(self, phase: Phase, longest: float | None) -> float:
        """`longest`: of the phase lately, on any rank; None where it has never come to its end."""
        floor = _BESIDE_STEPS * self.floor_seconds
        if phase in ("start", "load", "end") or longest is None:
            floor = self.unknown_seconds
        elif phase in _OF_A_STEP and not self._may_take_long(phase):
            floor = self.floor_seconds
        return max(floor, _TIMES_THE_LONGEST * (longest or 0.0))

    def _may_take_long(self, phase: Phase) -> bool:
        return (phase == "data" and not self.data_is_near) or (phase in _COMPILED and self.compiles)


class Hang(NamedTuple):
    """Ranks that have not moved for longer than they may: the cause is among them, unless a stopped rank is."""

    ranks: tuple[int, ...]
    phase: Phase
    saving: bool
    """Whether it is their saving threads that do not move."""
    seconds: float


class HangWatch:
    """Looks at the board from time to time, and remembers since when each thread has not moved."""

    def __init__(self, board: Board, limits: Limits | None) -> None:
        """limits: None where nobody is ever taken for hung."""
        self._board, self._limits = board, limits
        self._seen: dict[tuple[int, bool], tuple[int, float]] = {}

    def look(self, since_last: float, running: Sequence[int]) -> Hang | None:
        """`since_last`: seconds since the look before; `running`: ranks whose processes have not ended."""
        passed = min(since_last, _LONGEST_LOOK_SECONDS)
        beats = {rank: self._board.beat(rank) for rank in running}
        still = {rank: self._still(rank, beat, passed, saving=False) for rank, beat in beats.items()}
        saves = {rank: self._board.beat(rank, saving=True) for rank in running}
        still_saving = {rank: self._still(rank, beat, passed, saving=True) for rank, beat in saves.items()}
        least = min((beat.common for beat in beats.values()), default=0)
        behind = [rank for rank, beat in beats.items() if beat.common == least]
        if behind and all(still[rank] > self._limit(beats[rank]) for rank in behind):
            return Hang(tuple(behind), beats[behind[0]].phase, False, min(still[rank] for rank in behind))
        at_work = [rank for rank, beat in saves.items() if beat.phase != "idle"]
        late = [rank for rank in at_work if still_saving[rank] > self._limit(saves[rank])]
        if late:
            return Hang(tuple(at_work), saves[late[0]].phase, True, max(still_saving[rank] for rank in late))
        return None

    def still_seconds(self, rank: int) -> float:
        """How long a rank's training thread has not moved."""
        return self._seen.get((rank, False), (0, 0.0))[1]

    def _still(self, rank: int, beat: Beat, passed: float, *, saving: bool) -> float:
        entries, seconds = self._seen.get((rank, saving), (beat.entries, 0.0))
        seconds = seconds + passed if entries == beat.entries else 0.0
        self._seen[rank, saving] = beat.entries, seconds
        return seconds

    def _limit(self, beat: Beat) -> float:
        if self._limits is None:
            return math.inf
        return self._limits.seconds(beat.phase, self._board.longest_seconds(beat.phase))


def find_cause(hang: Hang, stopped: Sequence[int], stacks: Mapping[int, str]) -> tuple[int, str]:
    """The rank that the others wait for, and what is known of it. `stacks`: of every rank that answered, by faulthandler."""
    if stopped:
        return stopped[0], "its process is stopped"
    if silent := [rank for rank in hang.ranks if rank not in stacks]:
        return silent[0], "its process does not answer"
    # Ahead of steps and beside them it is another thread that meets the others.
    main_thread = not hang.saving and hang.phase != "data"
    at_work = [rank for rank in hang.ranks if not waits_for_others(stacks[rank], main_thread=main_thread)]
    if at_work or len(hang.ranks) == 1:
        return (at_work or hang.ranks)[0], "it does not move"
    return hang.ranks[0], "the ranks wait for each other"


def find_missed(
    beats: Sequence[Beat],
    waited: Sequence[int],
    left: Sequence[int],
    stopped: Sequence[int],
    stacks: Mapping[int, str],
) -> tuple[int, str] | None:
    """Of the ranks that are `left`, the one for which the ranks that have `waited` in vain did so, and what is known of it.
    None where nobody stands out: what ended the others may then be over, or lie between the machines."""
    if stopped:
        return stopped[0], "its process is stopped"
    if silent := [rank for rank in left if rank not in stacks]:
        return silent[0], "its process does not answer"
    furthest = max(beats[rank].common for rank in waited)
    missed = [
        rank
        for rank in left
        if beats[rank].common <= furthest
        and not waits_for_others(stacks[rank], main_thread=beats[rank].phase != "data")
    ]
    return (min(missed, key=lambda rank: beats[rank].common), "it does not move") if missed else None


def waits_for_others(stacks: str, *, main_thread: bool) -> bool:
    """Whether a process is in a collective: its main thread, or any of its threads."""
    calls = _LAST_CALL.findall(stacks)  # the main thread comes last
    return any(file.endswith(_COLLECTIVES) for file in (calls[-1:] if main_thread else calls))
