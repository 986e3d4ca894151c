"""Whether the attempts of a run, as run.json has them, agree with its plan and its log. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.audit import position_after
from data.digest import EMPTY_DIGEST
from data.plan import Plan
from launch.audit_lines import Before, Fault
from launch.history import AttemptRecord, History, StepLine


def plans_of_attempts(attempts: Sequence[AttemptRecord], plan: Plan) -> dict[int, Plan]:
    """The plan of each attempt whose plan is a beginning of `plan`: each adds segments, or replaces those that a run went
    back before."""
    beginnings = [Plan.of(plan.segments[:count]) for count in range(1, len(plan.segments) + 1)]
    by_hash = {beginning.hash: beginning for beginning in beginnings}
    return {attempt.attempt: by_hash[attempt.plan] for attempt in attempts if attempt.plan in by_hash}


def foreign_plan(history: History, plan: Plan) -> Fault | None:
    """What is wrong where the plan is not the one that the attempts of the counting steps put on record."""
    of_plan = max((attempt.attempt for attempt in history.attempts if attempt.plan == plan.hash), default=0)
    last = max((line.attempt for line in history.steps), default=0)
    if of_plan < max(last, 1):
        return Fault(0, f"plan.json is not the plan that attempt {max(last, 1)} put on record in run.json")
    if (history.began.resumed_from_position or 0) != position_after(plan, history.began.went_back_to):
        return Fault(0, "run.json: the run began at a position at which no step of plan.json ends")
    return None


def wrong_attempts(history: History, plans: Mapping[int, Plan], plan: Plan) -> list[Fault]:
    """Attempts whose plan, beginning or lines are not what plan and log make of them."""
    faults = []
    for attempt in history.attempts:
        counting = [line for line in history.steps if line.attempt == attempt.attempt]
        own = plans.get(attempt.attempt)
        if own is None:
            if counting:
                faults.append(Fault(counting[0].step, f"attempt {attempt.attempt} had another plan than plan.json"))
            continue
        if counting and not _covers(own, plan, position_after(plan, counting[-1].step)):
            faults.append(Fault(counting[-1].step, f"attempt {attempt.attempt} had another plan than plan.json"))
        step, position = attempt.went_back_to, attempt.resumed_from_position or 0
        if (foreign := _foreign_dataset(attempt, own)) is not None:
            faults.append(Fault(step, foreign))
        if position != position_after(own, step):
            ends = position_after(own, step)
            faults.append(
                Fault(step, f"attempt {attempt.attempt} began at position {position}, but step {step} ends at {ends}")
            )
        line = _line_before(history, attempt)
        if line is not None and attempt.resumed_from_digest != line.digest:
            began = f"attempt {attempt.attempt} began from digest {attempt.resumed_from_digest}"
            faults.append(Fault(step, f"step {step}: {began}, but {line.place} has {line.digest}"))
    return [*faults, *_gaps(history)]


def _foreign_dataset(attempt: AttemptRecord, own: Plan) -> str | None:
    """A dataset that run.json names for an attempt, and that its plan does not have it read."""
    planned = {stream.name: stream.fingerprint for stream in own.streams}
    for name, place in attempt.datasets.items():
        if place.fingerprint != planned.get(name):
            named = f"stream {name}: " if name else ""
            reads = f"reads {planned[name][:12]}" if name in planned else "has no such stream"
            found = place.fingerprint[:12]
            return f"{named}run.json says that attempt {attempt.attempt} read dataset {found}, but its plan {reads}"
    return None


def repeated_lines(history: History) -> dict[int, list[StepLine]]:
    """The lines of steps that a later attempt repeated, by attempt, in order."""
    lines: dict[int, list[StepLine]] = {}
    for line in history.superseded:
        lines.setdefault(line.attempt, []).append(line)
    return lines


def before_the_run(history: History, plan: Plan) -> Before:
    """What is known of the step before the first that counts."""
    began = history.began
    tokens = 0 if began.resumed_from is None else None
    return Before(
        began.resumed_from_digest or EMPTY_DIGEST, tokens, plan.consumed(position_after(plan, began.went_back_to))
    )


def before_the_line(history: History, plan: Plan, line: StepLine) -> Before:
    """What is known of the step before a line of an attempt with that plan: its own line, or what it was resumed from."""
    attempt = history.attempts[line.attempt - 1]
    consumed = plan.consumed(position_after(plan, line.step - 1))
    own = [known for known in history.steps if (known.attempt, known.step) == (line.attempt, line.step - 1)]
    known = own[0] if own else _line_before(history, attempt)
    if known is not None:
        return Before(known.digest, known.tokens, consumed)
    return Before(
        attempt.resumed_from_digest or EMPTY_DIGEST, 0 if attempt.resumed_from_digest is None else None, consumed
    )


def _covers(own: Plan, plan: Plan, position: int) -> bool:
    """Whether a beginning of a plan says all that the plan says of positions below `position`."""
    count = len(own.segments)
    return count == len(plan.segments) or position <= plan.segments[count].start_position


def _line_before(history: History, attempt: AttemptRecord) -> StepLine | None:
    """The line of the step that an attempt was resumed after: the newest with the digest that it began from, or just the
    newest where none has it."""
    earlier = [
        line
        for line in (*history.steps, *history.superseded)
        if line.step == attempt.went_back_to and line.attempt < attempt.attempt
    ]
    return max(earlier, key=lambda line: (line.digest == attempt.resumed_from_digest, line.attempt), default=None)


def _gaps(history: History) -> list[Fault]:
    """Lines that are missing or doubled among those that were repeated: each attempt tells of one step after the other."""
    if history.flaw is not None:  # it is about the lines that count
        return []
    faults = []
    for attempt, lines in repeated_lines(history).items():
        counting = [line.step for line in history.steps if line.attempt == attempt]
        last = counting[-1] if counting else history.attempts[attempt - 1].went_back_to
        for line in lines:
            if line.step != last + 1:
                text = f"step {line.step} ({line.place}) follows step {last} of the same attempt"
                faults.append(Fault(last + 1, text))
                break
            last = line.step
    return faults
