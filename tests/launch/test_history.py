"""Which lines of a log count: against a simulation of runs that are killed and begin again, any number of times."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.history import AttemptRecord, StepLine, history_of

PIECES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)


def simulate(
    pieces: list[tuple[int, int]], origin: int
) -> tuple[list[AttemptRecord], list[StepLine], dict[int, StepLine]]:
    """Attempts that each go back by so many steps, but not before `origin`, and then do so many."""
    attempts: list[AttemptRecord] = []
    lines: list[StepLine] = []
    counting: dict[int, StepLine] = {}
    step = origin
    for number, (back, steps) in enumerate(pieces, start=1):
        step = max(origin, step - back) if number > 1 else origin
        counting = {known: line for known, line in counting.items() if known <= step}
        attempts.append(attempt(number, step))
        for _ in range(steps):
            step += 1
            line = StepLine(len(lines) + 1, step, number, 10 * step, 0, f"{number}-{step}", None)
            lines.append(line)
            counting[step] = line
    return attempts, lines, counting


def attempt(number: int, step: int) -> AttemptRecord:
    whence: dict[str, Any] = dict.fromkeys(("from", "from_step", "from_position", "from_digest"))
    if step:
        whence = {"from": "checkpoints/x", "from_step": step, "from_position": 10 * step, "from_digest": "0" * 32}
    resumed = {f"resumed_{key}": value for key, value in whence.items()}
    return AttemptRecord(attempt=number, world_size=1, engine="native", plan="p", datasets={}, **resumed)


@given(PIECES, st.integers(0, 3))
def test_the_lines_that_count_are_those_nobody_went_back_before(pieces: list[tuple[int, int]], origin: int) -> None:
    attempts, lines, counting = simulate(pieces, origin)
    history = history_of(attempts, lines)
    assert history.flaw is None
    assert list(history.steps) == [counting[step] for step in sorted(counting)]
    assert {line.line for line in history.superseded} == {line.line for line in lines} - {
        line.line for line in history.steps
    }
    assert history.last_step == max(counting, default=origin)


@given(PIECES, st.integers(0, 3), st.data())
def test_a_line_that_is_gone_or_there_twice_is_found(
    pieces: list[tuple[int, int]], origin: int, data: st.DataObject
) -> None:
    attempts, lines, counting = simulate(pieces, origin)
    inner = [line for step, line in counting.items() if step < max(counting)]
    if not inner:
        return
    chosen = data.draw(st.sampled_from(inner))
    gone = history_of(attempts, [line for line in lines if line is not chosen])
    assert gone.flaw is not None
    assert f"step {chosen.step} has no line" in gone.flaw
    assert [line.step for line in gone.steps] == [step for step in sorted(counting) if step < chosen.step]
    twice = history_of(attempts, [*lines, chosen])
    assert twice.flaw is not None
    assert f"step {chosen.step} has two lines" in twice.flaw
