"""Memory and traffic of every engine and ZeRO stage, measured, against the engine's own formula and the ZeRO paper's.

    python benchmarks/footprint.py

A GPT of 50 million parameters takes one step with AdamW on 2 and 4 gloo processes, one micro-batch per rank. Counted are the
storages of all live tensors and the payload of every collective. Writes benchmarks/results/footprint.json and footprint.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.live_memory import live_bytes
from benchmarks.machine import device
from distrib.capabilities import count_shards
from distrib.collectives import CollectiveCounter
from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from distrib.engine import EngineSetup
from distrib.engines import make_engine
from distrib.footprint import Footprint, footprint
from distrib.tensor_memory import storage_bytes
from distrib.world import leave_world, world_of_group
from models.build import InputShape, build_model
from models.config import TaskConfig, TransformerConfig
from models.tasks import build_task

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.03
# What a collective of counts, norms and flags stays below.
_SCALARS_BYTES = 1000
MODEL = TransformerConfig(layers=10, width=640, heads=10, positions="learned", norm="layernorm", activation="gelu")
SHAPE = InputShape(vocabulary_size=512, sequence_tokens=16)
OPTIMIZER = OptimizerConfig()
# (engine, ZeRO stage, replicas)
CONFIGURATIONS = [
    *(("native", stage, 1) for stage in range(4)),
    *(("native", stage, 2) for stage in (1, 2, 3)),
    *(("deepspeed", stage, 1) for stage in range(4)),
    ("accelerate", 0, 1),
]


@dataclass(frozen=True)
class Case:
    engine: str
    zero_stage: int
    replicas: int
    world_size: int

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            engine=self.engine, zero_stage=self.zero_stage, replicas=self.replicas if self.replicas > 1 else None
        )

    @property
    def name(self) -> str:
        hybrid = f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.engine}, ZeRO {self.zero_stage}{hybrid}, world {self.world_size}"


@dataclass
class Micro:
    """A micro-batch of one sample."""

    tensors: dict[str, torch.Tensor]
    first_position: int
    weight: float = 1.0
    streams: torch.Tensor | None = None
    stream_count: int = 1


def cases() -> list[Case]:
    return [
        Case(engine, stage, replicas, size)
        for engine, stage, replicas in CONFIGURATIONS
        for size in (2, 4)
        if size > replicas
    ]


def measure(case: Case) -> dict[str, Any]:
    """What rank 0 holds and sends; the largest over ranks for memory."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        results = context.SimpleQueue()
        arguments = [(case, rank, f"file://{directory}/store", results) for rank in range(case.world_size)]
        workers = [context.Process(target=_work, args=one, daemon=True) for one in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"{case.name}: a worker failed")
        ranks = [results.get() for _ in workers]
    measured = {key: max(rank[key] for rank in ranks) for key in _MEMORY}
    return {**measured, "traffic": ranks[0]["traffic"], "dtypes": ranks[0]["dtypes"], "sizes": ranks[0]["sizes"]}


def _work(case: Case, rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    timeout = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.world_size, timeout=timeout)
    shards = count_shards(case.parallel, case.world_size)
    world = world_of_group(rank, torch.device("cpu"), timeout, shards)
    before = live_bytes()
    task = build_task(TaskConfig(kind="language_modelling"))
    setup = EngineSetup(
        _build, task.loss, world, OPTIMIZER, ScheduleConfig(kind="constant"), case.parallel, steps=10, seed=0
    )
    engine = make_engine(setup)
    micro_batch = Micro({"tokens": torch.arange(17).view(1, 17)}, first_position=rank)
    held = live_bytes() - before
    buffers = storage_bytes(_gradient_buffers(engine))
    engine.dry_run(micro_batch)
    seen: dict[str, float] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not seen:
            seen["optimizer"] = storage_bytes(value for state in optimizer.state.values() for value in state.values())
            seen["gradients"] = live_bytes() - before - held

    handle = register_optimizer_step_pre_hook(look)
    with CollectiveCounter() as counter:
        engine.step([micro_batch], items=16 * case.world_size)
    handle.remove()
    traffic: Counter[str] = Counter()
    for kind, size in counter.payload_bytes.items():
        traffic[kind.operation] += size
    results.put(
        {
            "sizes": [parameter.numel() for parameter in _build("meta").parameters()],
            "parameters": held - seen["optimizer"] - buffers,
            "gradients": seen["gradients"] + buffers,
            "optimizer": seen["optimizer"],
            "traffic": dict(traffic),
            "dtypes": _dtypes_of(counter),
        }
    )
    leave_world(world)


