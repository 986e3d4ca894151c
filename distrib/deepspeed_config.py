"""The DeepSpeed configuration that a recipe means, and a user's own DeepSpeed file merged into it. Imports no torch.

The recipe decides what is computed; a file may tune how DeepSpeed does it. So a file's keys are of three kinds: those that
say what the recipe says too, which must agree with it; those that tune ZeRO, which are passed on; and all others, which
are refused, because nobody would act on them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig

# Elements that are reduced, or gathered ahead, at a time. DeepSpeed's own 500 million would be a buffer of 2 GB in fp32.
_BUCKET_ELEMENTS = 50_000_000


class _Acting(NamedTuple):
    """Where DeepSpeed reads a key at all."""

    key: str
    """Of the recipe's parallel section."""
    values: tuple[Any, ...]


class _Tuning(NamedTuple):
    """A key of the file that tunes ZeRO."""

    kind: type
    acting: _Acting
    least: int = 0
    """The smallest number that DeepSpeed takes."""
    multiple_of: int = 1


_EVERY_STAGE = _Acting("zero_stage", (1, 2, 3))
_STAGES_1_AND_2 = _Acting("zero_stage", (1, 2))
_STAGE_3 = _Acting("zero_stage", (3,))

_TUNING: dict[str, _Tuning] = {
    # Most files have it, though DeepSpeed only checks it: with this torch it gathers into one tensor.
    "zero_optimization.allgather_bucket_size": _Tuning(int, _STAGES_1_AND_2, least=2, multiple_of=2),
    "zero_optimization.contiguous_gradients": _Tuning(bool, _EVERY_STAGE),
    "zero_optimization.overlap_comm": _Tuning(bool, _EVERY_STAGE),
    "zero_optimization.reduce_bucket_size": _Tuning(int, _EVERY_STAGE, least=1),
    "zero_optimization.reduce_scatter": _Tuning(bool, _EVERY_STAGE),
    "zero_optimization.sub_group_size": _Tuning(int, _STAGE_3),
    "zero_optimization.use_multi_rank_bucket_allreduce": _Tuning(bool, _STAGES_1_AND_2),
    "zero_optimization.stage3_max_live_parameters": _Tuning(int, _STAGE_3),
    "zero_optimization.stage3_max_reuse_distance": _Tuning(int, _STAGE_3),
    "zero_optimization.stage3_model_persistence_threshold": _Tuning(int, _STAGE_3),
    "zero_optimization.stage3_module_granularity_threshold": _Tuning(int, _STAGE_3),
    "zero_optimization.stage3_param_persistence_threshold": _Tuning(int, _STAGE_3),
    "zero_optimization.stage3_prefetch_bucket_size": _Tuning(int, _STAGE_3),
    "zero_optimization.offload_optimizer.pin_memory": _Tuning(bool, _Acting("offload", ("optimizer", "parameters"))),
    "zero_optimization.offload_param.pin_memory": _Tuning(bool, _Acting("offload", ("parameters",))),
}
# Sections and keys that a recipe has an own place for.
_OWNED = {
    "activation_checkpointing": "parallel.activation_checkpointing",
    "checkpoint": "checkpoint.every_steps",
    "comet": "tracking",
    "compile": "parallel.compile",
    "csv_monitor": "tracking",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "scheduler": "schedule.kind",
    "tensorboard": "tracking.tensorboard",
    "wandb": "tracking.wandb",
}


class _Agreement(NamedTuple):
    """A key of the file that says what the recipe says, too."""

    accepted: tuple[Any, ...]
    recipe: str
    """The recipe's key and value, for the message."""


