"""What the lockstep matrix runs: a small GPT and a small ResNet through the real stream, loop and engines, and the same in
float64 by PyTorch alone.

The global batch has 31 samples, a prime: every world size but one cuts it into ragged parts, and with 1, 2 or 4
micro-batches per rank many of these are fillers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from data.plan import Plan, Segment, StreamPart
from data.samples import DatasetFacts
from data.stream import Stream
from distrib.capabilities import count_shards
from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from distrib.engine import Engine, EngineSetup
from distrib.engines import make_engine
from distrib.initialisation import make_initialised_model
from distrib.world import World, world_of_group
from launch.ledger import Ledger
from launch.loop import Hooks, Intervals, train
from launch.meter import Meter
from models.build import InputShape, build_model
from models.config import ResNetConfig, TaskConfig, TransformerConfig
from models.tasks import build_task

STEPS = 20
SEED = 3
GLOBAL_SAMPLES = 31
DATASET_SAMPLES = 1024
CONSTANT = ScheduleConfig(kind="constant")
OPTIMIZERS = {
    # Clips every step: the gradient's norm is above it throughout.
    "adamw": OptimizerConfig(lr=1e-3, clip_norm=0.25),
    "sgd": OptimizerConfig(kind="sgd", lr=1e-3, clip_norm=None, weight_decay=0.01),
}


# By default DeepSpeed keeps the parameters of a model as small as ours whole at stage 3, and one bucket holds them all.
SMALL_PARTS = Path(__file__).with_name("deepspeed_small_parts.json")


class Curve(NamedTuple):
    """A run: what each step reported, and the digest of all that was read."""

    losses: list[float]
    gradient_norms: list[float]
    digest: str


@dataclass(frozen=True)
class Layout:
    """An engine, how it divides the state, and how many ranks it runs on."""

    engine: str
    zero_stage: int
    world_size: int
    replicas: int = 1

    @property
    def name(self) -> str:
        hybrid = f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.engine}, ZeRO {self.zero_stage}{hybrid}"


class GptSamples:
    """Sequences over three of 61 tokens, most of them masked to a ragged length: the first has one target, some have all."""

    address = "gpt"
    fingerprint = "gpt"
    samples = DATASET_SAMPLES
    shard_samples = np.array([DATASET_SAMPLES])
    mixes = False
    packing_identity = None
    looks_ahead_samples = 0
    sequence_tokens, vocabulary_size = 12, 61
    sample_bytes = 13 * 8 + 12
    facts = DatasetFacts(kind="tokens", vocabulary_size=vocabulary_size, sequence_tokens=sequence_tokens)
    model = TransformerConfig(layers=2, width=64, heads=2, tied_embeddings=True)
    task = build_task(TaskConfig(kind="language_modelling"))
    shape = InputShape(vocabulary_size=vocabulary_size, sequence_tokens=sequence_tokens)

    def __init__(self) -> None:
        positions = np.arange(self.sequence_tokens + 1)
        self._tokens = (7 + 20 * ((np.arange(self.samples)[:, None] + positions * positions) % 3)).astype(np.int64)
        lengths = 1 + np.arange(self.samples) ** 2 % self.sequence_tokens
        self._mask = positions[:-1] < lengths[:, None]

    def gather(self, sample_ids: Any, choices: Any = None) -> Any:
        fields = {"tokens": self._tokens[sample_ids], "loss_mask": self._mask[sample_ids]}
        return fields, hashes_of(self._tokens[sample_ids])

    def reference_losses(self, model: nn.Module, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Sum of losses (float64) and number of items."""
        targets = fields["tokens"][:, 1:].masked_fill(~fields["loss_mask"], -100)
        logits = model(fields["tokens"][:, :-1])  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), int((targets >= 0).sum())


