"""The plan: append-only, hashed, and read back exactly or not at all."""

import json

import pytest

from data.plan import Plan, Segment


def segment(**changes: object) -> Segment:
    values: dict[str, object] = {
        "start_position": 0,
        "fingerprints": ("a" * 64,),
        "order": "global-1",
        "sequence_tokens": 16,
        "seed": 1,
        "global_samples": 8,
    }
    return Segment.model_validate(values | changes)


def test_positions_find_their_segment() -> None:
    plan = Plan.of([segment()]).append(segment(start_position=16, global_samples=4))
    plan = plan.append(segment(start_position=40, seed=2))
    assert [plan.segment_at(position).start_position for position in (0, 15, 16, 39, 40, 10**12)] == [
        0,
        0,
        16,
        16,
        40,
        40,
    ]
    assert [plan.segment_end(position) for position in (0, 16, 40)] == [16, 40, None]
    # A change of the step's size continues the order; other data or another seed begins its own.
    assert [plan.order_origin(position) for position in (0, 16, 40)] == [0, 0, 40]
    with pytest.raises(ValueError, match="before the start"):
        plan.segment_at(-1)


def test_the_plan_survives_json_and_its_hash_covers_everything() -> None:
    plan = Plan.of([segment(), segment(start_position=16, global_samples=4)])
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).hash == plan.hash
    changes = [{"seed": 2}, {"order": "x"}, {"sequence_tokens": None}, {"global_samples": 9}, {"fingerprints": ("b",)}]
    hashes = {Plan.of([segment(**change)]).hash for change in changes} | {plan.hash, Plan.of([segment()]).hash}
    assert len(hashes) == len(changes) + 2


def test_the_golden_hash() -> None:
    assert Plan.of([segment()]).hash == "faae16a2cab36ff484862943355aa7597626e89414e216a0cc32dd657e2c0cfa"


def test_only_the_end_can_grow() -> None:
    plan = Plan.of([segment(), segment(start_position=16)])
    for start in (0, 15, 16):
        with pytest.raises(ValueError, match="cannot follow"):
            plan.append(segment(start_position=start))
    with pytest.raises(ValueError, match="start at 0 and rise"):
        Plan.of([segment(start_position=3)])


@pytest.mark.parametrize(
    "alter",
    [
        lambda plan: plan.update(version=2),
        lambda plan: plan.update(extra=1),
        lambda plan: plan.update(segments=[]),
        lambda plan: plan["segments"][0].update(seed="1"),
        lambda plan: plan["segments"][0].update(weights=[1, 2]),
        lambda plan: plan["segments"][0].pop("order"),
    ],
)
def test_another_plan_is_refused_in_one_line(alter: object) -> None:
    stored = json.loads(Plan.of([segment()]).to_json())
    alter(stored)  # type: ignore[operator]
    with pytest.raises(ValueError, match="plan: ") as refused:
        Plan.from_json(json.dumps(stored))
    assert "\n" not in str(refused.value)
