"""The accelerate engine: model and optimizer prepared by Hugging Face Accelerate, for who launches with `accelerate launch`.

Accelerate wraps, synchronises and runs the backward pass. What it would decide by its own rules stays ours: how losses are
scaled and accumulated, precision, clipping, the rate, and which samples a rank reads.
"""

from __future__ import annotations

import contextlib

import torch

from distrib.accelerator import make_accelerator
from distrib.blocks import prepare_blocks
from distrib.copies import Copies, whole_copies
from distrib.engine import CanonicalState, EngineSetup, MicroBatch
from distrib.engine_base import EngineBase
from distrib.gradients import leave_out
from distrib.initialisation import make_initialised_model
from distrib.model_state import model_tensors
from distrib.optimizer import make_optimizer, state_tensors
from distrib.phases import enter
from distrib.replication import quiet_ddp


class AccelerateEngine(EngineBase):
    """An `Engine` over `Accelerator`: a copy of the model on every rank.

    Of several in one process only the newest may step, since Accelerate's state is global.
    """

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        parallel = setup.parallel
        self._accelerator = make_accelerator(setup.world, parallel)
        self._module = make_initialised_model(setup.make_model, setup.seed, setup.world.device)
        prepare_blocks(
            self._module, activation_checkpointing=parallel.activation_checkpointing, compile_blocks=parallel.compile
        )
        self._parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(setup.optimizer, self._parameters)
        with quiet_ddp():
            self._forward_module, self._prepared_optimizer = self._accelerator.prepare(self._module, self._optimizer)

    def dry_run(self, micro_batch: MicroBatch) -> None:
        with self._restoring_buffers():
            if self.world.size > 1:
                self._find_unused(micro_batch)
            # The first backward pass decides the order in which DDP sums: every attempt must have it here.
            self._forward_backward(micro_batch, scale=0.0, last=True)
            self._module.zero_grad()

    def _find_unused(self, micro_batch: MicroBatch) -> None:
        """DDP waits for the gradient of every parameter, unless it is told to look each time for those without one."""
        self._forward_backward(micro_batch, scale=0.0, last=False)
        if any(parameter.grad is None for parameter in self._parameters):
            assert self._accelerator.ddp_handler is not None
            self._accelerator.ddp_handler.find_unused_parameters = True
            # The first wrapper must be gone, or both would communicate.
            self._forward_module = self._module
            self._accelerator.free_memory()
            with quiet_ddp():
                self._forward_module = self._accelerator.prepare_model(self._module)
        self._module.zero_grad()

    def copies(self) -> Copies | None:
        return whole_copies(self._module, self._optimizer) if self.world.size > 1 else None

    def canonical_state(self) -> CanonicalState:
        self._share_buffers()
        tensors = model_tensors(self._module)
        for name, parameter in self._module.named_parameters():
            for state, tensor in state_tensors(self._optimizer, parameter).items():
                tensors[f"optimizer.{state}.{name}"] = tensor
        return CanonicalState(tensors, self._scalars())

    def load_state(self, state: CanonicalState) -> None:
        self._load_scalars(state.scalars)  # the tensors are the engine's own

    def _forward_backward(self, micro_batch: MicroBatch, scale: float, *, last: bool) -> torch.Tensor:
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self._forward_module):
            total = self._forward(micro_batch)
            enter("backward")
            self._accelerator.backward(self._scaled(total, scale, micro_batch))
        return total.detach() if micro_batch.weight else torch.zeros_like(total)

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm, skipped = self._clip(self._parameters)
        enter("step")
        leave_out(self._optimizer, skipped)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        return norm, skipped
