"""The lockstep matrix: the same run under every engine, ZeRO stage, world size, accumulation and precision.

`make test` takes one cell of every engine and stage, `make test-all` all of them and prints the table of the README.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from distrib.world import World, single_process_world
from tests.distrib.engine_runs import DecayOfAll, HalvedGradient, MeanOfMeans, PerRankClip
from tests.distrib.lockstep_runs import (
    DATASETS,
    Curve,
    Layout,
    lockstep_curve,
    lockstep_curves,
    reference_curve,
)
from tests.worker_pool import WorkerPool

# fp32 against float64: what the order of summation does in 20 steps. Never to be loosened.
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 2e-5
# bf16 against bf16 in one process. At the first step the weights are the same and products are rounded alike (2**-9): the
# losses differ by the order of summation, and by ten times as much and more from what fp32 would give. Later, once a weight's
# last fp32 bit differs, so may its rounding, and a step later that of all that depends on it.
BF16_FIRST_LOSS_TOLERANCE, BF16_LOSS_TOLERANCE, BF16_NORM_TOLERANCE = 1e-5, 2**-8, 2**-7

STAGES = [*(("native", stage) for stage in range(4)), *(("deepspeed", stage) for stage in range(4)), ("accelerate", 0)]
LAYOUTS = [
    *(
        Layout(engine, stage, size)
        for engine, stage in STAGES
        for size in (1, 2, 3, 4)
        # In one process native shards nothing: its stages 1 to 3 are stage 0.
        if size > 1 or engine != "native" or stage == 0
    ),
    *(Layout("native", stage, 4, replicas=2) for stage in (1, 2, 3)),
]
SMALLEST = [*{layout.name: layout for layout in reversed(LAYOUTS) if layout.world_size > 1}.values()]
PLAIN = Layout("native", 0, 1)
# SGD is there for what AdamW does not see, the scale of the gradient; that is seen in fp32.
SETTINGS = [("adamw", "fp32"), ("sgd", "fp32"), ("adamw", "bf16")]
ACCUMULATIONS = (1, 2, 4)


class Deviation(NamedTuple):
    """The largest relative difference from the reference over all steps."""

    loss: float
    gradient_norm: float


@functools.cache
def reference(kind: str, optimizer: str) -> tuple[list[float], list[float]]:
    return reference_curve(kind, optimizer)


@functools.cache
def plain(kind: str, optimizer: str, precision: str) -> Curve:
    """One process, one micro-batch."""
    return lockstep_curve(single_process_world("cpu"), PLAIN, kind, optimizer, 1, precision)


def deviation(curve: Curve, losses: list[float], norms: list[float]) -> Deviation:
    return Deviation(
        max(abs(a - b) / b for a, b in zip(curve.losses, losses, strict=True)),
        max(abs(a - b) / b for a, b in zip(curve.gradient_norms, norms, strict=True)),
    )


def check(curve: Curve, kind: str, optimizer: str, precision: str) -> Deviation:
    """Asserts that a curve is the reference's, and says how close it came."""
    straight = plain(kind, optimizer, precision)
    assert curve.digest == straight.digest, "other samples were read"
    if precision == "fp32":
        losses, norms = reference(kind, optimizer)
        tolerance = Deviation(LOSS_TOLERANCE, NORM_TOLERANCE)
    else:
        losses, norms = straight.losses, straight.gradient_norms
        tolerance = Deviation(BF16_LOSS_TOLERANCE, BF16_NORM_TOLERANCE)
        assert abs(curve.losses[0] - losses[0]) <= BF16_FIRST_LOSS_TOLERANCE * losses[0], "not computed in bf16"
    assert losses[-1] < 0.8 * losses[0], "too little was learned for a comparison"
    found = deviation(curve, losses, norms)
    assert found.loss <= tolerance.loss, "the losses differ"
    assert found.gradient_norm <= tolerance.gradient_norm, "the gradient norms differ"
    return found


def deviations(pool: WorkerPool, layout: Layout, kind: str, optimizer: str, precision: str) -> list[Deviation]:
    """Runs a cell of the matrix, every accumulation of it, and checks it."""
    answers = pool.run(lockstep_curves, layout.world_size, layout, kind, optimizer, precision, ACCUMULATIONS)
    assert all(curves == answers[0] for curves in answers), "ranks must report the same numbers"
    return [check(answers[0][accumulation], kind, optimizer, precision) for accumulation in ACCUMULATIONS]


class Table:
    """Worst deviations of everything that ran, by layout."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict[str, list[Deviation]]]] = {}

    def add(self, layout: Layout, precision: str, found: Deviation) -> None:
        columns = self.rows.setdefault(layout.name, {}).setdefault(layout.world_size, {})
        columns.setdefault(precision, []).append(found)

    def text(self) -> str:
        lines = []
        for precision in ("fp32", "bf16"):
            lines += ["", f"| {precision}: loss, gradient norm | world 1 | 2 | 3 | 4 |", "|---|---|---|---|---|"]
            for name, columns in self.rows.items():
                cells = [self._cell(columns.get(size, {}).get(precision, [])) for size in (1, 2, 3, 4)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    @staticmethod
    def _cell(found: list[Deviation]) -> str:
        if not found:
            return ""
        return f"{max(one.loss for one in found):.0e}, {max(one.gradient_norm for one in found):.0e}"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    rows = Table()
    yield rows
    if rows.rows:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nThe lockstep matrix: worst relative differences over 20 steps{rows.text()}")


@pytest.mark.parametrize(
    ("layout", "kind", "optimizer"),
    [
        *((layout, "gpt", "adamw") for layout in SMALLEST),
        *((layout, "resnet", "sgd") for layout in SMALLEST if layout.zero_stage == 3),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else value,
)
def test_every_engine_and_stage_gives_the_reference_curve(
    gloo_pool: WorkerPool, layout: Layout, kind: str, optimizer: str
) -> None:
    curves = gloo_pool.run(lockstep_curve, layout.world_size, layout, kind, optimizer, 2, "fp32")
    assert all(curve == curves[0] for curve in curves), "ranks must report the same numbers"
    check(curves[0], kind, optimizer, "fp32")


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize(
    ("wrong_engine", "optimizer"),
    [
        (HalvedGradient, "adamw"),
        (HalvedGradient, "sgd"),
        (MeanOfMeans, "adamw"),
        (PerRankClip, "adamw"),
        (DecayOfAll, "adamw"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value,
)
def test_a_wrong_engine_is_noticed(gloo_pool: WorkerPool, kind: str, wrong_engine: type, optimizer: str) -> None:
    curves = gloo_pool.run(_wrong_curve, 2, kind, wrong_engine, optimizer)
    with pytest.raises(AssertionError, match=r"the (losses|gradient norms) differ"):
        check(curves[0], kind, optimizer, "fp32")


def _wrong_curve(world: World, kind: str, wrong_engine: type, optimizer: str) -> Curve:
    return lockstep_curve(world, Layout("native", 0, 2), kind, optimizer, 2, "fp32", make=wrong_engine)


@pytest.mark.parametrize("kind", DATASETS)
def test_fp32_in_place_of_bf16_is_noticed(kind: str) -> None:
    with pytest.raises(AssertionError, match="not computed in bf16"):
        check(plain(kind, "adamw", "fp32"), kind, "adamw", "bf16")


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "precision"), SETTINGS)
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}, world {layout.world_size}")
def test_the_whole_matrix(
    gloo_pool: WorkerPool, table: Table, layout: Layout, kind: str, optimizer: str, precision: str
) -> None:
    for found in deviations(gloo_pool, layout, kind, optimizer, precision):
        table.add(layout, precision, found)
