"""Memory and traffic of a model of 50 million parameters stay within 3 % of what each engine states."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.footprint import (
    RESULTS,
    Case,
    cases,
    deviations,
    measure,
    paper_bytes,
    record,
    table,
    within_tolerance,
)


@pytest.mark.long
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_engine_holds_and_sends_what_its_formula_says(case: Case) -> None:
    measured = measure(case)
    elements = sum(measured["sizes"])
    assert 48e6 < elements < 52e6
    for what, (size, stated) in deviations(case, measured).items():
        assert within_tolerance(size, stated, 4 * elements), f"{what}: {size} bytes, stated {stated}"
    assert case.name in table({"measured": "test", "cases": [record(case, measured)]})


def test_the_committed_page_shows_the_committed_numbers() -> None:
    results = json.loads((RESULTS / "footprint.json").read_text())
    page = (RESULTS / "footprint.md").read_text()
    assert page == table(results)
    assert [Case(*(one[field.name] for field in dataclasses.fields(Case))) for one in results["cases"]] == cases()
    for case, one in zip(cases(), results["cases"], strict=True):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {case.name} |"))
        assert all(dtype in row for dtypes in one["dtypes"].values() for dtype in dtypes)


def test_a_wrong_formula_is_noticed() -> None:
    assert within_tolerance(103.0, 100.0, 100.0)
    assert not within_tolerance(104.0, 100.0, 100.0)
    assert not within_tolerance(1.0, 0.0, 100.0)


def test_the_paper_s_formula() -> None:
    """Figure 1 of the paper: 7.5 billion parameters on 64 devices, in GB."""
    held = [paper_bytes(stage, 7_500_000_000, 64) / 1e9 for stage in range(4)]
    assert held == pytest.approx([120.0, 31.4, 16.6, 1.9], abs=0.05)
