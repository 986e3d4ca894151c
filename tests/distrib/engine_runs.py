"""Small training runs for engine tests: a tiny GPT on ragged masks, under any engine or a float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrib import engines
from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from distrib.engine import Engine, EngineSetup
from distrib.initialisation import make_initialised_model
from distrib.native import NativeEngine
from distrib.reduction import report_step
from distrib.world import World
from models.build import InputShape, build_model
from models.config import TaskConfig, TransformerConfig
from models.tasks import build_task

STEPS = 12
SEED = 3
VOCABULARY, SEQUENCE_TOKENS = 61, 12
MODEL = TransformerConfig(layers=2, width=32, heads=2)
SHAPE = InputShape(vocabulary_size=VOCABULARY, sequence_tokens=SEQUENCE_TOKENS)
TASK = build_task(TaskConfig(kind="language_modelling"))
ADAMW_CLIPPED = OptimizerConfig(lr=1e-3, clip_norm=0.5)
SGD_UNCLIPPED = OptimizerConfig(kind="sgd", lr=1e-3, clip_norm=None, weight_decay=0.01)
CONSTANT = ScheduleConfig(kind="constant")

# (loss, gradient norm before clipping) of every step
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Batch:
    tensors: dict[str, torch.Tensor]
    first_position: int
    weight: float = 1.0
    fold: int = 0
    streams: torch.Tensor | None = None
    stream_count: int = 1


def global_batch(step: int, samples: int = 7) -> dict[str, torch.Tensor]:
    """Learnable tokens under very ragged masks: the first sample has one target, the last has all."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(VOCABULARY, (samples, 1), generator=generator)
    tokens = (start + 3 * torch.arange(SEQUENCE_TOKENS + 1)) % VOCABULARY
    lengths = torch.linspace(1, SEQUENCE_TOKENS, samples).long()
    return {"tokens": tokens, "loss_mask": torch.arange(SEQUENCE_TOKENS) < lengths[:, None]}


def share_of(
    batch: Mapping[str, torch.Tensor], step: int, rank: int, world_size: int, micro_samples: int
) -> list[Batch]:
    """This rank's micro-batches of a global batch, cut as the stream cuts them."""
    samples = len(batch["tokens"])
    start, stop = samples * rank // world_size, samples * (rank + 1) // world_size
    count = math.ceil(math.ceil(samples / world_size) / micro_samples)
    micro_batches = []
    for first in (start + number * micro_samples for number in range(count)):
        filler = first >= stop
        rows = slice(0, 1) if filler else slice(first, min(first + micro_samples, stop))
        tensors = {name: tensor[rows] for name, tensor in batch.items()}
        micro_batches.append(Batch(tensors, step * samples + rows.start, weight=0.0 if filler else 1.0))
    return micro_batches


def make_engine(
    world: World,
    optimizer: OptimizerConfig,
    engine_class: Callable[[EngineSetup], Any] = engines.make_engine,
    model: TransformerConfig = MODEL,
    precision: str = "fp32",
    zero_stage: int = 0,
    **options: Any,
) -> Any:
    parallel = ParallelConfig(precision=precision, zero_stage=zero_stage, **options)
    return engine_class(
        EngineSetup(
            lambda: build_model(model, SHAPE),
            TASK.loss,
            world,
            optimizer=optimizer,
            schedule=CONSTANT,
            parallel=parallel,
            steps=STEPS,
            seed=SEED,
        )
    )


def take_step(engine: Engine, step: int, micro_samples: int) -> tuple[float, float]:
    world = engine.world
    batch = global_batch(step)
    items = TASK.items(batch)
    micro_batches = share_of(batch, step, world.data_rank, world.data_size, micro_samples)
    result = engine.step(micro_batches, items)
    report = report_step(result, fold=0, stop_requested=False, data_wait_seconds=0.0, world=world).read()
    return report.loss_sum / items, report.gradient_norm


def curve(
    world: World,
    optimizer: OptimizerConfig,
    micro_samples: int,
    engine_class: Callable[[EngineSetup], Any] = engines.make_engine,
    model: TransformerConfig = MODEL,
    precision: str = "fp32",
    zero_stage: int = 0,
    **options: Any,
) -> Curve:
    engine = make_engine(world, optimizer, engine_class, model, precision, zero_stage, **options)
    engine.dry_run(share_of(global_batch(0), 0, 0, 1, micro_samples)[0])
    return [take_step(engine, step, micro_samples) for step in range(STEPS)]


def reference_curve(optimizer: OptimizerConfig) -> Curve:
    """The same run in float64: one process, one batch, PyTorch's plain optimizers."""
    model = make_initialised_model(lambda: build_model(MODEL, SHAPE), SEED, torch.device("cpu")).double()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    undecayed = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    update: torch.optim.Optimizer
    if optimizer.kind == "adamw":
        update = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.epsilon, foreach=False)
    else:
        update = torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, foreach=False)
    points: Curve = []
    for step in range(STEPS):
        batch = global_batch(step)
        logits = model(batch["tokens"][:, :-1]).double()
        targets = batch["tokens"][:, 1:].masked_fill(~batch["loss_mask"], -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        update.zero_grad()
        loss.backward()
        norm = torch.sqrt(
            sum((p.grad.square().sum() for p in model.parameters() if p.grad is not None), torch.tensor(0.0))
        )
        if optimizer.clip_norm is not None and norm > optimizer.clip_norm:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(optimizer.clip_norm / norm)
        update.step()
        points.append((loss.item(), norm.item()))
    return points


class HalvedGradient(NativeEngine):
    """A wrong engine: its gradient is half of what it should be."""

    def step(self, micro_batches, items):  # type: ignore[no-untyped-def]
        return super().step(micro_batches, 2 * items)


class MeanOfMeans(NativeEngine):
    """A wrong engine: each micro-batch's mean counts the same, however many items it has."""

    def step(self, micro_batches, items):  # type: ignore[no-untyped-def]
        self._count = len(micro_batches)
        return super().step(micro_batches, items)

    def _forward_backward(self, micro_batch, scale, *, last):  # type: ignore[no-untyped-def]
        with self._communication(last=last):
            loss = self._loss(self._forward_module, micro_batch.tensors)
            (loss.total / loss.items * micro_batch.weight / getattr(self, "_count", 1)).backward()
        return loss.total.detach().double() * micro_batch.weight


class PerRankClip(NativeEngine):
    """A wrong engine: each rank clips its own gradient before they are summed."""

    def _forward_backward(self, micro_batch, scale, *, last):  # type: ignore[no-untyped-def]
        return super()._forward_backward(micro_batch, scale, last=False)

    def _update(self):  # type: ignore[no-untyped-def]
        self._clip(self._parameters)
        for parameter in self._parameters:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world.data_size
        return super()._update()


class DecayOfAll(NativeEngine):
    """A wrong engine: biases and norms decay like matrices."""

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = setup.optimizer.weight_decay
