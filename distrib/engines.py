"""Which engine runs a recipe."""

from __future__ import annotations

import importlib

from distrib.accelerate_variables import refuse_what_goes_unread
from distrib.engine import Engine, EngineSetup

# The module and class of each engine. Each is imported only when it is used, and the package that it is made of with it.
_ENGINES = {
    "native": ("distrib.native", "NativeEngine", "torch"),
    "deepspeed": ("distrib.deepspeed_engine", "DeepSpeedEngine", "deepspeed"),
    "accelerate": ("distrib.accelerate_engine", "AccelerateEngine", "accelerate"),
}


def make_engine(setup: EngineSetup) -> Engine:
    """The engine that `setup.parallel.engine` names. Raises ValueError where the package that it is made of is missing,
    and where the launcher was asked for what the engine would not do."""
    if setup.parallel.engine != "accelerate":
        refuse_what_goes_unread(setup.parallel)
    module, engine_class, package = _ENGINES[setup.parallel.engine]
    try:
        engine: Engine = getattr(importlib.import_module(module), engine_class)(setup)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"parallel.engine={setup.parallel.engine} needs the package {package}, which is not installed; "
            f"install it (pip install {package}), or use parallel.engine=native"
        ) from None
    return engine
