"""The native engine: plain PyTorch at world 1, replicated (DDP) or sharded (FSDP2) parameters over more ranks."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrib.blocks import prepare_blocks
from distrib.config import OptimizerConfig, ScheduleConfig
from distrib.engine import CanonicalState, EvaluationFunction, LossFunction, MicroBatch, StepResult
from distrib.initialisation import make_initialised_model, make_sharded_model
from distrib.keys import key64
from distrib.model_state import model_tensors
from distrib.optimizer import make_optimizer, set_updates_done, state_tensors, updates_done
from distrib.schedule import learning_rate
from distrib.sharding import like, local, settle, shard
from distrib.world import World


class NativeEngine:
    """An `Engine` over plain PyTorch: at ZeRO stage 0 every rank holds the whole model, at stages 2 and 3 a shard of it.

    The optimizer always works on this rank's plain tensors: its kernels are the same, and as fast, with and without
    sharding.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        loss: LossFunction,
        *,
        world: World,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        steps: int,
        seed: int,
        precision: str,
        zero_stage: int = 0,
        activation_checkpointing: str = "none",
        compile_blocks: bool = False,
    ) -> None:
        self.world = world
        self._loss = loss
        self._schedule = schedule
        self._peak_lr = optimizer.lr
        self._clip_norm = optimizer.clip_norm
        self._steps = steps
        self._seed = seed
        self._autocast_dtype = torch.bfloat16 if precision == "bf16" else None
        self._sharded = zero_stage > 0 and world.size > 1
        prepare = functools.partial(
            prepare_blocks, activation_checkpointing=activation_checkpointing, compile_blocks=compile_blocks
        )

        def prepare_and_shard(module: nn.Module) -> None:
            prepare(module)
            shard(module, world, zero_stage)

        if self._sharded:
            self._module = make_sharded_model(make_model, seed, world.device, prepare_and_shard)
            settle(self._module)
        else:
            self._module = make_initialised_model(make_model, seed, world.device)
            prepare(self._module)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._replicated: nn.Module = self._module
        if world.size > 1 and not self._sharded:
            self._replicated = _replicate(self._module, world)
        self._local = self._parameters
        if self._sharded:
            self._local = [nn.Parameter(local(parameter.detach())) for parameter in self._parameters]
        self._optimizer = make_optimizer(optimizer, self._local)
        self._optimizer_kind = optimizer.kind
        self.steps_done = 0

    @property
    def module(self) -> nn.Module:
        return self._module

    def dry_run(self, micro_batch: MicroBatch) -> None:
        buffers = [buffer.clone() for buffer in self._module.buffers()]
        if isinstance(self._replicated, DistributedDataParallel):
            self._find_unused(micro_batch)
        # DDP lays its buckets out anew after the first backward of an attempt, which changes the order of summation: that
        # must happen here, or a resumed run would not repeat the bytes.
        self._forward_backward(micro_batch, scale=0.0)
        self._module.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _find_unused(self, micro_batch: MicroBatch) -> None:
        """DDP waits for the gradient of every parameter, unless it is told to look each time for those without one."""
        with self._without_communication():
            self._forward_backward(micro_batch, scale=0.0)
        if any(parameter.grad is None for parameter in self._parameters):
            self._replicated = _replicate(self._module, self.world, find_unused_parameters=True)
        self._module.zero_grad()

    def step(self, micro_batches: Sequence[MicroBatch], items: int) -> StepResult:
        # The sum of losses over the global batch, divided by its items (law 2): DDP averages over ranks, so multiply by
        # their number first.
        scale = self.world.data_size / items
        losses = []
        for micro_batch in micro_batches[:-1]:
            with self._without_communication():
                losses.append(self._forward_backward(micro_batch, scale))
        losses.append(self._forward_backward(micro_batches[-1], scale))
        loss_sum = torch.stack(losses).sum(dtype=torch.float64)
        norm, skipped = self._clip()
        lr = learning_rate(self._schedule, self._peak_lr, self.steps_done, self._steps)
        self._update(lr, skipped)
        self.steps_done += 1
        return StepResult(loss_sum, norm, skipped, lr)

    def evaluate(self, function: EvaluationFunction, micro_batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        self._share_buffers()
        self._module.eval()
        try:
            with torch.no_grad(), self._autocast():
                for micro_batch in micro_batches:
                    for name, value in function(self._module, self._to_device(micro_batch)).items():
                        # A filler repeats a sample of another rank: it must not count, not even as NaN.
                        counted = value if micro_batch.weight else torch.zeros_like(value)
                        sums[name] = sums[name] + counted if name in sums else counted
        finally:
            self._module.train()
        if self.world.size > 1:
            for name in sorted(sums):
                dist.all_reduce(sums[name], group=self.world.data_group)
        return sums

    def canonical_state(self) -> CanonicalState:
        self._share_buffers()
        tensors = model_tensors(self._module)
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        for (name, parameter), part in zip(trained, self._local, strict=True):
            for state, tensor in state_tensors(self._optimizer, part).items():
                tensors[f"optimizer.{state}.{name}"] = like(tensor, parameter)
        scalars = {
            "steps_done": self.steps_done,
            "optimizer_kind": self._optimizer_kind,
            "optimizer_updates": updates_done(self._optimizer),
        }
        return CanonicalState(tensors, scalars)

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.steps_done = int(scalars["steps_done"])
        set_updates_done(self._optimizer, int(scalars["optimizer_updates"]))

    def _forward_backward(self, micro_batch: MicroBatch, scale: float) -> torch.Tensor:
        """Adds the micro-batch's gradient, times `scale`; returns the sum of its losses, detached."""
        self._reseed(micro_batch.first_position)
        if not micro_batch.weight:
            self._module.eval()  # a filler leaves no trace, in running statistics neither
        with self._autocast():
            total = self._loss(self._replicated, self._to_device(micro_batch)).total
        if not micro_batch.weight:
            self._module.train()
        (total * (scale * micro_batch.weight)).backward()
        return total.detach() if micro_batch.weight else torch.zeros_like(total)

    def _clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips to the global norm; returns (norm before clipping, 1.0 if it is not finite), both on the device."""
        if self._sharded:
            for parameter, part in zip(self._parameters, self._local, strict=True):
                part.grad = None if parameter.grad is None else local(parameter.grad)
        gradients = [p.grad for p in self._local if p.grad is not None]
        # What get_total_norm and clip_grads_with_norm_ of torch.nn.utils compute, without their sorting by device and
        # dtype, which on a CPU takes longer than the norms of a small model.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._sharded:
            assert self.world.mesh is not None
            squared = norm.square()
            dist.all_reduce(squared, group=self.world.mesh.get_group("shard"))
            norm = squared.sqrt()
        if self._clip_norm is not None:
            torch._foreach_mul_(gradients, (self._clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm, torch.isfinite(norm).logical_not().float()

    def _update(self, lr: float, skipped: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The fused kernels leave weights, state and update count alone where `found_inf` is 1: a skip without a host sync.
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self._optimizer.step()
        for parameter in (
            *self._parameters,
            *self._local,
        ):  # as zero_grad does, without its sorting and its entry in a profile
            parameter.grad = None

    def _share_buffers(self) -> None:
        """The run's running statistics are rank 0's: training never reads them, what is evaluated and saved does."""
        if self.world.size > 1:
            for buffer in self._module.buffers():
                dist.broadcast(buffer, src=0, group=self.world.data_group)

    def _reseed(self, first_position: int) -> None:
        # Stateless randomness (law 4). 63 bits: what every generator takes.
        seed = key64("forward", self._seed, self.steps_done, first_position) >> 1
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _to_device(self, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
        device = self.world.device
        if device.type == "cpu":
            return dict(micro_batch.tensors)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.tensors.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        # Its cache would keep a copy of every weight that sharding frees after use.
        return torch.autocast(self.world.device.type, dtype=self._autocast_dtype, cache_enabled=not self._sharded)

    def _without_communication(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self._replicated, DistributedDataParallel):
            return self._replicated.no_sync()
        return contextlib.nullcontext()


def _replicate(module: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    # A convolution with one input channel has two equal descriptions of its strides; DDP warns that they differ.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # Newer versions rename `broadcast_buffers`; the oldest supported one knows no other name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        # Buffers are not broadcast: a step must not depend on rank 0's running statistics.
        return DistributedDataParallel(
            module,
            process_group=world.data_group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            find_unused_parameters=find_unused_parameters,
        )
