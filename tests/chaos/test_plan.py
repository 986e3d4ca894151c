"""The plan of faults: the same one for a seed every time, and nothing that it should hold is missing."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tests.chaos.plan import (
    ENDING_BY_SIGNAL,
    FAULTS,
    NOT_DRAWN,
    PHASES,
    SAVING,
    STEPS,
    TRAINING,
    case_of_seed,
    make_case,
)

HERE = Path("/case")


def test_a_seed_is_always_the_same_case() -> None:
    for seed in range(50):
        assert case_of_seed(seed, HERE) == case_of_seed(seed, HERE)
    assert len({str(case_of_seed(seed, HERE)) for seed in range(500)}) > 300


def test_seeds_hold_every_fault_at_every_phase_and_rank() -> None:
    seen = set()
    for seed in range(4000):
        case = case_of_seed(seed, HERE)
        main = case.happenings[case.main]
        seen.add((case.fault, main.phase, main.rank))
        for happening in case.happenings:
            assert happening.step is None or 0 <= happening.step <= STEPS
    assert {fault for fault, _, _ in seen} == set(FAULTS) - set(NOT_DRAWN)
    for fault in ENDING_BY_SIGNAL:
        assert {phase for name, phase, _ in seen if name == fault} == set(PHASES)
        assert {rank for name, _, rank in seen if name == fault} == {0, 1}
    for fault in ("flipped bit in a local shard", "flipped bit in the newest checkpoint"):
        assert {phase for name, phase, _ in seen if name == fault} == {*TRAINING, *SAVING}


def test_every_action_is_one_of_the_injector() -> None:
    sys.path.insert(0, str(Path(__file__).with_name("site")))
    try:
        from injector import ACTIONS
    finally:
        sys.path.pop(0)
    for fault in FAULTS:
        for happening in make_case(fault, random.Random(fault), HERE).happenings:
            assert {name for name, _ in happening.actions} <= set(ACTIONS)
