import json
import math
from pathlib import Path

import pytest

from launch.tracking.metrics_file import (
    MetricsFile,
    read_checkpoint_stalls,
    read_last_step,
    read_metrics,
    read_step_lines,
)


def write(run: Path, *records: dict) -> None:
    file = MetricsFile(run)
    for record in records:
        file.append(record)
    file.close()


def test_records_come_back_sorted_and_apart(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "loss": 2.0}, {"step": 1, "evaluation": {"loss": 1.5}}, {"step": 2, "loss": 1.0})
    steps, evaluations = read_metrics(tmp_path)
    assert steps == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert evaluations == [{"step": 1, "evaluation": {"loss": 1.5}}]


def test_waits_for_checkpoints_are_kept_apart_and_survive_a_resume(tmp_path: Path) -> None:
    def stall(step: int, attempt: int) -> dict:
        return {"step": step, "attempt": attempt, "checkpoint_stall_seconds": 0.5 * attempt}

    write(tmp_path, {"step": 5, "loss": 2.0}, stall(5, 1), {"step": 10, "loss": 1.0}, stall(10, 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "checkpoint_st')
    write(tmp_path, {"step": 6, "loss": 1.9}, {"step": 10, "loss": 1.1}, stall(10, 2))
    assert read_checkpoint_stalls(tmp_path) == [stall(5, 1), stall(10, 2)]
    steps, evaluations = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in steps] == [(5, 2.0), (6, 1.9), (10, 1.1)]
    assert evaluations == []


def test_last_line_of_a_step_counts(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "attempt": 1}, {"step": 2, "attempt": 1}, {"step": 3, "attempt": 1})
    write(tmp_path, {"step": 2, "attempt": 2}, {"step": 3, "attempt": 2})
    steps, _ = read_metrics(tmp_path)
    assert [(record["step"], record["attempt"]) for record in steps] == [(1, 1), (2, 2), (3, 2)]


def test_a_line_is_on_the_file_as_soon_as_append_returns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.append({"step": 1})
    assert file.path.read_bytes() == b'{"step": 1}\n'
    file.close()


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    write(
        tmp_path, {"step": 1, "loss": math.nan, "skipped": True, "evaluation": {"a": math.inf, "b": [1.0, -math.inf]}}
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "skipped": True, "evaluation": {"a": None, "b": [1.0, None]}}


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3}x', '{"step": '])
@pytest.mark.parametrize(
    "before", [0, 2, 20_000]
)  # 20,000 lines: longer than one block of the search for the last newline
def test_a_torn_last_line_is_dropped_and_then_cut_off(tmp_path: Path, torn: str, before: int) -> None:
    whole = "".join(f'{{"step": {step}}}\n' for step in range(1, before + 1))
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    assert len(read_metrics(tmp_path)[0]) == before
    write(tmp_path, {"step": 50_000})
    assert (tmp_path / "metrics.jsonl").read_text() == whole + '{"step": 50000}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert len(read_metrics(tmp_path)[0]) == 2
    write(tmp_path, {"step": 3})
    assert [record["step"] for record in read_metrics(tmp_path)[0]] == [1, 2, 3]


def test_a_line_that_is_read_while_it_is_written_is_one_line(tmp_path: Path) -> None:
    """A page of the file may end before its newline; the rest comes when the line is known already."""
    with (tmp_path / "metrics.jsonl").open("a") as file:
        print('{"step": 1}', end="", file=file, flush=True)
        lines = read_step_lines(tmp_path)
        assert next(lines) == (1, {"step": 1})
        print('\n{"step": 2}', file=file, flush=True)
        assert list(lines) == []
    assert [number for number, _ in read_step_lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("broken", ["{", "[1]", '{"loss": 1.0}', '{"step": 1.5}', '{"step": true}', "\ufffd", ""])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, broken: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        read_metrics(tmp_path)


def test_a_run_without_a_line_yet_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == ([], [])
    write(tmp_path)
    assert read_metrics(tmp_path) == ([], [])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        file.append({"step": 1})
    file.close()


def test_an_unwritable_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be opened for writing"):
        MetricsFile(tmp_path)


@pytest.mark.parametrize("padding", [0, 30_000, 65_000, 200_000], ids=lambda size: f"{size} bytes of other lines")
def test_the_last_step_is_found_from_the_end(tmp_path: Path, padding: int) -> None:
    """However long what comes after it is, and whatever was torn."""
    assert read_last_step(tmp_path) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert read_last_step(tmp_path) is None
    before = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 3001))
    other = (
        '{"step": 3000, "evaluation": {"loss": 2.0}}\n' * (padding // 44)
        + '{"step": 3000, "checkpoint_stall_seconds": 1}\n'
    )
    path.write_text(before + other + '{"step": 3001, "lo')
    assert read_last_step(tmp_path) == {"step": 3000, "loss": 1.0}
    path.write_text(other)
    assert read_last_step(tmp_path) is None
