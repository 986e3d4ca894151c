"""What each engine can do, in one table: the check before a run and the text that `lockstep engines` prints come from here.
Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distrib.config import ParallelConfig


@dataclass(frozen=True)
class Capabilities:
    """The values of the `parallel` section that an engine accepts."""

    zero_stages: frozenset[int]
    precisions: frozenset[str]
    activation_checkpointing: frozenset[str]
    offload: frozenset[str]
    compile: bool
    hybrid: bool
    launchers: tuple[str, ...] = ()
    """What the end-to-end tests start it with."""
    not_run: tuple[str, ...] = ("GPUs", "several hosts")
    """What nobody has run yet. Everything else is run by the test suite, on CPUs."""


ENGINES: dict[str, Capabilities] = {
    "native": Capabilities(
        zero_stages=frozenset({0, 1, 2, 3}),
        precisions=frozenset({"fp32", "bf16", "fp16"}),
        activation_checkpointing=frozenset({"none", "selective", "full"}),
        offload=frozenset({"none"}),
        compile=True,
        hybrid=True,
        launchers=("lockstep train", "python -m launch.train", "torchrun", "accelerate launch"),
    ),
    "accelerate": Capabilities(
        zero_stages=frozenset({0}),
        precisions=frozenset({"fp32", "bf16", "fp16"}),
        activation_checkpointing=frozenset({"none", "selective", "full"}),
        offload=frozenset({"none"}),
        compile=True,
        hybrid=False,
        launchers=("lockstep train", "accelerate launch"),
        not_run=("GPUs", "several hosts", "sharding by Accelerate"),
    ),
}

# One row per option: the key, how to read what was asked for, and whether an engine can do it.
_OPTIONS: tuple[tuple[str, Callable[[ParallelConfig], object], Callable[[Capabilities, ParallelConfig], bool]], ...] = (
    ("zero_stage", lambda p: p.zero_stage, lambda c, p: p.zero_stage in c.zero_stages),
    ("precision", lambda p: p.precision, lambda c, p: p.precision in c.precisions),
    (
        "activation_checkpointing",
        lambda p: p.activation_checkpointing,
        lambda c, p: p.activation_checkpointing in c.activation_checkpointing,
    ),
    ("offload", lambda p: p.offload, lambda c, p: p.offload in c.offload),
    ("compile", lambda p: str(p.compile).lower(), lambda c, p: c.compile or not p.compile),
    ("replicas", lambda p: p.replicas, lambda c, p: p.replicas is None or (c.hybrid and p.zero_stage > 0)),
)

# The keys of the `parallel` section that an engine may or may not support, in the order of the check.
OPTIONS = tuple(key for key, _, _ in _OPTIONS)


def refuse_unsupported(parallel: ParallelConfig) -> None:
    """Raises ValueError, in one line, for the first option that the chosen engine cannot do, naming the engines that can."""
    if parallel.engine not in ENGINES:
        raise ValueError(
            f"parallel.engine={parallel.engine} is not available in this version; available: {', '.join(ENGINES)}"
        )
    chosen = ENGINES[parallel.engine]
    for key, asked, able in _OPTIONS:
        if not able(chosen, parallel):
            others = [name for name, capabilities in ENGINES.items() if able(capabilities, parallel)]
            way_out = f"engines that can: {', '.join(others)}" if others else "no engine of this version can"
            raise ValueError(
                f"parallel.{key}={asked(parallel)} is not supported by parallel.engine={parallel.engine}; {way_out}"
            )


def count_shards(parallel: ParallelConfig, size: int) -> int:
    """Over how many of `size` ranks a copy of the model is spread. Raises ValueError where the copies do not come out even."""
    if parallel.zero_stage == 0:
        return 1
    replicas = parallel.replicas or 1
    if size % replicas:
        raise ValueError(
            f"parallel.replicas={replicas}: does not divide the {size} workers; choose a divisor of {size}"
        )
    return size // replicas
