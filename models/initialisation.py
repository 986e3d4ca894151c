"""Initial values, drawn in fp32 on the CPU: the same bits on every device.

Each function sets one tensor in place, of any device and dtype, from a CPU generator.
"""

import math

import torch

from models.config import Initialisation


@torch.no_grad()
def normal_(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Independent N(0, std^2)."""
    values = _host_values(parameter)
    values.normal_(0.0, std, generator=generator)
    if values is not parameter:
        parameter.copy_(values)


@torch.no_grad()
def uniform_(parameter: torch.Tensor, bound: float, generator: torch.Generator) -> None:
    """Independent and uniform in [-bound, bound)."""
    values = _host_values(parameter)
    values.uniform_(-bound, bound, generator=generator)
    if values is not parameter:
        parameter.copy_(values)


def _host_values(parameter: torch.Tensor) -> torch.Tensor:
    """Where to draw: the parameter itself where it is what generators fill alike everywhere."""
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous():
        return parameter
    return torch.empty(parameter.shape, dtype=torch.float32, device="cpu")


@torch.no_grad()
def constant_(parameter: torch.Tensor, value: float) -> None:
    parameter.fill_(value)


def fans(shape: torch.Size) -> tuple[int, int]:
    """Inputs of one output unit, and outputs of one input unit, of a weight (out, in) or (out, in, k, k)."""
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {tuple(shape)} has no fan-in; only matrices and convolutions are drawn")
    receptive_field = math.prod(shape[2:])
    return shape[1] * receptive_field, shape[0] * receptive_field


def xavier_(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Uniform with variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 16)."""
    fan_in, fan_out = fans(parameter.shape)
    uniform_(parameter, math.sqrt(6.0 / (fan_in + fan_out)), generator)


def he_(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Normal with variance 2 / fan_in, for a layer that a ReLU follows (He et al. 2015, equation 10)."""
    fan_in, _ = fans(parameter.shape)
    normal_(parameter, math.sqrt(2.0 / fan_in), generator)


def initialise_cnn_parameter(
    name: str, parameter: torch.Tensor, generator: torch.Generator, *, scheme: Initialisation, zero_norms: bool = False
) -> None:
    """Set a parameter of one of our CNNs by its name and shape.

    Biases are 0 and norm weights 1 (0 for the last norm of a residual branch where `zero_norms`). Convolutions and
    matrices follow `scheme`, except that He's doubled variance, which makes up for a ReLU, is left out for the
    `classifier`, which none follows.
    """
    if name.endswith("bias"):
        constant_(parameter, 0.0)
    elif parameter.ndim == 1:
        constant_(parameter, 0.0 if zero_norms and name.endswith("last_norm.weight") else 1.0)
    elif scheme == "xavier":
        xavier_(parameter, generator)
    elif name == "classifier.weight":
        normal_(parameter, math.sqrt(1.0 / fans(parameter.shape)[0]), generator)
    else:
        he_(parameter, generator)
