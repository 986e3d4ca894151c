"""The accelerate engine: the native engine's run, and no word of Accelerate's configuration that is silently not done."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from distrib import engines
from distrib.accelerate_engine import AccelerateEngine
from distrib.accelerate_file import config_file
from distrib.config import OptimizerConfig, ParallelConfig
from distrib.engine import EngineSetup
from distrib.launchers import read_launch
from distrib.native import NativeEngine
from distrib.world import World, join_world, single_process_world
from tests.distrib.engine_runs import (
    ADAMW_CLIPPED,
    CONSTANT,
    MODEL,
    SEED,
    SGD_UNCLIPPED,
    STEPS,
    TASK,
    Batch,
    Curve,
    curve,
    global_batch,
    make_engine,
    reference_curve,
    share_of,
    take_step,
)
from tests.distrib.test_native_engine import assert_same_curve
from tests.distrib.test_sharding import load_step, mesh_of, save_step, whole_tensors
from tests.worker_pool import WorkerPool

OPTIMIZERS = {"adamw": ADAMW_CLIPPED, "sgd": SGD_UNCLIPPED}
ALONE = single_process_world("cpu")


class HalvedGradient(AccelerateEngine):
    """A wrong engine: its gradient is half of what it should be."""

    def step(self, micro_batches, items):  # type: ignore[no-untyped-def]
        return super().step(micro_batches, 2 * items)


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    return {kind: reference_curve(optimizer) for kind, optimizer in OPTIMIZERS.items()}


def test_a_wrong_gradient_is_noticed(gloo_pool: WorkerPool, references: dict[str, Curve]) -> None:
    points = gloo_pool.run(curve, 2, SGD_UNCLIPPED, 2, HalvedGradient)[0]
    with pytest.raises(AssertionError, match="of step"):
        assert_same_curve(points, references["sgd"])


@pytest.mark.parametrize(
    ("precision", "world_size"),
    [("bf16", 2), ("fp32", 3), *(pytest.param("fp16", size, marks=pytest.mark.long) for size in (1, 2, 3))],
)
def test_it_is_the_native_run_bit_for_bit(gloo_pool: WorkerPool, precision: str, world_size: int) -> None:
    """Both replicate by DDP with the same options: closer than the 2**-12 that bf16 is allowed between engines."""
    native, accelerate = (
        gloo_pool.run(curve, world_size, ADAMW_CLIPPED, 2, engine, MODEL, precision)[0]
        for engine in (NativeEngine, AccelerateEngine)
    )
    assert accelerate == native
    assert len(native) == STEPS


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"activation_checkpointing": "selective"}, {"activation_checkpointing": "full"}, {"compile": True}],
    ids=str,
)
def test_blocks_are_prepared_as_the_native_engine_prepares_them(
    gloo_pool: WorkerPool, options: dict[str, Any], world_size: int
) -> None:
    native, accelerate = (
        gloo_pool.run(_prepared, world_size, engine, options) for engine in (NativeEngine, AccelerateEngine)
    )
    assert accelerate == native
    for _, is_prepared in accelerate:
        assert is_prepared


def _prepared(world: World, engine_class: type, options: dict[str, Any]) -> tuple[Curve, bool]:
    """A run, and whether blocks are what the options ask for: the values alone would not tell."""
    engine = make_engine(world, ADAMW_CLIPPED, engine_class, **options)
    blocks = engine.module.blocks()
    if options.get("compile"):
        is_prepared = all(block._compiled_call_impl is not None for block in blocks)
    else:
        is_prepared = all("forward" in vars(block) for block in blocks)
    return curve(world, ADAMW_CLIPPED, 2, engine_class, **options), is_prepared


def _communications(world: World, micro_samples: int) -> list[int]:
    """Bytes of each all-reduce of gradients during one step."""
    engine = make_engine(world, SGD_UNCLIPPED, AccelerateEngine)
    sizes: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(world.data_group, bucket)

    engine._forward_module.register_comm_hook(None, count)
    engine.step(share_of(global_batch(0), 0, world.data_rank, world.data_size, micro_samples), 40)
    return [sum(sizes), sum(4 * parameter.numel() for parameter in engine.module.parameters())]


def test_gradients_travel_once_per_step_however_many_micro_batches(gloo_pool: WorkerPool) -> None:
    for sent, expected in gloo_pool.run(_communications, 2, 1):
        assert sent == expected


def _poisoned(world: World) -> tuple[list[bool], list[bool], int]:
    """A step whose loss is not finite on the last rank alone, between two good ones."""
    engine = make_engine(world, ADAMW_CLIPPED, AccelerateEngine)
    skipped, changed = [], []
    for step in range(3):
        before = [tensor.clone() for tensor in engine.canonical_state().tensors.values()]
        micro_batches = share_of(global_batch(step), step, world.data_rank, world.data_size, 7)
        if step == 1 and world.rank == world.size - 1:
            micro_batches = [Batch(micro_batches[0].tensors, micro_batches[0].first_position, weight=float("nan"))]
        skipped.append(bool(engine.step(micro_batches, 40).skipped))
        after = engine.canonical_state().tensors.values()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return skipped, changed, engine.canonical_state().scalars["optimizer_updates"]


def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(gloo_pool: WorkerPool) -> None:
    for skipped, changed, updates in gloo_pool.run(_poisoned, 2):
        assert (skipped, changed, updates) == ([False, True, False], [True, False, True], 2)


class HalfUsed(nn.Module):
    """A language model of which a layer is never used, with a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 61)
        self.unused = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        return self.head(self.norm(hidden.flatten(0, 1)).view_as(hidden))


