"""Which engine runs a recipe."""

from __future__ import annotations

from distrib.engine import Engine, EngineSetup


def make_engine(setup: EngineSetup) -> Engine:
    """The engine that `setup.parallel.engine` names. Each is imported only when it is used."""
    assert setup.parallel.engine == "native"
    from distrib.native import NativeEngine

    return NativeEngine(setup)
