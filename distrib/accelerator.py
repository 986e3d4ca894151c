"""An `Accelerator` that takes part in our world and does what the recipe says; what `accelerate config` and `accelerate
launch` ask beyond that is refused in a line."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    patch_environment,
)

from distrib.accelerate_file import refuse_what_nobody_reads
from distrib.accelerate_variables import MORE_THAN_COPIES, is_set, refuse_what_the_recipe_decides
from distrib.config import ParallelConfig
from distrib.replication import DDP_OPTIONS
from distrib.world import World


def make_accelerator(world: World, parallel: ParallelConfig) -> Accelerator:
    """The process's one Accelerator: its state is global, so an earlier one must not step again.

    Raises ValueError, in one line, where the launcher's variables, or a file of `accelerate config` that no launcher read,
    ask for something else than the recipe, and where Accelerate gives something else than the variables ask.
    """
    refuse_what_the_recipe_decides(parallel)
    refuse_what_nobody_reads(parallel)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with patch_environment(**_place(world)):
            accelerator = Accelerator(
                cpu=world.device.type == "cpu",
                # The model and the optimizer's state are where they belong already.
                device_placement=False,
                # The forward pass has its own autocast, the same under every engine.
                mixed_precision="no",
                # The engine accumulates. As a plugin, since a plain number yields to a variable of the launcher.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[DistributedDataParallelKwargs(**DDP_OPTIONS)],
            )
    except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        _refuse_more_than_copies(given=f"an error ({reason})")
        raise ValueError(
            f"parallel.engine=accelerate: Accelerate refuses what `accelerate config` asks: {reason}"
        ) from None
    _refuse_more_than_copies(given=accelerator.distributed_type.value)
    _refuse_another_place(accelerator, world)
    return accelerator


def _place(world: World) -> dict[str, str]:
    """Variables from which Accelerate reads its place. It must join the group that exists, or make none at size 1."""
    if world.size == 1:
        return {"LOCAL_RANK": "-1", "WORLD_SIZE": "1"}
    defaults = {"LOCAL_WORLD_SIZE": str(world.size), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        # Where this is not set, it would change how many threads PyTorch uses.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
    }


def _refuse_more_than_copies(given: str) -> None:
    """`given`: what Accelerate gives where it was asked for more; on a CPU plain copies, without a word."""
    for variable, way_out in MORE_THAN_COPIES.items():
        if is_set(variable):
            raise ValueError(
                f"{variable}={os.environ[variable]}, and Accelerate gives {given}: parallel.engine=accelerate keeps a copy "
                f"of the model on every rank, nothing else of Accelerate has been run yet; {way_out}"
            )


def _refuse_another_place(accelerator: Accelerator, world: World) -> None:
    given = accelerator.distributed_type
    several = DistributedType.MULTI_GPU if world.device.type == "cuda" else DistributedType.MULTI_CPU
    expected = several if world.size > 1 else DistributedType.NO
    if given != expected:
        raise ValueError(
            f"parallel.engine=accelerate: Accelerate gives {given.value}, {expected.value} was expected on {world.size} x "
            f"{world.device.type}; see what `accelerate env` shows, or use parallel.engine=native"
        )
    device = accelerator.device
    # A CPU may be called cpu:0, and a lone GPU just cuda.
    same = device.type == world.device.type and (device.type == "cpu" or device.index in (None, world.device.index))
    if not same:
        raise ValueError(
            f"parallel.engine=accelerate: Accelerate uses device {device}, this worker {world.device}; set "
            f"run.device={device.type if device.type in ('cpu', 'cuda') else 'auto'}, or change `accelerate config`"
        )
    if (accelerator.num_processes, accelerator.process_index) != (world.size, world.rank):
        raise ValueError(
            f"parallel.engine=accelerate: Accelerate sees rank {accelerator.process_index} of "
            f"{accelerator.num_processes}, this worker is rank {world.rank} of {world.size}; start it with one launcher"
        )
