"""What each engine can do, in one table: the check before a run and the text that `lockstep engines` prints come from here.
Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distrib.config import ParallelConfig


@dataclass(frozen=True)
class Capabilities:
    """The values of the `parallel` section that an engine accepts."""

    zero_stages: frozenset[int]
    precisions: frozenset[str]
    activation_checkpointing: frozenset[str]
    offload: Mapping[str, frozenset[int]]
    """Value -> the ZeRO stages at which the engine can do it."""
    compile: bool
    hybrid: bool
    deepspeed_config: bool
    launchers: tuple[str, ...] = ()
    """What the end-to-end tests start it with."""
    not_run: tuple[str, ...] = ("GPUs", "several hosts")
    """What nobody has run yet. Everything else is run by the test suite, on CPUs."""


_ALL_STAGES = frozenset({0, 1, 2, 3})

ENGINES: dict[str, Capabilities] = {
    "native": Capabilities(
        zero_stages=_ALL_STAGES,
        precisions=frozenset({"fp32", "bf16", "fp16"}),
        activation_checkpointing=frozenset({"none", "selective", "full"}),
        offload={"none": _ALL_STAGES},
        compile=True,
        hybrid=True,
        deepspeed_config=False,
        launchers=("lockstep train", "python -m launch.train", "torchrun", "deepspeed", "accelerate launch", "srun"),
    ),
    "deepspeed": Capabilities(
        zero_stages=_ALL_STAGES,
        precisions=frozenset({"fp32", "bf16", "fp16"}),
        activation_checkpointing=frozenset({"none", "selective", "full"}),
        offload={"none": _ALL_STAGES, "optimizer": frozenset({1, 2, 3}), "parameters": frozenset({3})},
        compile=True,
        hybrid=False,
        deepspeed_config=True,
        launchers=("lockstep train", "deepspeed", "srun"),
    ),
    "accelerate": Capabilities(
        zero_stages=frozenset({0}),
        precisions=frozenset({"fp32", "bf16", "fp16"}),
        activation_checkpointing=frozenset({"none", "selective", "full"}),
        offload={"none": _ALL_STAGES},
        compile=True,
        hybrid=False,
        deepspeed_config=False,
        launchers=("lockstep train", "accelerate launch", "srun"),
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
    ("offload", lambda p: p.offload, lambda c, p: p.zero_stage in c.offload.get(p.offload, ())),
    ("compile", lambda p: str(p.compile).lower(), lambda c, p: c.compile or not p.compile),
    ("replicas", lambda p: p.replicas, lambda c, p: p.replicas is None or (c.hybrid and p.zero_stage > 0)),
    ("deepspeed_config", lambda p: p.deepspeed_config, lambda c, p: c.deepspeed_config or p.deepspeed_config is None),
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
            raise ValueError(
                f"parallel.{key}={asked(parallel)} is not supported by parallel.engine={parallel.engine}"
                f"{_way_out(parallel, able)}"
            )


def _way_out(parallel: ParallelConfig, able: Callable[[Capabilities, ParallelConfig], bool]) -> str:
    others = [name for name, capabilities in ENGINES.items() if able(capabilities, parallel)]
    if others:
        return f"; engines that can: {', '.join(others)}"
    stages = {
        name: [
            str(stage)
            for stage in sorted(capabilities.zero_stages)
            if able(capabilities, parallel.model_copy(update={"zero_stage": stage}))
        ]
        for name, capabilities in ENGINES.items()
    }
    told = [f"{name} at {', '.join(possible)}" for name, possible in stages.items() if possible]
    if told:
        return f" at parallel.zero_stage={parallel.zero_stage}; engines that can, and their stages: {'; '.join(told)}"
    return "; no engine of this version can"


def refuse_fake_world(parallel: ParallelConfig) -> None:
    """ValueError for an engine that cannot run as one rank of many that are not there."""
    if parallel.engine != "native":
        raise ValueError(
            f"parallel.engine={parallel.engine}: its library talks to the other ranks itself and cannot run without "
            "them; --fake-world needs parallel.engine=native"
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
