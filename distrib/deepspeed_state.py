"""Weights and optimizer state that DeepSpeed's ZeRO spreads over the ranks, as whole tensors under canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from distrib.config import OptimizerConfig
from distrib.model_state import model_tensors
from distrib.optimizer import materialise_state, names_of_state


class ShardedState:
    """The state behind a ZeRO optimizer of stage 1, 2 or 3.

    DeepSpeed keeps it in flat buffers, cut without regard to rows, which no checkpoint of other engines could describe. So
    it is gathered: every rank gets the whole of it, in host memory, one tensor at a time.
    """

    def __init__(self, module: nn.Module, zero_optimizer: Any, stage: int, config: OptimizerConfig) -> None:
        self._module = module
        self._zero = zero_optimizer
        self._stage = stage
        self._names = names_of_state(config)
        flat = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        self._flat: list[torch.Tensor] = getattr(zero_optimizer, flat)
        materialise_state(zero_optimizer.optimizer, config, self._flat)
        if stage < 3:
            zero_optimizer._lazy_init_hp_params_optimizer_state()  # links the state that is there now to the parameters

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and optimizer state, and the live buffers. All ranks call it together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors = model_tensors(self._module)
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = safe_get_full_fp32_param(parameter).to("cpu", copy=True)
            elif self._stage == 3:
                with self._gathered(parameter, writer=None):
                    tensors[f"model.{name}"] = parameter.to("cpu", copy=True)
        for name, parameter in self._trained():
            for state in self._names:
                tensors[f"optimizer.{state}.{name}"] = safe_get_full_optimizer_state(parameter, state).to(
                    "cpu", copy=True
                )
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over the values of what `tensors` gave. All ranks call it together."""
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
        for name, parameter in self._trained():
            self._set(parameter, tensors[f"model.{name}"], None)
            for state in self._names:
                self._set(parameter, tensors[f"optimizer.{state}.{name}"], state)
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad and self._stage == 3:
                with self._gathered(parameter, writer=0):
                    parameter.copy_(tensors[f"model.{name}"])
        self._show_to_forward()

    def forget_gradients(self) -> None:
        """Zeroes the buffers that DeepSpeed leaves as they are for a parameter which a step does not use: it would get the
        gradient of the last step that did."""
        for flat in self._flat:
            if flat.grad is not None:
                flat.grad.zero_()
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]

    def _set(self, parameter: nn.Parameter, whole: torch.Tensor, state: str | None) -> None:
        """Keeps this rank's part of the weights, or of the optimizer's `state`."""
        from deepspeed import utils

        if self._stage < 3:
            if state is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, state)
            return
        # Not by DeepSpeed's own cut of a whole tensor, which fails where its size is no multiple of the ranks.
        size, rank = cast(Any, parameter).ds_tensor.numel(), self._zero._get_param_partition_rank(parameter)
        part = torch.zeros(size)
        here = whole.flatten()[size * rank : size * (rank + 1)]
        part[: here.numel()] = here
        if state is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, state)

    def _gathered(self, parameter: nn.Parameter, writer: int | None) -> Any:
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=writer)

    def _show_to_forward(self) -> None:
        """Copies the master weights to those that a forward pass reads, as a step does."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for number in range(len(self._flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := self._zero.persistent_parameters:
            persistent[0].all_gather(persistent)
