"""Initial values as a function of (seed, parameter name, shape), the same under every engine, device and world size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrib.keys import key64


def make_initialised_model(make_model: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """Builds a model on `device` with its initial values.

    A model that offers `initialise_parameter(name, parameter, generator)` and `initialise_buffers()` is built on the
    meta device first, so its weights exist once. Any other module is built on the CPU and initialised by its submodules'
    own `reset_parameters`, each under a random state of its own.
    """
    if _initialises_by_name(make_model):
        with torch.device("meta"):
            model = make_model()
        model.to_empty(device=device)
        _initialise_by_name(model, seed)
        return model
    return _build_and_reset(make_model, seed).to(device)


def make_sharded_model(
    make_model: Callable[[], nn.Module], seed: int, device: torch.device, shard: Callable[[nn.Module], None]
) -> nn.Module:
    """The same model with the same initial values, spread over ranks by `shard`, which makes its parameters DTensors.

    A model that is initialised by name never exists as a whole on any rank: one parameter at a time is drawn, and this
    rank's part of it kept.
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


def _initialise_by_name(model: Any, seed: int) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            model.initialise_parameter(name, parameter, parameter_generator(seed, name, parameter.shape))
        model.initialise_buffers()


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
