"""Initial values as a function of (seed, parameter name, shape), the same under every engine, device and world size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrib.keys import key64


def make_initialised_model(
    make_model: Callable[[], nn.Module],
    seed: int,
    device: torch.device,
    partition: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Builds a model on `device` with its initial values.

    A model that offers `initialise_parameter(name, parameter, generator)` and `initialise_buffers()` is built on the
    meta device first, so its weights exist once. Any other module is built on the CPU and initialised by its submodules'
    own `reset_parameters`, each under a random state of its own: what its constructor draws and computes besides, such as a
    parameter of its own or a table in a buffer, a meta device would lose.

    `partition` is handed every module as soon as its own parameters are drawn, and may spread them over ranks: a model
    that is initialised by name then never exists as a whole; any other is handed over at once.
    """
    if not _initialises_by_name(make_model):
        model = _build_and_reset(make_model, seed).to(device)
        if partition is not None:
            partition(model)
        return model
    with torch.device("meta"):
        model = make_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    drawn: dict[nn.Parameter, nn.Parameter] = {}  # by the one on the meta device: a tied parameter stays one
    with torch.no_grad():
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter not in drawn:
                    whole = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                    generator = parameter_generator(seed, names[parameter], whole.shape)
                    cast(Any, model).initialise_parameter(names[parameter], whole, generator)
                    drawn[parameter] = whole
                setattr(module, key, drawn[parameter])
            for key, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, key, torch.empty_like(buffer, device=device))
            if partition is not None and any(True for _ in module.parameters(recurse=False)):
                partition(module)
        cast(Any, model).initialise_buffers()
    return model


def make_sharded_model(
    make_model: Callable[[], nn.Module], seed: int, device: torch.device, shard: Callable[[nn.Module], None]
) -> nn.Module:
    """The same model with the same initial values, spread over ranks by `shard`, which makes its parameters DTensors.

    A model that is initialised by name never exists as a whole on any rank: one parameter at a time is drawn, and this
    rank's part of it kept. Any other is built whole on every rank, and then cut.
    """
    if not _initialises_by_name(make_model):
        model = _build_and_reset(make_model, seed).to(device)
        shard(model)
        return model
    with torch.device("meta"):
        model = make_model()
    shard(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise_part(cast(Any, model), name, parameter, seed)
        cast(Any, model).initialise_buffers()
    return model


def _initialise_part(model: Any, name: str, parameter: torch.Tensor, seed: int) -> None:
    """Draws a parameter whole and keeps this rank's part: the values must not depend on the number of parts."""
    assert isinstance(parameter, DTensor)
    part = parameter.to_local()
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=part.device)
    model.initialise_parameter(name, whole, parameter_generator(seed, name, parameter.shape))
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    part.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))])


def _initialises_by_name(make_model: Callable[[], nn.Module]) -> bool:
    try:
        with torch.device("meta"):
            return hasattr(make_model(), "initialise_parameter")
    except (NotImplementedError, RuntimeError):
        # A user's constructor that reads values of tensors cannot run without them; such a model is built for real.
        return False


def parameter_generator(seed: int, name: str, shape: torch.Size) -> torch.Generator:
    """The CPU generator from which the parameter called `name` draws its initial values."""
    return torch.Generator().manual_seed(key64("parameter", seed, name, list(shape)))


def _build_and_reset(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key64("construction", seed))
        model = make_model()
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                torch.manual_seed(key64("module", seed, name))
                reset()
    return model
