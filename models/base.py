"""What the rest of the system asks of a model, and nothing more: it does not know how it is distributed."""

import abc

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Model(nn.Module, abc.ABC):
    """Base of our models, and a convenient one for a user's own.

    Constructing a model only makes its modules (the meta device included); the values of its parameters come from
    `initialise_parameter`, one at a time, so that they depend on nothing but (seed, name, shape). A user's model may
    offer the three methods without this base class. `forward` takes what the task passes: token ids (B, T) int64 or
    images (B, C, H, W) float32.
    """

    @abc.abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts to shard, checkpoint and compile one by one, in the order of the forward pass."""

    @abc.abstractmethod
    def initialise_parameter(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        """Set one whole parameter in place, from the CPU generator where it is random.

        `name` is the parameter's fully qualified name in this module. Values are drawn in fp32 on the CPU and copied,
        so every device gets the same bits; no other parameter and no order enters.
        """

    def initialise_buffers(self) -> None:
        """Set every buffer to its value at the start, for a model that was made on the meta device."""
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
