"""The canonical names of a model's tensors."""

from __future__ import annotations

import torch
from torch import nn


def model_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """`model.{fully qualified name}` -> live tensor, for parameters (a tied one once) and persistent buffers."""
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors.update({name: tensor for name, tensor in module.state_dict().items() if name not in tied})
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
