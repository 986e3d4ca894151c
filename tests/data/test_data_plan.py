"""The plan: append-only, hashed, and read back exactly or not at all."""

import json

import pytest

from data.plan import Plan, Segment


def segment(**changes: object) -> Segment:
    part = {"fingerprint": "a" * 64, "sequence_tokens": 16}
    values: dict[str, object] = {"start_position": 0, "streams": (part,), "seed": 1, "global_samples": 8}
    return Segment.model_validate(values | changes)


def mixed(quotas: dict[str, int], **changes: object) -> Segment:
    """A segment of streams of datasets named as they are."""
    streams = tuple({"name": n, "fingerprint": n, "quota": q, "sequence_tokens": 16} for n, q in quotas.items())
    return segment(streams=streams, **changes)


def test_positions_find_their_segment() -> None:
    plan = Plan.of([segment()]).append(segment(start_position=16, global_samples=4))
    plan = plan.append(mixed({"": 4000, "web": 96}, start_position=40))
    starts = [plan.segment_at(position).start_position for position in (0, 15, 16, 39, 40, 10**12)]
    assert starts == [0, 0, 16, 16, 40, 40]
    assert [plan.segment_end(position) for position in (0, 16, 40)] == [16, 40, None]
    # A change of the step's size goes on in the block; another mixture begins its own.
    assert [plan.order_origin(position) for position in (0, 16, 40)] == [0, 0, 40]
    with pytest.raises(ValueError, match="before the start"):
        plan.segment_at(-1)


def test_a_stream_goes_on_where_a_later_segment_has_it_again() -> None:
    plan = Plan.of([mixed({"a": 3072, "b": 1024})])
    plan = plan.append(mixed({"a": 1024, "c": 3072}, start_position=5000))
    plan = plan.append(mixed({"b": 2048, "a": 2048}, start_position=9096))
    assert [stream.name for stream in plan.streams] == ["a", "b", "c"]
    assert plan.consumed(0) == [0, 0, 0]
    assert plan.consumed(4096) == [3072, 1024, 0]
    first = plan.consumed(5000)
    assert sum(first) == 5000
    assert first[2] == 0
    assert plan.consumed(9096) == [first[0] + 1024, first[1], 3072]
    for position in (1, 4095, 4097, 5001, 9095, 9097, 20_000):
        assert sum(plan.consumed(position)) == position
        steps = [
            after - before for before, after in zip(plan.consumed(position - 1), plan.consumed(position), strict=True)
        ]
        assert sorted(steps) == [0, 0, 1]


def test_the_plan_survives_json_and_its_hash_covers_everything() -> None:
    plan = Plan.of([segment(), segment(start_position=16, global_samples=4)])
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).hash == plan.hash
    part = segment().streams[0].model_dump()
    windowed = {"order": "windowed-1", "lanes": 4, "window_shards": 2}
    parts: list[dict[str, object]] = [
        {"order": "x"},
        {"sequence_tokens": None},
        {"fingerprint": "b"},
        {"name": "web"},
        {"packing": "best_fit"},
        windowed,
        windowed | {"lanes": 5},
        windowed | {"window_shards": 3},
    ]
    changes = [{"seed": 2}, {"global_samples": 9}, *[{"streams": (part | change,)} for change in parts]]
    hashes = {Plan.of([segment(**change)]).hash for change in changes} | {plan.hash, Plan.of([segment()]).hash}
    hashes |= {Plan.of([mixed({"a": 4000, "b": 96})]).hash, Plan.of([mixed({"a": 4001, "b": 95})]).hash}
    assert len(hashes) == len(changes) + 4


def test_the_golden_hash() -> None:
    assert Plan.of([segment()]).hash == "9a97edefa797045fa0ca60e9767ee9af5d945dbaaec9c5a91e47777f30a382d6"


def test_only_the_end_can_grow() -> None:
    plan = Plan.of([segment(), segment(start_position=16)])
    for start in (0, 15, 16):
        with pytest.raises(ValueError, match="cannot follow"):
            plan.append(segment(start_position=start))
    with pytest.raises(ValueError, match="start at 0 and rise"):
        Plan.of([segment(start_position=3)])
    with pytest.raises(ValueError, match="different seeds"):
        plan.append(segment(start_position=40, seed=2))


@pytest.mark.parametrize(
    "alter",
    [
        lambda plan: plan.update(version=1),
        lambda plan: plan.update(extra=1),
        lambda plan: plan.update(segments=[]),
        lambda plan: plan["segments"][0].update(seed="1"),
        lambda plan: plan["segments"][0].update(mixture="blocks-2"),
        lambda plan: plan["segments"][0]["streams"][0].update(quota=4095),
        lambda plan: plan["segments"][0]["streams"][0].update(lanes=2),
        lambda plan: plan["segments"][0]["streams"][0].update(order="windowed-1"),
        lambda plan: plan["segments"][0]["streams"].append(plan["segments"][0]["streams"][0]),
        lambda plan: plan["segments"][0]["streams"][0].pop("fingerprint"),
    ],
)
def test_another_plan_is_refused_in_one_line(alter: object) -> None:
    stored = json.loads(Plan.of([segment()]).to_json())
    alter(stored)  # type: ignore[operator]
    with pytest.raises(ValueError, match="plan: ") as refused:
        Plan.from_json(json.dumps(stored))
    assert "\n" not in str(refused.value)
