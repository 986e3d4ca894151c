"""When a checkpoint is written: beside training from a copy in host memory, or while training waits."""

from __future__ import annotations

import concurrent.futures
import copy
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distrib.checkpoint import SaveFailed, save_checkpoint
from distrib.config import CheckpointConfig
from distrib.engine import CanonicalState
from distrib.phases import SAVING_THREAD, enter
from distrib.sharding import local
from distrib.world import World


@dataclass(frozen=True)
class SaveOutcome:
    """A save that is over, the same on every rank but for the seconds."""

    step: int
    failure: str | None
    """Why nothing was published, in one line; None: it was."""
    seconds: float
    """From the begin of writing to the end."""


class Saver:
    """Saves checkpoints of a run, one at a time. All ranks begin and finish the same ones in the same order.

    report: called once a save is over, by the thread that wrote it.
    """

    def __init__(self, world: World, config: CheckpointConfig, report: Callable[[SaveOutcome], None]) -> None:
        self._world = world
        self._config = config
        self._report = report
        self._snapshot = Snapshot()
        self._in_flight: Future[SaveOutcome] | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        if config.asynchronous:
            # One for all saves: where a host's memory has run out, Python may wait for ever for a thread that it begins. It
            # keeps nothing of this object and ends with it. A daemon: where another rank is gone, it may wait for ever.
            threading.Thread(target=_work_off, args=(self._work,), name=SAVING_THREAD, daemon=True).start()
            weakref.finalize(self, self._work.put, None)

    def begin(
        self, root: Path, state: CanonicalState, *, step: int, scalars: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> None:
        """Returns as soon as training may change `state`: once it is copied, or else written. `save_checkpoint` says what the
        arguments are. The save before must have been finished."""
        assert self._in_flight is None, "only one save is in flight"
        save = partial(save_checkpoint, root, step=step, config=self._config)
        captured = {"scalars": copy.deepcopy(scalars), "fields": copy.deepcopy(fields)}
        over: Future[SaveOutcome] = Future()
        if self._config.asynchronous:
            save = partial(save, self._snapshot.take(state), world=self._world.in_save_thread(), **captured)
            self._work.put(partial(self._run, save, step, over))
        else:
            self._run(partial(save, state, world=self._world, **captured), step, over)
        self._in_flight = over

    def finish(self) -> SaveOutcome | None:
        """Waits for the save in flight; None where none is. Raises what ended it, if that was no SaveFailed."""
        if self._in_flight is None:
            return None
        outcome = self._in_flight.result()
        self._in_flight = None
        return outcome

    def abandon(self, wait_seconds: float) -> bool:
        """For a run that fails: gives the save in flight some time yet. False where it is still going on after that."""
        return self._in_flight is None or not concurrent.futures.wait([self._in_flight], wait_seconds).not_done

    def _run(self, save: Callable[[], Path], step: int, over: Future[SaveOutcome]) -> None:
        try:
            outcome = self._save_and_report(save, step)
        except BaseException as error:  # raised by `finish`, in the thread that trains
            over.set_exception(error)
        else:
            over.set_result(outcome)

    def _save_and_report(self, save: Callable[[], Path], step: int) -> SaveOutcome:
        begun = time.perf_counter()
        failure: str | None = None
        enter("save.write", step)
        try:
            try:
                save()
            except SaveFailed as error:
                failure = str(error)
            outcome = SaveOutcome(step, failure, time.perf_counter() - begun)
            self._report(outcome)
            return outcome
        finally:  # before anybody hears that it is over: the end of the process may come at once
            enter("idle" if self._config.asynchronous else "save")


def _work_off(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (save := work.get()) is not None:
        save()
        del save


class Snapshot:
    """A copy of a state in host memory, which is allocated once and filled anew for every save."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, state: CanonicalState) -> CanonicalState:
        """Copies this rank's part of every tensor; what is sharded stays so. The copy before is overwritten."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in state.tensors.items()}
        devices = set()
        for name, tensor in state.tensors.items():
            part = local(tensor)
            local(self._buffers[name]).copy_(part, non_blocking=True)
            devices.add(part.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return CanonicalState(self._buffers, copy.deepcopy(state.scalars))

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and local(buffer).shape == local(tensor).shape and buffer.dtype == tensor.dtype:
            return buffer
        # Page-locked where it is copied from a GPU, which is several times faster. DTensor.from_local would move the copy
        # to the mesh's device.
        return torch.empty_like(tensor, device="cpu", pin_memory=local(tensor).is_cuda)
