"""Optimizers with weight-decay groups, and their state under the names of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from distrib.config import OptimizerConfig

# The tensors that an optimizer keeps for each parameter, in the canonical form of a checkpoint.
STATE_TENSORS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def make_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    *,
    axes_of: Callable[[nn.Parameter], int] = torch.Tensor.dim,
    with_state: bool = True,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) or SGD, fused: tensors of two or
    more axes are decayed, the others (biases, norm weights) are not. The state of every parameter exists on return, so that
    running out of memory shows before the first step; `with_state=False` leaves that to `materialise_state`.
    `axes_of`: how many axes the whole parameter has, where an engine has flattened it.
    """
    by_decay: dict[float, list[nn.Parameter]] = {}  # one group, and one kernel, where nothing is decayed
    for parameter in parameters:
        by_decay.setdefault(config.weight_decay if axes_of(parameter) >= 2 else 0.0, []).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
    optimizer: torch.optim.Optimizer
    if config.kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.epsilon, fused=True)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    if with_state:
        materialise_state(optimizer, config, [p for group in optimizer.param_groups for p in group["params"]])
    return optimizer


def materialise_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, parameters: Iterable[torch.Tensor]
) -> None:
    """Makes the state that the optimizer keeps for `parameters`, as it is before the first step."""
    # Zeros are what AdamW starts from, and a zero momentum buffer gives SGD's first step (0 * momentum + gradient).
    for parameter in parameters:
        state = optimizer.state[parameter]
        if config.kind == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in names_of_state(config):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def names_of_state(config: OptimizerConfig) -> tuple[str, ...]:
    """What the optimizer keeps for each parameter, but the update count."""
    return STATE_TENSORS[config.kind] if config.kind == "adamw" or config.momentum > 0 else ()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def state_tensors(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimizer keeps for a parameter, but the update count."""
    return {name: tensor for name, tensor in optimizer.state.get(parameter, {}).items() if name != "step"}


def updates_done(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far, skipped steps apart: what AdamW's bias correction counts. 0 for an optimizer that does not count."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"].item())
    return 0


def set_updates_done(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Sets what `updates_done` reads, for every parameter."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(updates))