def make_deepspeed_config(
    parallel: ParallelConfig, optimizer: OptimizerConfig, model_elements: int = _BUCKET_ELEMENTS
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a model of so many parameter elements, a checked file of the user's included.

    Weights are fp32 to DeepSpeed at every precision (no `bf16` or `fp16` section), the batch is one micro-batch without
    accumulation, and at stage 0, where DeepSpeed reduces gradients and no more, clipping is the engine's.
    """
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        # Stage 3 makes this buffer when it starts: it need not be larger than all that is ever reduced.
        "reduce_bucket_size": min(_BUCKET_ELEMENTS, model_elements),
        "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
        # Otherwise DeepSpeed replaces torch.nn.functional.linear in the whole process by an own one.
        "memory_efficient_linear": False,
    }
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (optimizer.clip_norm or 0.0) if parallel.zero_stage else 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # Ours is torch's fused one, on the CPU too: the same arithmetic with and without offload.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
        "zero_optimization": zero,
    }
    if parallel.deepspeed_config is not None:
        for key, value in _read(parallel.deepspeed_config).items():
            if key in _TUNING and value != "auto":
                _put(config, key, value)
    return config


def check_deepspeed_file(
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    *,
    global_samples: int,
    micro_samples: int,
) -> None:
    """Raises ValueError, in one line, where `parallel.deepspeed_config` cannot be read, contradicts the recipe or holds what
    no run would act on."""
    path = parallel.deepspeed_config
    if path is None:
        return
    agreements = _agreements(parallel, optimizer, schedule, global_samples, micro_samples)
    for key, value in _read(path).items():
        if value == "auto":  # what Hugging Face writes for "as the training script says"
            continue
        said = f"parallel.deepspeed_config={path}: {key}={json.dumps(value)}"
        owner = next((_OWNED[part] for part in _OWNED if key == part or key.startswith(f"{part}.")), None)
        if key in agreements:
            accepted, recipe = agreements[key]
            if not any(_same(value, other) for other in accepted):
                raise ValueError(f"{said} contradicts the recipe's {recipe}; remove it there, or change the recipe")
        elif owner is not None:
            shown = f"{owner}={schedule.kind}" if owner == "schedule.kind" else owner
            raise ValueError(f"{said}: the recipe's {shown} decides this; remove it there")
        elif key in _TUNING:
            _check_acting(said, parallel, _TUNING[key].acting)
            _check_value(said, value, _TUNING[key])
        else:
            near = difflib.get_close_matches(key, [*agreements, *_TUNING], n=3, cutoff=0.7)
            hint = (
                f"nearest: {', '.join(near)}"
                if near
                else "what can be tuned is in zero_optimization: "
                f"{', '.join(tuned.removeprefix('zero_optimization.') for tuned in _TUNING)}"
            )
            raise ValueError(f"{said} is not a key that a run takes from a DeepSpeed file; remove it there; {hint}")


def _agreements(
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    global_samples: int,
    micro_samples: int,
) -> dict[str, _Agreement]:
    batch = f"batch.global_samples={global_samples}"
    micro = f"batch.micro_samples={micro_samples}"
    precision = f"parallel.precision={parallel.precision}"
    offload = f"parallel.offload={parallel.offload}"
    fp32 = _Agreement(("fp32",), "fp32 weights, gradients and sums, under every parallel.precision")
    off = _Agreement((False,), f"{precision}, which is torch.autocast over fp32 weights")
    scale = f"{precision}, whose loss scale starts at 2**16, doubles after 2000 good steps and halves after a bad one"
    stages = _Agreement((parallel.zero_stage,), f"parallel.zero_stage={parallel.zero_stage}")
    agreements = {
        "train_batch_size": _Agreement((global_samples,), batch),
        "train_micro_batch_size_per_gpu": _Agreement((micro_samples,), micro),
        # What one rank accumulates follows from the number of ranks, unless a micro-batch holds the global batch.
        "gradient_accumulation_steps": _Agreement((1,) if global_samples <= micro_samples else (), f"{batch}, {micro}"),
        "gradient_clipping": _Agreement(
            (optimizer.clip_norm or 0.0,), f"optimizer.clip_norm={json.dumps(optimizer.clip_norm)}"
        ),
        "bf16.enabled": _Agreement((parallel.precision == "bf16",), precision),
        "fp16.enabled": _Agreement((parallel.precision == "fp16",), precision),
        "fp16.auto_cast": off,
        "fp16.loss_scale": _Agreement((0,), scale),
        "fp16.initial_scale_power": _Agreement((16,), scale),
        "fp16.loss_scale_window": _Agreement((2000,), scale),
        "fp16.hysteresis": _Agreement((1,), scale),
        "fp16.consecutive_hysteresis": _Agreement((False,), scale),
        "amp.enabled": off,
        "torch_autocast.enabled": off,
        "data_types.grad_accum_dtype": fp32,
        "data_types.param_dtype": fp32,
        "communication_data_type": fp32,
        "prescale_gradients": _Agreement((False,), "own gradient scaling: the sum over the batch by its items"),
        "gradient_predivide_factor": _Agreement((1,), "own gradient scaling: the sum over the batch by its items"),
        "sparse_gradients": _Agreement((False,), "dense gradients"),
        "zero_allow_untested_optimizer": _Agreement((True,), f"optimizer.kind={optimizer.kind}, which is torch's"),
        "zero_force_ds_cpu_optimizer": _Agreement((False,), f"optimizer.kind={optimizer.kind}, which is torch's"),
        "zero_optimization.stage": stages,
        "zero_optimization.offload_optimizer.device": _Agreement(
            ("cpu",) if parallel.offload != "none" else ("none",), offload
        ),
        "zero_optimization.offload_param.device": _Agreement(
            ("cpu",) if parallel.offload == "parameters" else ("none",), offload
        ),
        "zero_optimization.compute_grad_norm": _Agreement((True,), "gradient norm, which every step reports"),
        "optimizer.type": _Agreement((optimizer.kind,), f"optimizer.kind={optimizer.kind}"),
        "optimizer.params.lr": _Agreement((optimizer.lr,), f"optimizer.lr={optimizer.lr}"),
        "optimizer.params.weight_decay": _Agreement(
            (optimizer.weight_decay,), f"optimizer.weight_decay={optimizer.weight_decay}"
        ),
    }
    named = (
        {"betas": list(optimizer.betas), "epsilon": optimizer.epsilon}
        if optimizer.kind == "adamw"
        else {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    )
    for name, value in named.items():
        theirs = "eps" if name == "epsilon" else name
        agreements[f"optimizer.params.{theirs}"] = _Agreement((value,), f"optimizer.{name}={json.dumps(value)}")
    return agreements


def _same(value: Any, recipe: Any) -> bool:
    if isinstance(value, str) and isinstance(recipe, str):
        return value.lower() == recipe.lower()
    return value == recipe and isinstance(value, bool) == isinstance(recipe, bool)


def _check_acting(said: str, parallel: ParallelConfig, acting: _Acting) -> None:
    ours = getattr(parallel, acting.key)
    if ours not in acting.values:
        values = " or ".join(str(value) for value in acting.values)
        raise ValueError(
            f"{said} acts only under parallel.{acting.key}={values}, and the recipe has {ours}; remove it there"
        )


def _check_value(said: str, value: Any, tuning: _Tuning) -> None:
    if tuning.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{said}: must be true or false")
        return
    # Hugging Face writes 5e8 where it means a whole number.
    whole = value.is_integer() if isinstance(value, float) else type(value) is int
    if not whole or value < tuning.least or value % tuning.multiple_of:
        kind = "a whole number" if tuning.multiple_of == 1 else f"a multiple of {tuning.multiple_of}"
        raise ValueError(f"{said}: must be {kind}, {tuning.least} or more")


def _read(path: Path) -> dict[str, Any]:
    """The file's values by dotted key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
        if isinstance(content, dict):
            return _flatten(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"parallel.deepspeed_config={path}: cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"parallel.deepspeed_config={path}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"parallel.deepspeed_config={path}: not valid JSON (nested too deeply)") from None
    raise ValueError(f"parallel.deepspeed_config={path}: must hold an object, not {type(content).__name__}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"key {key!r} is given twice")
        mapping[key] = value
    return mapping


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif value != {}:
            flat[f"{prefix}{key}"] = value
    return flat


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = int(value) if isinstance(value, float) else value
