"""A user's DeepSpeed file: what tunes ZeRO is passed on, what contradicts the recipe is refused, all in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from distrib.deepspeed_config import _TUNING, check_deepspeed_file, make_deepspeed_config

ADAMW = OptimizerConfig(lr=1e-3, clip_norm=0.5)


def check(path: Path, optimizer: OptimizerConfig = ADAMW, **parallel: Any) -> None:
    values = {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16", **parallel, "deepspeed_config": path}
    check_deepspeed_file(
        ParallelConfig(**values), optimizer, ScheduleConfig(), global_samples=12, micro_samples=2
    )  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# What a file may say beside this recipe: ZeRO-2, bf16, AdamW at 1e-3 clipped to 0.5, 12 samples by 2.
AGREEING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "what Hugging Face leaves to the script": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "scheduler": {"type": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    },
    "the same as the recipe": {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "adamw", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    },
    "tuning": {"zero_optimization": {"reduce_bucket_size": 5e6, "contiguous_gradients": False}},
    "an empty section": {"scheduler": {}},
}


@pytest.mark.parametrize("name", AGREEING)
def test_a_file_that_agrees_is_taken(tmp_path: Path, name: str) -> None:
    check(write(tmp_path, AGREEING[name]))


# JSON -> what the message names: the file's key and value, the recipe's key and value.
CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"train_batch_size": 16}, "train_batch_size=16", "batch.global_samples=12"),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4", "batch.micro_samples=2"),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3", "batch.global_samples=12"),
    ({"gradient_clipping": 1.0}, "gradient_clipping=1.0", "optimizer.clip_norm=0.5"),
    ({"bf16": {"enabled": False}}, "bf16.enabled=false", "parallel.precision=bf16"),
    ({"fp16": {"enabled": True}}, "fp16.enabled=true", "parallel.precision=bf16"),
    ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale=128", "parallel.precision=bf16"),
    ({"amp": {"enabled": True}}, "amp.enabled=true", "parallel.precision=bf16"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled=true", "parallel.precision=bf16"),
    ({"communication_data_type": "bf16"}, 'communication_data_type="bf16"', "fp32"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16"', "fp32"),
    ({"prescale_gradients": True}, "prescale_gradients=true", "the sum over the batch by its items"),
    ({"optimizer": {"type": "Adam"}}, 'optimizer.type="Adam"', "optimizer.kind=adamw"),
    ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr=0.0003", "optimizer.lr=0.001"),
    ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, "optimizer.params.betas=[0.9, 0.99]", "optimizer.betas=[0.9, 0.95]"),
    ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type="WarmupLR"', "schedule.kind=cosine"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3", "parallel.zero_stage=2"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        'zero_optimization.offload_optimizer.device="cpu"',
        "parallel.offload=none",
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "nvme"}}},
        'zero_optimization.offload_param.device="nvme"',
        "parallel.offload=none",
    ),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer=true", "optimizer.kind=adamw"),
    ({"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm=false", "gradient norm"),
    ({"tensorboard": {"enabled": True}}, "tensorboard.enabled=true", "tracking.tensorboard"),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "activation_checkpointing.cpu_checkpointing=true",
        "parallel.activation_checkpointing",
    ),
    ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com=true", "zero_optimization.overlap_comm"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights=true", "not a key that a run takes"),
    ({"zero_optimization": {"allgather_bucket_size": 2e8 + 1}}, "allgather_bucket_size=200000001.0", "a multiple of 2"),
    ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm=1", "true or false"),
    ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size=-1", "whole number"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size=0", "whole number, 1 or more"),
    ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "zero_optimization.reduce_bucket_size=1.5", "whole number"),
    ({"zero_optimization": {"reduce_bucket_size": True}}, "zero_optimization.reduce_bucket_size=true", "whole number"),
    ({"zero_optimization": {"reduce_bucket_size": -(10**400)}}, "zero_optimization.reduce_bucket_size=-1000", "whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "theirs", "ours"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_what_contradicts_the_recipe_is_refused_naming_both(
    tmp_path: Path, content: dict[str, Any], theirs: str, ours: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"parallel\.deepspeed_config") as refused:
        check(path)
    message = str(refused.value)
    assert "\n" not in message
    assert f"parallel.deepspeed_config={path}" in message
    assert theirs in message
    assert ours in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("[1]", "must hold an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(write(tmp_path, content))


def test_what_depends_on_the_recipe_is_compared_with_it(tmp_path: Path) -> None:
    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}}
    path = write(tmp_path, offloaded)
    check(path, zero_stage=3, offload="parameters")
    with pytest.raises(ValueError, match=r"offload_param.device.*parallel.offload=optimizer"):
        check(path, zero_stage=3, offload="optimizer")
    sgd = OptimizerConfig(kind="sgd", lr=1e-3, clip_norm=None, momentum=0.8)
    path = write(tmp_path, {"gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"momentum": 0.9}}})
    with pytest.raises(
        ValueError, match=r"optimizer.params.momentum=0.9 contradicts the recipe's optimizer.momentum=0.8"
    ):
        check(path, sgd)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("zero_optimization.overlap_com", "nearest: zero_optimization.overlap_comm"),
        (
            "xyzzy",
            "what can be tuned is in zero_optimization: allgather_bucket_size, contiguous_gradients, ",
        ),
    ],
)
def test_an_unknown_key_is_told_what_there_is(tmp_path: Path, key: str, hint: str) -> None:
    path = write(tmp_path, {key: True})
    with pytest.raises(ValueError, match="is not a key that a run takes") as refused:
        check(path)
    assert f"from a DeepSpeed file; remove it there; {hint}" in str(refused.value)


# Key, its value and the parallel section under which nothing would act on it -> what the message says.
IDLE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("stage3_max_live_parameters", 5, {"zero_stage": 2}, "acts only under parallel.zero_stage=3, and the recipe has 2"),
    ("stage3_prefetch_bucket_size", 5, {"zero_stage": 1}, "acts only under parallel.zero_stage=3, and the recipe has 1"),
    ("sub_group_size", 5, {"zero_stage": 2}, "acts only under parallel.zero_stage=3, and the recipe has 2"),
    ("reduce_bucket_size", 5, {"zero_stage": 0}, "acts only under parallel.zero_stage=1 or 2 or 3, and the recipe has 0"),
    ("overlap_comm", True, {"zero_stage": 0}, "acts only under parallel.zero_stage=1 or 2 or 3, and the recipe has 0"),
    (
        "use_multi_rank_bucket_allreduce", True, {"zero_stage": 3},
        "acts only under parallel.zero_stage=1 or 2, and the recipe has 3",
    ),
    (
        "offload_optimizer", {"pin_memory": True}, {"zero_stage": 2},
        "acts only under parallel.offload=optimizer or parameters, and the recipe has none",
    ),
    (
        "offload_param", {"pin_memory": False}, {"zero_stage": 3, "offload": "optimizer"},
        "acts only under parallel.offload=parameters, and the recipe has optimizer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "parallel", "reason"), IDLE, ids=lambda value: str(value)[:40])
def test_what_the_run_would_not_act_on_is_refused(
    tmp_path: Path, key: str, value: Any, parallel: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path, {"zero_optimization": {key: value}})
    with pytest.raises(ValueError, match=r"parallel\.deepspeed_config") as refused:
        check(path, **parallel)
    message = str(refused.value)
    assert message.startswith(f"parallel.deepspeed_config={path}: zero_optimization.{key}")
    assert message.endswith(f"{reason}; remove it there")


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (3, "parameters")])
def test_deepspeed_knows_every_key_that_is_passed_on(tmp_path: Path, zero_stage: Any, offload: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given: dict[str, Any] = {}
    for dotted, tuning in _TUNING.items():
        if {"zero_stage": zero_stage, "offload": offload}[tuning.acting.key] not in tuning.acting.values:
            continue
        section = given
        *above, key = dotted.split(".")
        for name in above:
            section = section.setdefault(name, {})
        section[key] = True if tuning.kind is bool else 12.0
    path = write(tmp_path, given)
    parallel = ParallelConfig(engine="deepspeed", zero_stage=zero_stage, offload=offload, deepspeed_config=path)
    check(path, zero_stage=zero_stage, offload=offload)
    merged = make_deepspeed_config(parallel, ADAMW, model_elements=1000)["zero_optimization"]
    zero = DeepSpeedZeroConfig(**merged)
    assert zero.reduce_bucket_size == 12
    assert zero.offload_optimizer.pin_memory
    assert zero.stage == zero_stage
    if zero_stage == 3:
        assert zero.offload_param.pin_memory
        assert zero.max_live_parameters == 12


def refuses(take: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    try:
        take(*arguments, **named)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("value", [0, 1])
def test_a_size_is_refused_where_deepspeed_refuses_it(tmp_path: Path, value: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for dotted in (dotted for dotted, tuning in _TUNING.items() if tuning.kind is int and 3 in tuning.acting.values):
        name = dotted.removeprefix("zero_optimization.")
        path = write(tmp_path, {"zero_optimization": {name: value}})
        assert refuses(check, path, zero_stage=3) == refuses(DeepSpeedZeroConfig, **{name: value}), dotted


def test_the_bucket_is_no_larger_than_the_model() -> None:
    parallel = ParallelConfig(engine="deepspeed", zero_stage=3)
    sizes = [
        make_deepspeed_config(parallel, ADAMW, elements)["zero_optimization"]["reduce_bucket_size"]
        for elements in (1000, 10**9)
    ]
    assert sizes == [1000, 50_000_000]
