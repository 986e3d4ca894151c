"""Which part of its work a worker is in: for heartbeats, for the account of a run's time, and to name where it hung.

Two threads of a worker take part: the one that trains, and the one that saves beside it. Each says what it begins; what
it did before is then over. Imports no torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Phase = Literal[
    "start",  # from the first line of the worker to the first step: imports, the world, data, the model, the dry run
    "load",  # a checkpoint is verified and read
    "data",  # waiting for the step's batch
    "forward",
    "backward",  # with the exchange of gradients that goes on meanwhile
    "reduce",  # what is left of that exchange: the global norm
    "step",  # the optimizer's update
    "report",  # reading the numbers of the step before, which waits for the device and the other ranks
    "evaluate",
    "save",  # training waits for a checkpoint: for the copy of the state, for the save before it, or for the last one
    "save.write",  # these three are the saving thread's, or of the one that trains where it saves itself
    "save.manifest",
    "save.rename",
    "idle",  # the saving thread between saves
    "end",  # after the last step and the last save: the summary, leaving the world
]


class Moment(NamedTuple):
    """A phase begins: of the thread that saves beside training (`saving`), or of the one that trains.

    `step` counts the steps that are committed before it; for a save it is the one that is saved.
    """

    phase: Phase
    step: int
    saving: bool


Observer = Callable[[Moment], None]

SAVING_THREAD = "lockstep-save"
_observers: list[Observer] = []
_now = {False: Moment("start", 0, False), True: Moment("idle", 0, True)}
_held = False


def enter(phase: Phase, step: int | None = None) -> None:
    """The calling thread begins a phase. `step`: None where it is that of the phase before."""
    saving = threading.current_thread().name == SAVING_THREAD
    if _held and not saving:
        return
    if step is None:
        step = _now[saving].step
    moment = _now[saving] = Moment(phase, step, saving)
    for observer in _observers:
        observer(moment)


@contextlib.contextmanager
def hold(phase: Phase) -> Iterator[None]:
    """The thread that trains is in `phase`, whatever it calls meanwhile: a dry run is no step."""
    global _held
    enter(phase)
    _held = True
    try:
        yield
    finally:
        _held = False


def now(*, saving: bool = False) -> Moment:
    """Where the thread that trains is, or the one that saves."""
    return _now[saving]


def observe(observer: Observer) -> None:
    """Calls `observer` whenever a phase begins, in the thread that begins it, from now on. It must be quick."""
    _observers.append(observer)
