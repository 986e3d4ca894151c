"""What every engine does alike: the order of a step, the forward pass of a micro-batch, and evaluation."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrib.copies import Copies
from distrib.engine import EngineSetup, EvaluationFunction, MicroBatch, StepResult
from distrib.gradients import clip_gradients
from distrib.keys import key64
from distrib.loss_scaling import LossScaler
from distrib.optimizer import set_learning_rate, set_updates_done, updates_done
from distrib.pace import Pace
from distrib.phases import enter
from distrib.schedule import learning_rate

_AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineBase(ABC):
    """An engine without its backward pass and update. Master weights are fp32 and products are computed in the recipe's
    precision by autocast, in every engine: one arithmetic."""

    _module: nn.Module
    """The model itself."""
    _forward_module: nn.Module
    """What a training forward pass goes through: the model, or the engine's wrapper around it."""
    _optimizer: torch.optim.Optimizer
    _keep_casts = True
    """Whether autocast may keep a weight's low-precision copy between its uses in one forward pass."""

    def __init__(self, setup: EngineSetup) -> None:
        self.world = setup.world
        self._loss = setup.loss
        self._schedule = setup.schedule
        self._peak_lr = setup.optimizer.lr
        self._clip_norm = setup.optimizer.clip_norm
        self._steps = setup.steps
        self._seed = setup.seed
        self._autocast_dtype = _AUTOCAST_DTYPES[setup.parallel.precision]
        self._scaler = LossScaler(setup.world.device) if setup.parallel.precision == "fp16" else None
        self.steps_done = 0
        self._running_statistics: list[torch.Tensor] = []
        """The buffers that a training forward pass alters; known from the dry run on."""
        self.pace = Pace(setup.world.device)
        self._stream_losses: list[torch.Tensor] = []
        if setup.world.device.type == "cuda":
            # PyTorch would convolve in TF32, which rounds to 10 bits, without being asked.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self._module.parameters())

    def step(self, micro_batches: Sequence[MicroBatch], items: int) -> StepResult:
        # The sum of losses over the global batch, divided by its items (law 2). Whatever sums the gradients divides them by
        # the number of ranks: multiply by it first.
        self._stream_losses = []
        statistics = [buffer.clone() for buffer in self._running_statistics]
        losses = self._accumulate(micro_batches, scale=self.world.data_size / items)
        lr = learning_rate(self._schedule, self._peak_lr, self.steps_done, self._steps)
        set_learning_rate(self._optimizer, lr)
        norm, skipped = self._update()
        self._take_back(statistics, skipped)
        if self._scaler is not None:
            self._scaler.update(skipped)
        self.steps_done += 1
        by_stream = torch.stack(self._stream_losses).sum(dim=0) if self._stream_losses else None
        return StepResult(torch.stack(losses).sum(dtype=torch.float64), norm, skipped, lr, by_stream)

    def _accumulate(self, micro_batches: Sequence[MicroBatch], scale: float) -> list[torch.Tensor]:
        """Adds up the gradients of the micro-batches, times `scale` and the loss scale, over all ranks; returns this rank's
        sums of losses, detached."""
        return [
            self._forward_backward(micro_batch, scale, last=number == len(micro_batches))
            for number, micro_batch in enumerate(micro_batches, start=1)
        ]

    @abstractmethod
    def _forward_backward(self, micro_batch: MicroBatch, scale: float, *, last: bool) -> torch.Tensor:
        """Adds the micro-batch's gradient, times `scale` and the loss scale, and sums it over the ranks if it is the step's
        `last`; returns the sum of its losses, detached."""

    @abstractmethod
    def copies(self) -> Copies | None: ...

    @abstractmethod
    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and updates, and forgets the gradients; returns (global norm before clipping, 1.0 if the step was skipped),
        both on the device."""

    def _clip(
        self, parameters: Iterable[nn.Parameter], shard_group: Any | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Undoes loss scaling and clips to the global norm; returns (norm before clipping, 1.0 if it is not finite)."""
        enter("reduce")
        return clip_gradients(
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            clip_norm=self._clip_norm,
            loss_scale=None if self._scaler is None else self._scaler.scale,
            shard_group=shard_group,
        )

    def _scaled(self, total: torch.Tensor, scale: float, micro_batch: MicroBatch) -> torch.Tensor:
        """What the backward pass starts from. A filler's is zero."""
        scaled = total * (scale * micro_batch.weight)
        return scaled if self._scaler is None else scaled * self._scaler.scale

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

    def _scalars(self) -> dict[str, Any]:
        """The scalars of the canonical form."""
        scalars: dict[str, Any] = {
            "steps_done": self.steps_done,
            "optimizer_updates": updates_done(self._optimizer),
        }
        if self._scaler is not None:
            scalars["loss_scaler"] = self._scaler.as_scalars()
        return scalars

    def _load_scalars(self, scalars: Mapping[str, Any]) -> None:
        self.steps_done = int(scalars["steps_done"])
        set_updates_done(self._optimizer, int(scalars["optimizer_updates"]))
        # A run that changes to fp16 has none yet, and starts from the first scale.
        if self._scaler is not None and "loss_scaler" in scalars:
            self._scaler.load_scalars(scalars["loss_scaler"])

    def _forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        """The sum of a micro-batch's losses, with gradient."""
        enter("forward", self.steps_done)
        self._reseed(micro_batch.first_position)
        if not micro_batch.weight:
            self._module.eval()  # a filler leaves no trace, in running statistics neither
        rows = len(next(iter(micro_batch.tensors.values())))
        with self._autocast(), self.pace.of_forward(rows):
            loss = self._loss(self._forward_module, self._to_device(micro_batch))
        if micro_batch.streams is not None:
            self._stream_losses.append(self._by_stream(loss.per_sample, micro_batch))
        if not micro_batch.weight:
            self._module.train()
        return loss.total

    def _by_stream(self, per_sample: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """(streams,) float64: the sums of the losses (n,) of each stream's samples; a filler's are zero."""
        assert micro_batch.streams is not None
        sums = torch.zeros(micro_batch.stream_count, dtype=torch.float64, device=per_sample.device)
        if not micro_batch.weight:
            return sums
        return sums.index_add_(0, micro_batch.streams.to(per_sample.device, non_blocking=True), per_sample.double())

    @contextlib.contextmanager
    def _restoring_buffers(self) -> Iterator[None]:
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        yield
        # By their values: batch norm alters its statistics behind the back of their version counters.
        self._running_statistics = [buffer for buffer, before in buffers if not torch.equal(buffer, before)]
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    @torch.no_grad()
    def _take_back(self, before: list[torch.Tensor], skipped: torch.Tensor) -> None:
        """What a step that is skipped has seen is no number, and running statistics would never forget it."""
        for buffer, earlier in zip(self._running_statistics, before, strict=True):
            buffer.copy_(torch.where(skipped > 0, earlier, buffer))

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
        return torch.autocast(self.world.device.type, dtype=self._autocast_dtype, cache_enabled=self._keep_casts)
