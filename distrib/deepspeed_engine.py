"""The deepspeed engine: ZeRO stages 0 to 3 and offload to the host by DeepSpeed, under the run's own arithmetic."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distrib.blocks import prepare_blocks
from distrib.copies import Copies, whole_copies
from distrib.deepspeed_config import make_deepspeed_config
from distrib.deepspeed_library import ending_of, load_deepspeed
from distrib.deepspeed_state import ShardedState
from distrib.engine import CanonicalState, EngineSetup, MicroBatch
from distrib.engine_base import EngineBase
from distrib.gradients import leave_out
from distrib.initialisation import make_initialised_model
from distrib.model_state import model_tensors
from distrib.optimizer import make_optimizer, state_tensors
from distrib.phases import enter
from distrib.world import before_leaving


class DeepSpeedEngine(EngineBase):
    """An `Engine` over `deepspeed.initialize`.

    Weights are fp32 to DeepSpeed and low precision is autocast's, as in every engine: 16 bytes per parameter for weights,
    gradients and AdamW's two moments, and 4 more for the copy of its part of the weights that DeepSpeed updates; all of
    it travels in fp32. DeepSpeed's own bf16 would keep 18 bytes, and round sums that other engines do not.

    Its norm and the choice to skip a step are read on the host, so that, unlike under the native engine, every step of
    stages 1 to 3 waits for the device. A parameter without gradient counts as one with the gradient zero: it decays.
    Where the dry run finds such parameters, stage 2 keeps whole gradients over the accumulation, as stage 1 does.
    A norm whose square overflows fp32 (gradients of 1e20) skips the step under the other engines and stages; stage 3 clips it.
    """

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        parallel = setup.parallel
        self._zero_stage = parallel.zero_stage
        # Autocast's copies would outlive the weights that stage 3 frees after use.
        self._keep_casts = self._zero_stage < 3
        deepspeed = load_deepspeed(setup.world)
        self._module = _make_model(deepspeed, setup)
        prepare_blocks(
            self._module, activation_checkpointing=parallel.activation_checkpointing, compile_blocks=parallel.compile
        )
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        # At stages 1 to 3 DeepSpeed replaces the optimizer's parameters by its part of them: state is made after that.
        self._optimizer = make_optimizer(
            setup.optimizer,
            self._parameters,
            axes_of=lambda parameter: len(getattr(parameter, "ds_shape", parameter.shape)),
            with_state=not self._zero_stage,
        )
        self._run_in_precision()
        config = make_deepspeed_config(parallel, setup.optimizer, self.parameter_count)
        self._engine, *_ = deepspeed.initialize(model=self._module, optimizer=self._optimizer, config=config)
        before_leaving(ending_of(self._engine))
        self._forward_module = _OutsideAutocast(self._engine, setup.world.device.type)
        self._sharded: ShardedState | None = None
        if self._zero_stage:
            self._sharded = ShardedState(self._module, self._engine.optimizer, self._zero_stage, setup.optimizer)
        self._reduce_at_end = False
        if self._zero_stage == 3:
            self.pace.unknown_because = "DeepSpeed waits for weights of other ranks all over the forward pass"

    @property
    def parameter_count(self) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self._module.parameters())

    def dry_run(self, micro_batch: MicroBatch) -> None:
        # A gradient that is not a number: DeepSpeed sends it, then clears everything as for any step that it skips.
        with self._restoring_buffers(), torch.autograd.set_detect_anomaly(False):
            used: set[nn.Parameter] = set()
            hooks = [p.register_post_accumulate_grad_hook(used.add) for p in self._parameters]
            self._accumulate([micro_batch], scale=float("nan"))
            for hook in hooks:
                hook.remove()
            self._update()
            # Stages 1 and 2 fill their buckets with the gradients that a rank has, in the order in which they come. Where
            # some parameter has none, ranks may disagree: then all are filled up, and sent in the order of the parameters.
            self._reduce_at_end = self._zero_stage in (1, 2) and len(used) < len(self._parameters)

    def copies(self) -> Copies | None:
        if self.world.size == 1 or self._zero_stage == 3:
            return None
        if not self._zero_stage:
            return whole_copies(self._module, self._optimizer)
        # The optimizer's state, and the weights that it updates, are spread; those of the forward pass are everywhere.
        weights = {f"model.{name}": parameter.detach() for name, parameter in self._module.named_parameters()}
        return Copies(weights, shards=1)

    def canonical_state(self) -> CanonicalState:
        """At stages 1 to 3 every rank holds copies of the whole state, in host memory."""
        self._share_buffers()
        if self._sharded is not None:
            return CanonicalState(self._sharded.tensors(), self._scalars())
        tensors = model_tensors(self._module)
        for name, parameter in self._module.named_parameters():
            for state, tensor in state_tensors(self._optimizer, parameter).items():
                tensors[f"optimizer.{state}.{name}"] = tensor
        return CanonicalState(tensors, self._scalars())

    def load_state(self, state: CanonicalState) -> None:
        if self._sharded is not None:
            self._sharded.load(state.tensors)
        self._load_scalars(state.scalars)

    def _accumulate(self, micro_batches: Sequence[MicroBatch], scale: float) -> list[torch.Tensor]:
        if self._sharded is not None:
            self._sharded.forget_gradients()
            if self._scaler is not None:
                self._engine.optimizer.override_loss_scale(self._scaler.scale.item())
        with self._engine.coalesce_grad_reduction() if self._reduce_at_end else contextlib.nullcontext():
            losses = super()._accumulate(micro_batches, scale)
            if self._reduce_at_end:
                for parameter in self._parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        return losses

    def _forward_backward(self, micro_batch: MicroBatch, scale: float, *, last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        total = self._forward(micro_batch)
        enter("backward")
        self._engine.backward(self._scaled(total, scale, micro_batch), scale_wrt_gas=False)
        return total.detach() if micro_batch.weight else torch.zeros_like(total)

    def _scaled(self, total: torch.Tensor, scale: float, micro_batch: MicroBatch) -> torch.Tensor:
        if self._sharded is None:
            return super()._scaled(total, scale, micro_batch)
        return total * (scale * micro_batch.weight)  # the loss scale is DeepSpeed's to apply

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sharded is None:
            norm, skipped = self._clip(self._parameters)
            enter("step")
            leave_out(self._optimizer, skipped)
            self._engine.step()
            return norm, skipped
        self._engine.set_gradient_accumulation_boundary(True)
        enter("step")
        self._engine.step()
        device = self.world.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        skipped = torch.tensor(float(not self._engine.was_step_applied()), device=device)
        return norm, skipped

    def _run_in_precision(self) -> None:
        """Puts autocast inside the model's forward: on a GPU DeepSpeed switches off one that it finds around its own."""
        forward = self._module.forward

        @functools.wraps(forward)
        def in_precision(*inputs: Any, **named: Any) -> Any:
            with self._autocast():
                return forward(*inputs, **named)

        self._module.forward = in_precision


class _OutsideAutocast(nn.Module):
    """DeepSpeed's forward pass, called where no autocast is on."""

    def __init__(self, engine: nn.Module, device_type: str) -> None:
        super().__init__()
        self._engine = engine
        self._device_type = device_type

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with torch.autocast(self._device_type, enabled=False):
            return self._engine(*inputs, **named)


def _make_model(deepspeed: Any, setup: EngineSetup) -> nn.Module:
    """At stage 3 a model that is initialised by name never exists as a whole on any rank."""
    if setup.parallel.zero_stage < 3:
        return make_initialised_model(setup.make_model, setup.seed, setup.world.device)

    config = make_deepspeed_config(setup.parallel, setup.optimizer)

    def partition(part: nn.Module) -> None:
        deepspeed.zero.Init(module=part, config_dict_or_path=config)

    return make_initialised_model(setup.make_model, setup.seed, setup.world.device, partition)
