"""The native engine: plain PyTorch at world 1, replicated (DDP) or sharded (FSDP2) parameters over more ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrib.blocks import blocks_of, prepare_blocks
from distrib.copies import Copies, whole_copies
from distrib.engine import CanonicalState, EngineSetup, MicroBatch
from distrib.engine_base import EngineBase
from distrib.fake_world import is_fake, let_replicas_be_fake
from distrib.gradients import leave_out
from distrib.initialisation import make_initialised_model, make_sharded_model
from distrib.model_state import model_tensors
from distrib.optimizer import make_optimizer, state_tensors
from distrib.phases import enter
from distrib.replication import DDP_OPTIONS, quiet_ddp
from distrib.sharding import communicate, like, local, settle, shard
from distrib.world import World


class NativeEngine(EngineBase):
    """An `Engine` over plain PyTorch: at ZeRO stage 0 every rank holds the whole model, at stages 1 to 3 a shard of it.

    The optimizer always works on this rank's plain tensors: its kernels are the same, and as fast, with and without
    sharding.
    """

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        world, parallel = setup.world, setup.parallel
        self._zero_stage = parallel.zero_stage if world.mesh is not None else 0
        # Autocast's copies would outlive the weights that sharding frees after use.
        self._keep_casts = not self._zero_stage
        self._module = self._make_module(setup)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._local = self._parameters
        if self._zero_stage:
            self._local = [nn.Parameter(local(parameter.detach())) for parameter in self._parameters]
        replicated = world.size > 1 and not self._zero_stage
        self._forward_module = _replicate(self._module, world) if replicated else self._module
        self._optimizer = make_optimizer(setup.optimizer, self._local)
        if self._zero_stage and parallel.compile:
            self.pace.unknown_because = "the blocks are compiled, and wait for one another's weights in between"
        elif self._zero_stage:
            self.pace.only_inside(blocks_of(self._module))

    def _make_module(self, setup: EngineSetup) -> nn.Module:
        """The model with its initial values: made on the meta device, sharded, and only then given memory."""

        def prepare(module: nn.Module) -> None:
            prepare_blocks(
                module,
                activation_checkpointing=setup.parallel.activation_checkpointing,
                compile_blocks=setup.parallel.compile,
            )
            if self._zero_stage:
                shard(module, setup.world, self._zero_stage)

        if self._zero_stage:
            module = make_sharded_model(setup.make_model, setup.seed, setup.world.device, prepare)
            settle(module)
        else:
            module = make_initialised_model(setup.make_model, setup.seed, setup.world.device)
            prepare(module)
        return module

    def dry_run(self, micro_batch: MicroBatch) -> None:
        with self._restoring_buffers():
            if isinstance(self._forward_module, DistributedDataParallel):
                self._find_unused(micro_batch)
            # DDP lays its buckets out anew after the first backward of an attempt, which changes the order of summation:
            # that must happen here, or a resumed run would not repeat the bytes.
            self._forward_backward(micro_batch, scale=0.0, last=True)
            self._module.zero_grad()

    def _find_unused(self, micro_batch: MicroBatch) -> None:
        """DDP waits for the gradient of every parameter, unless it is told to look each time for those without one."""
        self._forward_backward(micro_batch, scale=0.0, last=False)
        if any(parameter.grad is None for parameter in self._parameters):
            self._forward_module = _replicate(self._module, self.world, find_unused_parameters=True)
        self._module.zero_grad()

    def copies(self) -> Copies | None:
        if not self._zero_stage:
            return whole_copies(self._module, self._optimizer) if self.world.size > 1 else None
        if self.world.size == self.world.shards:
            return None
        tensors: dict[str, torch.Tensor] = {}
        names = [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        for name, part in zip(names, self._local, strict=True):
            tensors[f"model.{name}"] = part.detach()
            for state, tensor in state_tensors(self._optimizer, part).items():
                tensors[f"optimizer.{state}.{name}"] = tensor
        return Copies(tensors, self.world.shards)

    def canonical_state(self) -> CanonicalState:
        self._share_buffers()
        tensors = model_tensors(self._module)
        trained = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        for (name, parameter), part in zip(trained, self._local, strict=True):
            for state, tensor in state_tensors(self._optimizer, part).items():
                tensors[f"optimizer.{state}.{name}"] = like(tensor, parameter)
        return CanonicalState(tensors, self._scalars())

    def load_state(self, state: CanonicalState) -> None:
        self._load_scalars(state.scalars)  # the tensors are the engine's own

    def _forward_backward(self, micro_batch: MicroBatch, scale: float, *, last: bool) -> torch.Tensor:
        with self._communication(last=last):
            total = self._forward(micro_batch)
            enter("backward")
            with contextlib.nullcontext() if last or self._zero_stage else self.pace.of_backward():
                self._scaled(total, scale, micro_batch).backward()
        return total.detach() if micro_batch.weight else torch.zeros_like(total)

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        shard_group = None
        if self._zero_stage:
            assert self.world.mesh is not None
            shard_group = self.world.mesh.get_group("shard")
            for parameter, part in zip(self._parameters, self._local, strict=True):
                part.grad = None if parameter.grad is None else local(parameter.grad)
        norm, skipped = self._clip(self._local, shard_group)
        enter("step")
        leave_out(self._optimizer, skipped)
        self._optimizer.step()
        # As zero_grad does, without its sorting and its entry in a profile.
        for parameter in self._parameters:
            parameter.grad = None
        for part in self._local:
            part.grad = None
        return norm, skipped

    def _communication(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """What travels after the backward pass of a micro-batch, the `last` of its step or an earlier one."""
        if self._zero_stage:
            communicate(self._module, self._zero_stage, last=last)
        elif isinstance(self._forward_module, DistributedDataParallel) and not last:
            return self._forward_module.no_sync()
        return contextlib.nullcontext()


def _replicate(module: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    with quiet_ddp():
        replicated = DistributedDataParallel(
            module, process_group=world.data_group, find_unused_parameters=find_unused_parameters, **DDP_OPTIONS
        )
    if is_fake(world.data_group):
        let_replicas_be_fake(replicated)
    return replicated
