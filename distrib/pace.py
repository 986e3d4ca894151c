"""How fast a rank computes by itself. A step takes every rank as long as the slowest of them: only what runs between two
exchanges tells which one that is."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_Mark = float | torch.cuda.Event
_NOTHING = contextlib.nullcontext()


class Pace:
    """Times a rank's own work on a micro-batch when it is asked to; costs nothing in other steps.

    That is the forward pass, and the backward pass where the engine exchanges nothing in it: among whole copies of the model
    in every micro-batch of a step but the last. Elsewhere gradients and weights travel all through the backward pass,
    and a rank that is slow there cannot be told from those that wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._asked = False
        self._goes_on = False
        """Whether the forward pass that came last was timed."""
        self._by_blocks = False
        self._spans: list[tuple[_Mark, _Mark]] | None = None
        """Of the pass that is being timed; None where none is."""
        self._passes: list[tuple[int, list[tuple[_Mark, _Mark]]]] = []
        self.unknown_because: str | None = None
        """Why this engine's own time cannot be told from its waiting for other ranks, if so."""

    def only_inside(self, blocks: Sequence[nn.Module]) -> None:
        """From now on a pass is the forward functions of these blocks: sharding waits for others before each of them."""
        self._by_blocks = True
        for block in blocks:
            block.forward = self._timed(block.forward)

    def ask(self) -> None:
        """The next forward pass is timed."""
        self._asked = self.unknown_because is None

    def of_forward(self, rows: int) -> AbstractContextManager[Any]:
        """Around a forward pass of a micro-batch with so many rows."""
        self._goes_on = False
        return self._one_pass(rows) if self._asked else _NOTHING

    def of_backward(self) -> AbstractContextManager[Any]:
        """Around the backward pass of the same micro-batch, where nothing is exchanged in it: timed if the forward pass was."""
        return self._rest_of_pass() if self._goes_on else _NOTHING

    def take(self) -> tuple[float, int]:
        """(median seconds of the passes that were timed since the last call, their most rows); NaN where there were none.

        Does not wait for the device: a pass that it has not finished is left out.
        """
        taken, self._passes = self._passes, []
        finished = [
            (rows, sum(map(_seconds, spans))) for rows, spans in taken if all(_is_over(end) for _, end in spans)
        ]
        most_rows = max((rows for rows, _ in finished), default=0)
        seconds = [seconds for rows, seconds in finished if rows == most_rows]
        return (statistics.median(seconds) if seconds else float("nan")), most_rows

    @contextlib.contextmanager
    def _one_pass(self, rows: int) -> Iterator[None]:
        self._asked = False
        self._spans = spans = []
        begun = self._mark()
        try:
            yield
        finally:
            self._spans = None
        if not self._by_blocks:
            spans.append((begun, self._mark()))
        self._passes.append((rows, spans))
        self._goes_on = True

    @contextlib.contextmanager
    def _rest_of_pass(self) -> Iterator[None]:
        self._goes_on = False
        begun = self._mark()
        yield
        self._passes[-1][1].append((begun, self._mark()))

    def _timed(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def timed(*inputs: Any, **named: Any) -> Any:
            if self._spans is None:
                return forward(*inputs, **named)
            begun = self._mark()
            result = forward(*inputs, **named)
            self._spans.append((begun, self._mark()))
            return result

        return timed

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(span: tuple[_Mark, _Mark]) -> float:
    begin, end = span
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end)) / 1e3


def _is_over(mark: _Mark) -> bool:
    return isinstance(mark, float) or mark.query()