def _half_used(world: World, engine_class: type) -> tuple[bool, Curve]:
    """Whether a dry run left everything as it was, and the steps that follow it."""
    setup = EngineSetup(
        HalfUsed, TASK.loss, world, ADAMW_CLIPPED, CONSTANT, ParallelConfig(), steps=STEPS, seed=SEED
    )  # fmt: skip
    engine = engine_class(setup)
    before = engine.canonical_state()
    copies = {name: tensor.clone() for name, tensor in before.tensors.items()}
    engine.dry_run(share_of(global_batch(0), 0, 0, 1, 2)[0])
    after = engine.canonical_state()
    kept = after.scalars == before.scalars and all(
        torch.equal(after.tensors[name], tensor) for name, tensor in copies.items()
    )
    return kept, [take_step(engine, step, 2) for step in range(3)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dry_run_keeps_nothing_and_finds_unused_parameters(gloo_pool: WorkerPool, world_size: int) -> None:
    accelerate, native = (gloo_pool.run(_half_used, world_size, e)[0] for e in (AccelerateEngine, NativeEngine))
    assert accelerate == native
    assert accelerate[0]


def _train_and_save(world: World, engine_class: type, zero_stage: int, root: str) -> None:
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, engine_class, zero_stage=zero_stage)
    for step in range(3):
        take_step(engine, step, 7)
    save_step(engine, root, 3)


def _load_and_save(world: World, engine_class: type, zero_stage: int, root: str, again: str) -> Curve:
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, engine_class, zero_stage=zero_stage)
    load_step(engine, root, 3)
    save_step(engine, again, 3)
    return [take_step(engine, step, 7) for step in range(3, STEPS)]


@pytest.mark.parametrize(
    ("saves", "loads"),
    [
        ((AccelerateEngine, 2, 0), (NativeEngine, 3, 3)),
        ((NativeEngine, 2, 3), (AccelerateEngine, 3, 0)),
        pytest.param((NativeEngine, 1, 0), (AccelerateEngine, 2, 0), marks=pytest.mark.long),
        pytest.param((AccelerateEngine, 3, 0), (AccelerateEngine, 1, 0), marks=pytest.mark.long),
    ],
    ids=lambda side: f"{side[0].__name__} on {side[1]} at stage {side[2]}",
)
def test_checkpoints_pass_between_the_engines(
    gloo_pool: WorkerPool, references: dict[str, Curve], tmp_path: Path, saves: Any, loads: Any
) -> None:
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    gloo_pool.run(_train_and_save, saves[1], saves[0], saves[2], first)
    points = gloo_pool.run(_load_and_save, loads[1], loads[0], loads[2], first, again)[0]
    expected, found = whole_tensors(Path(first)), whole_tensors(Path(again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in references["adamw"][3:]], rel=2e-6)