class DigitSamples:
    """Noisy 8 x 8 images whose class is the row that is bright; a quarter of the labels are wrong, so that the loss stays
    large enough to be compared in relative terms.

    The network's activation is smooth. At ReLU's kink two runs that differ in a last bit now and then take different branches,
    and their curves part by far more than rounding: in any framework, between any two orders of summation.
    """

    address = "digits"
    fingerprint = "digits"
    samples = DATASET_SAMPLES
    shard_samples = np.array([DATASET_SAMPLES])
    mixes = False
    packing_identity = None
    looks_ahead_samples = 0
    sample_bytes = 64 + 8
    facts = DatasetFacts(kind="images", classes=8, channels=1, image_size_pixels=8)
    sequence_tokens = None
    model = ResNetConfig(layers=8, norm="group", activation="silu")
    task = build_task(TaskConfig(kind="classification"), classes=8)
    shape = InputShape(channels=1, image_size_pixels=8, classes=8)

    def __init__(self) -> None:
        generator = np.random.Generator(np.random.PCG64(5))
        self._images = generator.integers(0, 40, (self.samples, 1, 8, 8), dtype=np.uint8)
        self._labels = np.arange(self.samples, dtype=np.int64) % 8
        self._images[np.arange(self.samples), 0, self._labels] += 200
        wrong = generator.random(self.samples) < 0.25
        self._labels = np.where(wrong, generator.integers(0, 8, self.samples), self._labels)

    def gather(self, sample_ids: Any, choices: Any = None) -> Any:
        fields = {"images": self._images[sample_ids], "labels": self._labels[sample_ids]}
        return fields, hashes_of(self._images[sample_ids])

    def reference_losses(self, model: nn.Module, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Sum of losses (float64) and number of items."""
        logits = model((fields["images"].double() / 255 - 0.5) / 0.5)  # (B, classes)
        return F.cross_entropy(logits, fields["labels"], reduction="sum"), len(logits)


DATASETS = {"gpt": GptSamples, "resnet": DigitSamples}


def hashes_of(rows: Any) -> Any:
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(row).data) for row in rows], dtype=np.uint64)


def plan_of(dataset: Any) -> Plan:
    segment = Segment(
        start_position=0,
        streams=(StreamPart(fingerprint=dataset.fingerprint, sequence_tokens=dataset.sequence_tokens),),
        seed=SEED,
        global_samples=GLOBAL_SAMPLES,
    )
    return Plan.of([segment])


def micro_samples_of(world_size: int, accumulation: int) -> int:
    """The size that gives every rank so many micro-batches, fillers included."""
    micro_samples = math.ceil(math.ceil(GLOBAL_SAMPLES / world_size) / accumulation)
    assert math.ceil(math.ceil(GLOBAL_SAMPLES / world_size) / micro_samples) == accumulation
    return micro_samples


def laid_out(world: World, parallel: ParallelConfig) -> World:
    """The same ranks with the mesh that the recipe asks for."""
    if world.size == 1:
        return world
    shards = count_shards(parallel, world.size)
    return world_of_group(world.local_rank, world.device, timedelta(seconds=60), shards)


def lockstep_curves(
    world: World, layout: Layout, kind: str, optimizer: str, precision: str, accumulations: tuple[int, ...]
) -> dict[int, Curve]:
    """Micro-batches per rank -> curve. Every rank calls it."""
    return {
        accumulation: lockstep_curve(world, layout, kind, optimizer, accumulation, precision)
        for accumulation in accumulations
    }


def lockstep_curve(
    world: World, layout: Layout, kind: str, optimizer: str, accumulation: int, precision: str, **options: Any
) -> Curve:
    """Every rank calls it. `options`: as `lockstep_engine` takes them."""
    return take_steps(lockstep_engine(world, layout, kind, optimizer, precision, **options), kind, accumulation)


def lockstep_engine(
    world: World,
    layout: Layout,
    kind: str,
    optimizer: str,
    precision: str = "fp32",
    make: Callable[[EngineSetup], Engine] = make_engine,
    **options: Any,
) -> Engine:
    """`make`: what is to be tested, if not the engine of the layout; `options`: further keys of the recipe's parallel section."""
    if layout.engine == "deepspeed":
        options = {"deepspeed_config": SMALL_PARTS, **options}
    parallel = ParallelConfig(
        engine=layout.engine,
        zero_stage=layout.zero_stage,
        replicas=layout.replicas if layout.replicas > 1 else None,
        precision=precision,
        **options,
    )
    dataset = DATASETS[kind]()
    setup = EngineSetup(
        lambda: build_model(dataset.model, dataset.shape),
        dataset.task.loss,
        laid_out(world, parallel),
        optimizer=OPTIMIZERS[optimizer],
        schedule=CONSTANT,
        parallel=parallel,
        steps=STEPS,
        seed=SEED,
    )
    return make(setup)


def take_steps(engine: Engine, kind: str, accumulation: int, steps: int = STEPS) -> Curve:
    """The next steps of a run whose engine has taken some already."""
    dataset, world = DATASETS[kind](), engine.world
    stream = Stream(
        {"": dataset},
        plan_of(dataset),
        rank=world.data_rank,
        world_size=world.data_size,
        micro_samples=micro_samples_of(world.size, accumulation),
        position=engine.steps_done * GLOBAL_SAMPLES,
        stop_position=(engine.steps_done + steps) * GLOBAL_SAMPLES,
        count_items=dataset.task.items,
        reduce_items=world.sum_in_prefetch_thread if world.size > 1 else None,
        prefetch_steps=4,
    )
    records: list[dict[str, Any]] = []
    ledger = Ledger()
    try:
        batches = iter(stream)
        first = next(batches)
        engine.dry_run(first.micro_batches[0])
        train(
            engine,
            (batch for source in ([first], batches) for batch in source),
            ledger,
            world=world,
            meter=Meter(world.device, flops_per_item=None, peak_flops=None, ranks=world.size),
            intervals=Intervals(save_every_steps=None, evaluate_every_steps=None),
            hooks=Hooks(records.append, lambda: None, lambda: None, lambda: False, lambda data_wait_seconds: None),
        )
    finally:
        stream.close()
    assert len(records) == steps
    assert not any(record["skipped"] for record in records)
    return Curve([r["loss"] for r in records], [r["gradient_norm"] for r in records], ledger.digest)


def reference_curve(kind: str, optimizer: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same run in float64: one process, one batch, PyTorch's plain optimizers."""
    dataset = DATASETS[kind]()
    config = OPTIMIZERS[optimizer]
    model = make_initialised_model(
        lambda: build_model(dataset.model, dataset.shape), SEED, torch.device("cpu")
    ).double()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    update: torch.optim.Optimizer
    if config.kind == "adamw":
        update = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.epsilon, foreach=False)
    else:
        update = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=False)
    losses, norms = [], []
    plan = plan_of(dataset)
    alone = Stream(
        {"": dataset}, plan, rank=0, world_size=1, micro_samples=GLOBAL_SAMPLES, position=0,
        stop_position=STEPS * GLOBAL_SAMPLES, count_items=dataset.task.items,
    )  # fmt: skip
    for step in alone:
        total, items = dataset.reference_losses(model, dict(step.micro_batches[0].tensors))
        update.zero_grad()
        (total / items).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf, foreach=False)
        update.step()
        losses.append(total.item() / items)
        norms.append(norm.item())
    return losses, norms
