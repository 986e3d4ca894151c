"""ZeRO stages 1 to 3 by PyTorch's `fully_shard` (FSDP2): block by block, over the mesh's shard axis.

What a step of n micro-batches sends, per rank, for P parameter elements (times (shards - 1) / shards):

    stage 1   gathers P once, reduces P once; whole gradients are kept over the accumulation
    stage 2   gathers P once, reduces P after every micro-batch; whole weights stay for the step
    stage 3   gathers P twice per micro-batch, reduces P after every micro-batch; nothing stays whole

so that stage 1 is chosen for the optimizer's memory, 2 for the gradients' too and 3 for all of it. Between copies of the
model (hybrid sharding) a rank's part of the gradient travels once a step, whatever the stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distrib.blocks import blocks_of
from distrib.world import World


def shard(module: nn.Module, world: World, zero_stage: int) -> None:
    """Makes the module's parameters DTensors, in place. Stage 3 frees a block's weights after its forward pass and gathers
    them again for the backward; the others keep them in between. A module without `blocks()` is one unit, and a block that
    shares a weight with the rest of the model is part of the whole: a weight can be gathered by one unit alone."""
    assert world.mesh is not None
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shard"]
    for unit in _units(module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=zero_stage == 3)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    uses = _uses(module)
    for block in blocks_of(module):
        if block is not module and all(uses[weight] == count for weight, count in _uses(block).items()):
            yield block
    yield module


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """How often each parameter occurs in a module."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def communicate(module: nn.Module, zero_stage: int, *, last: bool) -> None:
    """Sets what the next backward pass sends and frees; `last`: it is the step's last one."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(last or zero_stage > 1)
    module.set_requires_all_reduce(last)
    module.set_reshard_after_backward(last or zero_stage == 3)


def settle(module: nn.Module) -> None:
    """Makes the storage of the local shards final, so that an optimizer may hold it: FSDP pads them to equal sizes in what it
    puts off until the first forward. Gathering weights would do that too, at the price of a whole block twice."""
    assert isinstance(module, FSDPModule)
    module._get_fsdp_state()._lazy_init()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of which every rank holds `part` as it holds its part of `parameter`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
