"""The account of a run's time from its files: against simulated runs that are killed, queued, and begin again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import CorruptData
from launch.goodput import account_of, show_goodput
from tests.launch.simulated_run import BEGAN, Simulated

# Powers of two, so that sums are exact to the microsecond.
SPANS = st.integers(0, 64).map(lambda eighths: eighths / 8)


STEPS = st.lists(st.tuples(SPANS, SPANS, SPANS, SPANS, SPANS), max_size=5)
ATTEMPTS = st.lists(
    st.tuples(SPANS, st.integers(0, 7), SPANS, st.none() | SPANS, STEPS, st.none() | SPANS), min_size=1, max_size=5
)


@settings(deadline=None)
@given(ATTEMPTS)
def test_every_second_is_of_one_row(attempts: list[tuple[Any, ...]]) -> None:
    run = Simulated()
    for number, (start, back, before, died, steps, end) in enumerate(attempts):
        if number:
            run.begin(start, back=back, before=before, died=died)
        else:
            run.begin(start)
        for parts in steps:
            run.train(*parts)
        if end is not None:
            run.end(end)
    account = run.account()
    assert account.seconds == pytest.approx(run.expected(), abs=1e-5)
    assert account.total == pytest.approx(run.wall - BEGAN, abs=1e-5)
    assert account.notes == []
    assert min(seconds for attempt in account.attempts for seconds in attempt.seconds.values()) > -1e-5


def test_what_was_done_for_nothing_is_counted_where_it_was_done() -> None:
    run = Simulated()
    run.begin(4.0)
    for _ in range(5):
        run.train(0.5, 2.0, 1.0, 0.0, 0.0)
    run.begin(2.0, back=2, before=8.0, died=1.0)
    run.train(0.0, 2.0, 0.0, 0.0, 0.0)
    first, second = run.account().attempts
    assert (first.lost_steps, second.lost_steps) == (2, 0)
    assert first.seconds["lost"] == pytest.approx(8.0)
    assert first.seconds["compute"] == pytest.approx(6.0)
    assert second.seconds["between"] == pytest.approx(8.0)
    assert run.account().goodput == pytest.approx((3 * 3.5 + 2.0) / (run.wall - BEGAN))


def test_a_torn_last_line_costs_what_it_would_have_told(tmp_path: Path) -> None:
    run = Simulated()
    run.begin(1.0)
    run.train(0.5, 2.0, 1.0, 0.0, 0.0)
    run.train(0.5, 2.0, 1.0, 0.0, 0.25)
    path = run.put(tmp_path) / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    account = account_of(tmp_path)
    assert account.total == pytest.approx(8.0)
    assert account.seconds["save"] == 0.0


@pytest.mark.parametrize(("submitted", "queued"), [(BEGAN + 20.0, 5.0), (BEGAN - 5.0, 15.0), (None, 0.0)])
def test_a_queue_is_told_from_nobody_having_started_it(submitted: float | None, queued: float) -> None:
    """The first attempt ends after 10 seconds; its job begins again at 25, and the launcher of the second at 27."""
    run = Simulated()
    run.begin(1.0, job={"id": "7", "submitted": BEGAN - 8.0, "eligible": BEGAN, "began": BEGAN - 3.0})
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    run.begin(1.0, before=17.0, job={"id": "7", "submitted": submitted, "eligible": None, "began": BEGAN + 25.0})
    first, second = run.account().attempts
    assert (first.seconds["queue"], first.seconds["start"]) == pytest.approx((5.0, 4.0))
    assert second.seconds["queue"] == pytest.approx(queued)
    assert second.seconds["between"] == pytest.approx(15.0 - queued)
    assert second.seconds["start"] == pytest.approx(3.0)
    assert run.account().total == pytest.approx(run.wall - (BEGAN - 8.0))


def test_a_second_attempt_in_one_job_waited_in_no_queue() -> None:
    run = Simulated()
    job = {"id": "7", "submitted": BEGAN - 8.0, "eligible": BEGAN, "began": BEGAN - 3.0}
    run.begin(1.0, job=job)
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    run.begin(1.0, before=2.0, died=3.0, job=job)
    second = run.account().attempts[1].seconds
    assert (second["queue"], second["between"], second["start"]) == pytest.approx((0.0, 2.0, 1.0))
    assert run.account().total == pytest.approx(run.wall - (BEGAN - 8.0))


def test_a_launcher_of_two_attempts_is_counted_once() -> None:
    """torchrun starts its workers anew: what it did before the second attempt's process began was the first one's time."""
    run = Simulated()
    run.begin(1.0)
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    run.begin(1.0, before=4.0)
    time = run.attempts[1]["time"]
    time["launched"] = BEGAN
    for reading in (time["clock"], *(line["clock"] for line in run.lines if line["attempt"] == 2)):
        reading["phases"]["start"] += time["process_began"] - BEGAN
    second = run.account().attempts[1].seconds
    assert (second["between"], second["start"]) == pytest.approx((4.0, 1.0))
    assert run.account().total == pytest.approx(run.wall - BEGAN)


def test_a_machine_that_slept_is_other() -> None:
    run = Simulated()
    run.begin(1.0)
    run.wall += 30.0
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    account = run.account()
    assert account.seconds["other"] == pytest.approx(30.0)
    assert account.total == pytest.approx(40.0)


@pytest.mark.parametrize("within", [True, False])
def test_a_clock_that_is_set_back_makes_no_second_negative(within: bool) -> None:
    run = Simulated()
    run.begin(1.0)
    run.wall -= 30.0 * within
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    run.wall -= 30.0 * (not within)
    run.begin(2.0, before=5.0)
    account = run.account()
    assert min(seconds for attempt in account.attempts for seconds in attempt.seconds.values()) >= 0.0
    assert account.total == pytest.approx(17.0 if within else 12.0)
    (note,) = account.notes
    assert "set back" in note


def test_what_cannot_be_told_apart_is_said() -> None:
    run = Simulated()
    run.begin(1.0)
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    for reading in (run.attempts[0]["time"]["clock"], *(line["clock"] for line in run.lines)):
        del reading["waiting"]
    account = run.account()
    assert account.seconds["compute"] == pytest.approx(9.0)
    assert "Exposed communication of several ranks is within compute" in account.notes[0]


def test_the_table_holds_every_attempt_and_what_its_columns_mean(tmp_path: Path) -> None:
    run = Simulated()
    run.begin(4.0)
    for _ in range(5):
        run.train(0.5, 2.0, 1.0, 0.0, 0.0)
    run.begin(2.5, back=2, before=8.0, died=1.0)
    run.train(0.0, 2.0, 0.0, 0.0, 0.0)
    told = [line.split() for line in show_goodput(run.put(tmp_path)).splitlines()]
    assert " ".join(told[0]).endswith("; 2 steps were done again")
    assert told[1] == ["attempt", "start", "data", "compute", "communication", "lost", "between", "all"]
    assert told[2] == ["1", "4.00", "1.50", "6.00", "3.00", "8.00", "0.00", "22.50"]
    assert told[3] == ["2", "2.50", "0.00", "2.00", "0.00", "0.00", "8.00", "12.50"]
    assert told[4] == ["all", "6.50", "1.50", "8.00", "3.00", "8.00", "8.00", "35.00"]
    assert told[5] == ["share", "18.6%", "4.3%", "22.9%", "8.6%", "22.9%", "22.9%", "100.0%"]
    assert [words[0] for words in told[7:13]] == told[1][1:-1]
    assert told[13][:2] == ["goodput", "35.7%:"]


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("run.json", '"time"', '"tide"', "no `time`"),
        ("run.json", '"launched": 18', '"launched": "x', "restore the file"),
        ("metrics.jsonl", '"clock"', '"cloak"', "line 1: clock"),
        ("metrics.jsonl", '"at": 1', '"at": -1', "line 1: clock"),
        ("metrics.jsonl", '"attempt": 1', '"attempt": 3', "knows no attempt 3"),
        ("metrics.jsonl", '{"step": 1,', '{"step" 1,', r"metrics\.jsonl: line 1 is not a JSON object"),
        ("metrics.jsonl", '"waiting": 0.0', '"waiting": 1e6', "line 1: clock: .*waiting 1e.06 s is more than the 9 s"),
    ],
)
def test_files_that_no_run_wrote_are_refused(tmp_path: Path, name: str, old: str, new: str, told: str) -> None:
    run = Simulated()
    run.begin(1.0)
    run.train(0.0, 9.0, 0.0, 0.0, 0.0)
    path = run.put(tmp_path) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CorruptData, match=told):
        account_of(tmp_path)
