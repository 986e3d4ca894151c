"""Where every worker of an attempt is, in memory that workers and supervisor share. It is on no disk, and goes with them.

Imports no torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from distrib.phases import Moment, Phase

LastWord = Literal["nothing", "came to its end", "lost contact", "waited in vain"]
"""What a worker says of its own end, just before it: that it is as it should be, or that it ends because another is gone, or
because another has not come for as long as the process group waits. One that failed by itself says nothing."""

_LAST_WORDS: tuple[LastWord, ...] = get_args(LastWord)
_PHASES: tuple[Phase, ...] = get_args(Phase)
_NUMBERS = {phase: number for number, phase in enumerate(_PHASES)}
_NUMBER = struct.Struct("=q")
_BEAT = struct.Struct("=qqqqq")
_SECONDS = struct.Struct("=d")
# Where training itself saves, rank 0 has more to do.
_OF_ONE_RANK = {_NUMBERS["save.write"], _NUMBERS["save.manifest"], _NUMBERS["save.rename"]}
# The run's directory, as its length in bytes and the bytes; then a part of its own for every rank.
_HEADER_BYTES = 8192
_RANK_BYTES = 512
_LONGEST_AT = 2 * _BEAT.size
_LAST_WORD_AT = _LONGEST_AT + len(_PHASES) * _SECONDS.size
assert _LAST_WORD_AT + _NUMBER.size <= _RANK_BYTES
# How long a phase took lately: the longest of so many times, and of as many before them.
_RECENT = 64


class Beat(NamedTuple):
    """What a thread of a worker said last."""

    phase: Phase
    step: int
    """Steps that were committed before it; for a save the one that is saved."""
    entries: int
    """Phases that the thread has begun."""
    common: int
    """Those of them that every rank goes through. Of the training threads of two ranks the one with fewer is behind."""


class Board:
    """The supervisor's side: reads what all workers say. `close` gives the memory up."""

    def __init__(self, workers: int) -> None:
        self.descriptor = os.memfd_create("lockstep-heartbeats")
        os.ftruncate(self.descriptor, _HEADER_BYTES + workers * _RANK_BYTES)
        self._memory = mmap.mmap(self.descriptor, 0)
        self._workers = workers

    def beat(self, rank: int, *, saving: bool = False) -> Beat:
        at = _at(rank, saving)
        while True:
            entries, number, step, common, entries_again = _BEAT.unpack_from(self._memory, at)
            if entries == entries_again:
                break
        return Beat(_PHASES[number] if entries or not saving else "idle", step, entries, common)

    def longest_seconds(self, phase: Phase) -> float | None:
        """The longest that a phase took lately on any rank; None where none has come to its end."""
        offset = _LONGEST_AT + _NUMBERS[phase] * _SECONDS.size
        places = (_HEADER_BYTES + rank * _RANK_BYTES + offset for rank in range(self._workers))
        return max(_SECONDS.unpack_from(self._memory, place)[0] for place in places) or None

    def last_word(self, rank: int) -> LastWord:
        (number,) = _NUMBER.unpack_from(self._memory, _last_word_at(rank))
        return _LAST_WORDS[number]

    @property
    def run_directory(self) -> Path | None:
        """None until rank 0 has one."""
        (length,) = _NUMBER.unpack_from(self._memory, 0)
        written = self._memory[_NUMBER.size : _NUMBER.size + length]
        return Path(os.fsdecode(written)) if length else None

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class Heartbeat:
    """A worker's side: an observer of its phases. It costs about a microsecond a phase."""

    def __init__(self, descriptor: int, rank: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self._threads = {saving: _Thread(_at(rank, saving)) for saving in (False, True)}
        self._longest_at = _HEADER_BYTES + rank * _RANK_BYTES + _LONGEST_AT
        self._recent = [_Recent() for _ in _PHASES]
        self._last_word_at = _last_word_at(rank)

    def name_run(self, directory: Path) -> None:
        """Where the supervisor finds the run; for rank 0."""
        name = os.fsencode(directory)
        self._memory[_NUMBER.size : _NUMBER.size + len(name)] = name
        _NUMBER.pack_into(self._memory, 0, len(name))

    def say_last(self, word: LastWord) -> None:
        _NUMBER.pack_into(self._memory, self._last_word_at, _LAST_WORDS.index(word))

    def __call__(self, moment: Moment) -> None:
        now = time.monotonic()
        thread = self._threads[moment.saving]
        recent = self._recent[thread.number]
        if recent.add(now - thread.since):
            _SECONDS.pack_into(self._memory, self._longest_at + thread.number * _SECONDS.size, recent.longest)
        thread.number, thread.since = _NUMBERS[moment.phase], now
        thread.entries += 1
        thread.common += thread.number not in _OF_ONE_RANK
        _BEAT.pack_into(
            self._memory, thread.at, thread.entries, thread.number, moment.step, thread.common, thread.entries
        )


class _Thread:
    """What one thread of a worker said last, and when."""

    def __init__(self, at: int) -> None:
        self.at, self.number, self.entries, self.common = at, _NUMBERS["start"], 0, 0
        self.since = time.monotonic()


class _Recent:
    """The longest of the last 64 to 128 times."""

    def __init__(self) -> None:
        self._count, self._before, self._now = 0, 0.0, 0.0
        self.longest = 0.0

    def add(self, seconds: float) -> bool:
        """Whether `longest` has changed."""
        self._count += 1
        if self._count <= _RECENT and seconds <= self._now:
            return False
        if self._count > _RECENT:
            self._count, self._before, self._now = 1, self._now, 0.0
        self._now = max(self._now, seconds)
        self.longest = max(self._now, self._before)
        return True


def _at(rank: int, saving: bool) -> int:
    return _HEADER_BYTES + rank * _RANK_BYTES + saving * _BEAT.size


def _last_word_at(rank: int) -> int:
    return _HEADER_BYTES + rank * _RANK_BYTES + _LAST_WORD_AT