# What `accelerate config` or `accelerate launch` may set -> what the line must hold.
SHARDED = {"ACCELERATE_USE_FSDP": "true"}
REFUSED: list[tuple[dict[str, str], list[str]]] = [
    (SHARDED, ["ACCELERATE_USE_FSDP=true", "gives MULTI_CPU", "parallel.engine=native parallel.zero_stage=3"]),
    ({"ACCELERATE_USE_FSDP": "1"}, ["ACCELERATE_USE_FSDP=1", "gives MULTI_CPU"]),
    ({**SHARDED, "FSDP_VERSION": "2"}, ["ACCELERATE_USE_FSDP=true", "gives MULTI_CPU"]),
    ({**SHARDED, "FSDP_SYNC_MODULE_STATES": "true"}, ["ACCELERATE_USE_FSDP=true", "gives an error", "`accelerate config`"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["ACCELERATE_USE_DEEPSPEED=true", "gives MULTI_CPU", "engine=deepspeed"]),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["ACCELERATE_USE_MEGATRON_LM=true", "Megatron is not installed"]),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["ACCELERATE_USE_PARALLELISM_CONFIG", "`accelerate config`"]),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["ACCELERATE_MIXED_PRECISION=bf16", "parallel.precision=fp32"]),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["ACCELERATE_MIXED_PRECISION=fp8", "parallel.precision=fp32"]),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "parallel.compile=true"]),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "global_samples"]),
    ({"ACCELERATE_TORCH_DEVICE": "meta"}, ["device meta", "this worker cpu"]),
]  # fmt: skip


def _answers(world: World, variables: list[dict[str, str]]) -> list[str]:
    """What making an engine under each set of variables says; the last ones are made without any."""
    answers = []
    for extra in variables:
        with patch.dict(os.environ, extra):
            try:
                make_engine(world, ADAMW_CLIPPED, AccelerateEngine)
                answers.append("made")
            except ValueError as error:
                answers.append(str(error))
    return answers


