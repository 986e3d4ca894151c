"""DeepSpeed as a guest: on the run's device, in the run's process group, and silent but for warnings."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distrib.world import World, found_group_of_one

# What DeepSpeed keeps of the process groups of this one: it must be forgotten when the process joins another world.
_joined: Any = None


def load_deepspeed(world: World) -> Any:
    """The module `deepspeed`, ready to build engines in this world. Raises ValueError where the package is missing."""
    global _joined
    # DeepSpeed takes the place in the world from these; both must be there before it is imported.
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
        from deepspeed.utils import groups
    except ImportError as error:
        raise ValueError(
            f"parallel.engine=deepspeed: the package cannot be imported ({error}); "
            "install it with pip install 'deepspeed>=0.19.8'"
        ) from None
    _quiet()
    # An operation for inference alone, which DeepSpeed would compile when it first starts on a CPU.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    found_group_of_one(world)
    if _joined is not dist.group.WORLD:
        groups._release_process_group_references()
        _joined = dist.group.WORLD
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def ending_of(engine: Any) -> Callable[[], None]:
    """What ends an engine of DeepSpeed's. Hooks that garbage collection cannot see and caches of the library would keep it for
    the life of the process: its memory, and the process groups, whose threads poll as long as they live."""
    # Imported now: where a version lacks them, that must show before the run and not at its end.
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    def end() -> None:
        engine.destroy()
        FWD_MODULE_STACK.clear()
        for function in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(function, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()

    return end


def _quiet() -> None:
    logger = logging.getLogger("DeepSpeed")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout is for answers
    logger.addFilter(_is_news)  # adding it again changes nothing
    # DeepSpeed calls collectives by names that newer versions of torch call deprecated.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    )


def _is_news(record: logging.LogRecord) -> bool:
    """All but that the optimizer is torch's, which is what was chosen, and that a step is skipped, which the run tells."""
    return not any(known in record.getMessage() for known in ("untested optimizer", "OVERFLOW! Skipping step"))