def _dtypes_of(counter: CollectiveCounter) -> dict[str, list[str]]:
    """Collective -> dtypes of what it sends."""
    dtypes: dict[str, list[str]] = {}
    for kind in sorted(kind for kind, size in counter.payload_bytes.items() if size > _SCALARS_BYTES):
        dtypes.setdefault(kind.operation, []).append(kind.dtype)
    return dtypes


def _gradient_buffers(engine: Any) -> Iterator[torch.Tensor]:
    """What an engine sets aside for gradients before there are any: DeepSpeed's stage 3 does."""
    zero: Any = getattr(getattr(engine, "_engine", None), "optimizer", None)
    if hasattr(zero, "grad_partitions_flat_buffer"):
        yield zero.grad_partitions_flat_buffer
        for bucket in zero.ipg_buckets.values():
            yield bucket.buffer


def _build(device: str = "cpu") -> torch.nn.Module:
    with torch.device(device):
        return build_model(MODEL, SHAPE)


def deviations(case: Case, measured: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What is measured -> (bytes, bytes of the engine's formula)."""
    return _pairs(record(case, measured))


def _pairs(one: dict[str, Any]) -> dict[str, tuple[float, float]]:
    stated = one["stated"]
    pairs = {name: (one[name], stated[name]) for name in _MEMORY}
    for operation in stated["traffic"].keys() | one["traffic"].keys():
        pairs[operation] = (one["traffic"].get(operation, 0), stated["traffic"].get(operation, 0.0))
    return pairs


def within_tolerance(size: float, stated: float, whole: float) -> bool:
    """Within 3 % of the formula; where that is zero, nothing but scalars."""
    return abs(size - stated) <= (TOLERANCE * stated if stated else 1e-4 * whole)


def formula(case: Case, sizes: list[int]) -> Footprint:
    return footprint(case.parallel, OPTIMIZER, parameter_sizes=sizes, world_size=case.world_size)


def paper_bytes(zero_stage: int, elements: int, shards: int) -> float:
    """Held per rank with mixed precision and Adam, K = 12 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054,
    figure 1)."""
    sixteen_bit, state = 2 * elements, 12 * elements
    held = {
        0: 2 * sixteen_bit + state,
        1: 2 * sixteen_bit + state / shards,
        2: sixteen_bit + (sixteen_bit + state) / shards,
        3: (2 * sixteen_bit + state) / shards,
    }
    return held[zero_stage]


def moved_elements(traffic: dict[str, float], elements: int) -> float:
    """In units of P, as the paper counts (its section 7): an all-reduce moves each element twice."""
    return sum((2 if operation == "allreduce" else 1) * size for operation, size in traffic.items()) / (4 * elements)


def table(results: dict[str, Any]) -> str:
    """The page that shows what footprint.json holds."""
    lines = [
        "# Memory and traffic per rank",
        "",
        results["measured"],
        "",
        f"A GPT of {results['cases'][0]['elements']:,} parameters (P), fp32 master weights, AdamW, one micro-batch per rank,",
        "gloo. MiB, measured / by the engine's formula (`distrib/footprint.py`). Traffic is the payload of a step's collectives,",
        "and dtype that of all that travels but scalars. The last columns stand beside the ZeRO paper's.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|---|{'---:|' * (len(_COLUMNS) - 1)}",
    ]
    for one in results["cases"]:
        case = Case(*(one[field.name] for field in fields(Case)))
        elements = one["elements"]
        pairs = _pairs(one)
        memory = [_pair(*pairs[name]) for name in _MEMORY]
        traffic = [_pair(*pairs.get(name, (0, 0))) for name in _TRAFFIC]
        held = sum(pairs[name][0] for name in _MEMORY) / elements
        paper = paper_bytes(case.zero_stage, elements, count_shards(case.parallel, case.world_size)) / elements
        moved = moved_elements(one["traffic"], elements)
        compared = [f"{held:.2f}", f"{paper:.2f}", f"{moved:.2f}", "3" if case.zero_stage == 3 else "2"]
        lines.append(f"| {' | '.join([case.name, *memory, *traffic, _dtypes(one), *compared])} |")
    return "\n".join([*lines, "", EXPLANATION])


_MEMORY = ("parameters", "gradients", "optimizer")
_TRAFFIC = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
_COLUMNS = (
    "", "parameters", "gradients", "optimizer", *_TRAFFIC.values(), "dtype",
    "bytes held / P", "paper", "elements moved / P", "paper",
)  # fmt: skip
EXPLANATION = """\
Where this differs from the paper's 16 P bytes and 2 P (stages 0 to 2) or 3 P (stage 3) elements:

* Weights and gradients are fp32 and autocast makes bf16 copies where they are used, so there is one copy of the weights, not a
  16-bit one beside the master: 4 + 4 + 8 bytes per parameter, the paper's 2 + 2 + 12. What travels has 4 bytes an element
  where the paper's has 2.
* native keeps shards of the weights alone between steps at stages 1 and 2, too; during the forward and the backward pass
  whole weights (4 P bytes) are there in addition, and at stage 1 with accumulation whole gradients (4 P). At stage 3 it is
  a block's.
* deepspeed's stages 1 and 2 keep whole weights (4 P), and on N ranks a copy of the part that a rank updates (4 P / N), since
  DeepSpeed takes the others for the low-precision ones. The rank's part of the gradient is there twice when the optimizer
  begins, flat and as it was received (8 P / N), and a parameter that the part's border cuts is held whole (0.12 P at world 2,
  0.19 P at world 4). With the moments (8 P / N) that is 4 + 2 + 4 + 0.12 + 4 = 14.12 at world 2. Both stages all-reduce the
  gradient and gather the updated weights: 3 P elements.
* deepspeed's stage 3 keeps a rank's part of the weights, the copy of it that is updated and two of the gradient (4 P / N each),
  the moments (8 P / N) and one bucket for gradients, which is as large as the model but at most 50 million elements (4 P
  here): 2 + 2 + 4 + 4 + 4 = 16 at world 2. It gathers weights once as long as all of them may stay until the backward pass (a
  billion elements): 2 P elements. The int64 broadcast is of the order in which modules and parameters are used, which the
  ranks compare once, in the first step after the dry run.
* With replicas, memory is divided by the ranks of one copy, and a rank's part of the gradient is all-reduced between copies.
"""


def _pair(size: float, stated: float) -> str:
    return f"{size / 2**20:,.1f} / {stated / 2**20:,.1f}" if stated or size > 1e5 else ""


def _dtypes(one: dict[str, Any]) -> str:
    """Of each collective, where they are not all of one."""
    dtypes = one["dtypes"]
    if len({tuple(kinds) for kinds in dtypes.values()}) == 1:
        return " and ".join(next(iter(dtypes.values())))
    told = []
    for operation, kinds in dtypes.items():
        size = "" if operation in _TRAFFIC else f" ({one['traffic'][operation]:,} bytes)"
        told.append(f"{_TRAFFIC.get(operation, operation)} {' and '.join(kinds)}{size}")
    return ", ".join(told)


def record(case: Case, measured: dict[str, Any]) -> dict[str, Any]:
    """A case as footprint.json holds it."""
    sizes = measured["sizes"]
    measured = {key: value for key, value in measured.items() if key != "sizes"}
    return {**asdict(case), **measured, "elements": sum(sizes), "stated": asdict(formula(case, sizes))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "accelerate"))
    machine = device()
    results = {
        "measured": f"`python benchmarks/footprint.py`, {datetime.date.today()}, {machine}, {versions}",
        "cases": [record(case, measure(case)) for case in cases()],
    }
    text = table(results)
    output.mkdir(exist_ok=True)
    (output / "footprint.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "footprint.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