def test_what_accelerate_would_not_do_is_refused_in_a_line(gloo_pool: WorkerPool) -> None:
    innocent = [{"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}]
    for answers in gloo_pool.run(_answers, 2, [variables for variables, _ in REFUSED] + innocent):
        *refusals, last = answers
        assert last == "made"
        for refusal, (variables, parts) in zip(refusals, REFUSED, strict=True):
            assert "\n" not in refusal
            for part in parts:
                assert part in refusal, variables
    assert "gives NO" in _answers(ALONE, [SHARDED])[0]


def _with_file(directory: Path, content: str, **variables: str) -> str:
    """What making an engine says where `accelerate config` wrote this."""
    path = directory / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return _answers(ALONE, [{"HF_HOME": str(directory), **variables}])[0]


# What `accelerate config` may write -> what the line must hold.
WRITTEN: list[tuple[str, list[str]]] = [
    ("distributed_type: FSDP\nmixed_precision: 'no'\n", ["distributed_type=FSDP in ", "engine=native parallel.zero_stage=3"]),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n", ["distributed_type=DEEPSPEED", "engine=deepspeed"]),
    ("distributed_type: MEGATRON_LM\n", ["distributed_type=MEGATRON_LM"]),
    ("distributed_type: 'NO'\nmixed_precision: bf16\n", ["mixed_precision=bf16 in ", "parallel.precision=fp32"]),
    ("distributed_type: 'NO'\nfp16: true\n", ["mixed_precision=fp16 in ", "parallel.precision=fp32"]),
    ("mixed_precision: fp8\n", ["mixed_precision=fp8 in ", "parallel.precision=fp32"]),
    ("dynamo_config: {dynamo_backend: INDUCTOR}\n", ["dynamo_backend=INDUCTOR in ", "parallel.compile=true"]),
    ("dynamo_config: {backend: INDUCTOR}\n", ["dynamo_backend=INDUCTOR in "]),
    ("dynamo_backend: INDUCTOR\n", ["dynamo_backend=INDUCTOR in "]),
    ("parallelism_config: {parallelism_config_tp_size: 2}\n", ["parallelism_config=parallelism_config_tp_size in "]),
    ("distributed_type: [\n", ["cannot be read", "remove it"]),
    ("", ["holds no keys"]),
]  # fmt: skip
HARMLESS = [
    "distributed_type: 'NO'\nmixed_precision: 'no'\nnum_processes: 4\ndynamo_config: {}\nfsdp_config: {fsdp_version: 2}\n",
    "distributed_type: NO\nmixed_precision: no\ndynamo_config: {dynamo_backend: NO}\n",
    "distributed_type: MULTI_GPU\nmixed_precision:\nparallelism_config: {}\n",
]


def test_a_file_of_accelerate_config_that_no_launcher_reads_is_held_to_the_recipe(tmp_path: Path) -> None:
    for content, parts in WRITTEN:
        refusal = _with_file(tmp_path, content)
        assert "\n" not in refusal
        for part in [*parts, str(tmp_path / "accelerate" / "default_config.yaml")]:
            assert part in refusal, content
    for content in HARMLESS:
        assert _with_file(tmp_path, content) == "made", content


def test_accelerate_launch_has_read_the_file_itself(tmp_path: Path) -> None:
    """And what it was told on its command line goes before what the file says."""
    assert _with_file(tmp_path, WRITTEN[0][0], ACCELERATE_DYNAMO_MODE="default") == "made"


@pytest.mark.long
def test_the_file_is_where_accelerate_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "from accelerate.commands.config import default_config_file; print(default_config_file)"
    for variables in ({"HF_HOME": "~/somewhere"}, {"XDG_CACHE_HOME": "/elsewhere"}, {}):
        for name in ("HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert str(config_file()) == answer.stdout.strip()


def test_the_precision_that_both_ask_for_is_the_recipe_s() -> None:
    with patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "bf16"}):
        engine = make_engine(ALONE, ADAMW_CLIPPED, AccelerateEngine, precision="bf16")
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}
    assert engine._accelerator.mixed_precision == "no"
    assert not engine._accelerator.native_amp


def _made_twice(world: World, optimizer: OptimizerConfig) -> bool:
    """Whether a second engine in the process trains as the first did, and nothing outside them has changed."""
    before, threads = dict(os.environ), torch.get_num_threads()
    first = curve(world, optimizer, 7, AccelerateEngine)
    second = curve(world, optimizer, 7, AccelerateEngine)
    return first == second and dict(os.environ) == before and torch.get_num_threads() == threads


@pytest.mark.parametrize("world_size", [2, 1])
def test_engines_in_one_process_follow_each_other(gloo_pool: WorkerPool, world_size: int) -> None:
    assert all(gloo_pool.run(_made_twice, world_size, SGD_UNCLIPPED))


def test_a_launcher_s_lone_worker_makes_no_process_group() -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with patch.dict(os.environ, variables):
        take_step(make_engine(join_world(read_launch(), "cpu"), ADAMW_CLIPPED, AccelerateEngine), 0, 7)
    assert not torch.distributed.is_initialized()


def test_a_missing_package_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = ParallelConfig(engine="accelerate")
    setup = EngineSetup(HalfUsed, TASK.loss, ALONE, ADAMW_CLIPPED, CONSTANT, parallel, steps=STEPS, seed=SEED)
    assert isinstance(engines.make_engine(setup), AccelerateEngine)
    assert isinstance(engines.make_engine(dataclasses.replace(setup, parallel=ParallelConfig())), NativeEngine)
    for module in ("distrib.accelerate_engine", "distrib.accelerator"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"parallel.engine=accelerate needs the package accelerate") as refusal:
        engines.make_engine(setup)
    assert "\n" not in str(refusal.value)
