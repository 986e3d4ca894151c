"""Recipes: what is shipped parses and comes back the same; what is wrong is answered in one line that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import RunConfig
from launch.recipe import SHIPPED_RECIPES, dump_recipe, hash_recipe, load_recipe, parse_recipe, parse_yaml
from models.build import InputShape, build_model
from models.flops import count_parameters
from models.tasks import build_task

SHIPPED = sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))
GOOD = """
run: {name: good, steps: 10}
model: {kind: transformer, layers: 2, width: 32, heads: 2}
task: {kind: language_modelling}
batch: {global_samples: 8, micro_samples: 2}
"""


def test_the_promised_recipes_are_shipped() -> None:
    assert set(SHIPPED) >= {"gpt-stdlib", "lenet-digits", "resnet-digits", "gpt2-124m", "llama-1b"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_comes_back_the_same(name: str) -> None:
    config = load_recipe(name)
    again = parse_recipe(parse_yaml(dump_recipe(config), "dumped"), source="dumped")
    assert again == config
    assert hash_recipe(again) == hash_recipe(config)


def test_every_key_comes_back_the_same() -> None:
    overrides = [
        "run.directory=/some where/ä", "model.dropout=0.25", "model.rope_scaling.factor=8", "data.tokenizer=bpe:300",
        "optimizer.betas=[0.8, 0.99]", "optimizer.clip_norm=null", "parallel.precision=bf16", "checkpoint.every_steps=null",
        "evaluation.prompt='yes: \"no\" # \\n ü'", "run.seed=9223372036854775807", "optimizer.lr=1e-3", "tracking.wandb=off",
    ]  # fmt: skip
    config = load_recipe("gpt-stdlib", overrides)
    assert parse_recipe(parse_yaml(dump_recipe(config), "dumped"), source="dumped") == config
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.optimizer.clip_norm is None
    assert config.optimizer.lr == 1e-3
    assert config.run.seed == 2**63 - 1
    assert config.tracking.wandb == "off"


def test_the_hash_sees_every_change() -> None:
    base = load_recipe("gpt-stdlib")
    changed = [load_recipe("gpt-stdlib", [o]) for o in ("run.seed=1", "optimizer.lr=1e-4", "model.dropout=0.1")]
    assert len({hash_recipe(config) for config in [base, *changed]}) == 4


def shape_of(config: RunConfig) -> InputShape:
    """The data that a shipped recipe expects, without having it."""
    if config.task.kind == "classification":
        return InputShape(channels=1, image_size_pixels=config.data.image_size_pixels, classes=10)
    vocabulary_size = getattr(config.model, "vocabulary_size", None) or 2048
    return InputShape(vocabulary_size=vocabulary_size, sequence_tokens=config.data.sequence_tokens)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2-124m", 124_439_808), ("llama-1b", 1_100_048_384), ("lenet-digits", 61_706)],
)
def test_a_shipped_recipe_builds_at_full_size(name: str, parameters: int) -> None:
    """Forward and backward on the meta device: the sizes are the published ones, and nothing is allocated."""
    config = load_recipe(name)
    shape = shape_of(config)
    with torch.device("meta"):
        model = build_model(config.model, shape)
    assert count_parameters(model) == parameters
    task = build_task(config.task, classes=shape.classes)
    loss = task.loss(model, task.example(shape, config.batch.micro_samples, device="meta"))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


# What is wrong -> (text of the recipe, overrides, what the line must hold).
BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown section": (GOOD + "optimiser: {lr: 0.1}", [], ["optimiser", "nearest: optimizer"]),
    "unknown key": (GOOD, ["run.stepz=3"], ["run.stepz=3", "nearest: run.steps"]),
    "key of another section": (GOOD, ["run.lr=0.1"], ["run.lr=0.1", "nearest: optimizer.lr"]),
    "unknown key of a nested section": (
        GOOD, ["model.rope_scaling={factor: 8, faktor: 4}"], ["model.rope_scaling.faktor=4", "model.rope_scaling.factor"],
    ),
    "unknown key far from all others": (GOOD, ["run.zzzzzz=1"], ["run.zzzzzz=1", "section run has: name, seed, steps"]),
    "key of another model": (GOOD, ["model.pooling=max"], ["model.pooling=max", "unknown key"]),
    "true is no number": (GOOD, ["run.steps=true"], ["run.steps=true", "integer"]),
    "a word is no number": (GOOD, ["optimizer.lr=fast"], ["optimizer.lr=fast", "number"]),
    "a string is no number": (GOOD, ["run.steps='3'"], ['run.steps="3"', "integer"]),
    "half a step": (GOOD, ["run.steps=1.5"], ["run.steps=1.5", "integer"]),
    "a list is no section": (GOOD, ["optimizer.lr=[1]"], ["optimizer.lr=[1]"]),
    "no steps": (GOOD, ["run.steps=0"], ["run.steps=0", "greater than or equal to 1"]),
    "negative rate": (GOOD, ["optimizer.lr=-1"], ["optimizer.lr=-1", "greater than 0"]),
    "not a finite rate": (GOOD + "optimizer: {lr: .inf}", [], ["optimizer.lr"]),
    "dropout of one": (GOOD, ["model.dropout=1.0"], ["model.dropout=1.0", "less than 1"]),
    "unknown choice": (GOOD, ["schedule.kind=cosin"], ["schedule.kind=cosin", "cosine"]),
    "width not divisible": (GOOD, ["model.heads=5"], ["width 32", "heads 5"]),
    "micro-batch above the global one": (GOOD, ["batch.micro_samples=9"], ["micro_samples 9", "global_samples 8"]),
    "warm-up longer than the run": (GOOD, ["schedule.warmup_steps=11"], ["warmup_steps 11", "run.steps 10"]),
    "option of the other optimizer": (GOOD, ["optimizer.momentum=0.5"], ["momentum", "optimizer.kind=adamw"]),
    "end of a schedule that has none": (
        GOOD, ["schedule.kind=constant", "schedule.final_fraction=0.5"], ["final_fraction", "schedule.kind=constant"],
    ),
    "size of images that are text": (GOOD, ["data.image_size_pixels=8"], ["image_size_pixels", "data.source=", "text"]),
    "workers for text": (GOOD, ["data.workers=2"], ["workers means nothing to data.source=", "text"]),
    "augmentation of nothing": (
        GOOD, ["data.source=digits", "data.augmentation.flip=0"], ["data.augmentation", "asks for nothing"],
    ),
    "a misspelt augmentation": (
        GOOD, ["data.source=digits", "data.augmentation.colour_jitter.hew=0.1"],
        ["data.augmentation.colour_jitter.hew", "nearest: data.augmentation.colour_jitter.hue"],
    ),
    "tokens of images": (
        GOOD, ["data.source=digits", "data.sequence_tokens=8"], ["sequence_tokens", "data.source=digits", "images"],
    ),
    "groups of a norm without": (
        "run: {name: a, steps: 1}\nmodel: {kind: resnet, layers: 20, norm: batch, groups: 4}\n"
        "task: {kind: classification}\nbatch: {global_samples: 1, micro_samples: 1}",
        [], ["groups 4", "norm: batch"],
    ),
    "a model of nobody": (
        "run: {name: a, steps: 1}\nmodel: {kind: nowhere_at_all.models:build}\ntask: {kind: classification}\n"
        "batch: {global_samples: 1, micro_samples: 1}",
        [], ["model.kind", "'nowhere_at_all'", "PYTHONPATH"],
    ),
    "samples of text from a classifier": (
        "run: {name: a, steps: 1}\nmodel: {kind: lenet5}\ntask: {kind: classification}\n"
        "batch: {global_samples: 1, micro_samples: 1}\nevaluation: {generated_tokens: 5}",
        [], ["evaluation.generated_tokens", "classification"],
    ),
    "name that is a path": (GOOD, ["run.name=../up"], ["run.name=../up"]),
    "unknown model": (GOOD, ["model.kind=transfomer"], ["transfomer", "transformer"]),
    "unknown task": (GOOD, ["task.kind=language_modeling"], ["language_modeling", "language_modelling"]),
    "unknown source": (GOOD, ["data.source=nowhere:x"], ["data.source", "nowhere:x", "stdlib, digits"]),
    "tokenizer too small": (GOOD, ["data.tokenizer=bpe:100"], ["bpe:100", "257"]),
    "no such ZeRO stage": (GOOD, ["parallel.zero_stage=7"], ["parallel.zero_stage=7", "0, 1, 2 or 3"]),
    "engine that nobody knows": (GOOD, ["parallel.engine=horovod"], ["parallel.engine=horovod", "native"]),
    "precision that is not there": (GOOD, ["parallel.precision=fp8"], ["parallel.precision=fp8", "'bf16' or 'fp16'"]),
    "offload": (
        GOOD, ["parallel.offload=optimizer", "parallel.zero_stage=1"],
        ["parallel.offload=optimizer", "parallel.engine=native", "engines that can: deepspeed"],
    ),
    "offload without sharding": (
        GOOD, ["parallel.engine=deepspeed", "parallel.offload=optimizer"],
        ["parallel.offload=optimizer", "parallel.zero_stage=0", "deepspeed at 1, 2, 3"],
    ),
    "offload of parameters below stage 3": (
        GOOD, ["parallel.engine=deepspeed", "parallel.offload=parameters", "parallel.zero_stage=2"],
        ["parallel.offload=parameters", "parallel.zero_stage=2", "deepspeed at 3"],
    ),
    "replicas under deepspeed": (
        GOOD, ["parallel.engine=deepspeed", "parallel.replicas=2", "parallel.zero_stage=3"],
        ["parallel.replicas=2", "parallel.engine=deepspeed", "engines that can: native"],
    ),
    "DeepSpeed file without DeepSpeed": (
        GOOD, ["parallel.deepspeed_config=ds.json"],
        ["parallel.deepspeed_config=ds.json", "parallel.engine=native", "engines that can: deepspeed"],
    ),
    "DeepSpeed file that is not there": (
        GOOD, ["parallel.engine=deepspeed", "parallel.deepspeed_config=no/such.json"],
        ["parallel.deepspeed_config=no/such.json", "cannot be read"],
    ),
    "replicas": (GOOD, ["parallel.replicas=2"], ["parallel.replicas=2", "native"]),
    "sharding by accelerate": (
        GOOD, ["parallel.engine=accelerate", "parallel.zero_stage=2"],
        ["parallel.zero_stage=2", "parallel.engine=accelerate", "engines that can: ", "native"],
    ),
    "copies of a sharded model by accelerate": (
        GOOD, ["parallel.engine=accelerate", "parallel.replicas=2"], ["parallel.replicas=2", "parallel.engine=accelerate"],
    ),
    "offload by accelerate": (
        GOOD, ["parallel.engine=accelerate", "parallel.offload=optimizer"],
        ["parallel.offload=optimizer", "parallel.engine=accelerate"],
    ),
    "activation checkpointing": (
        GOOD, ["parallel.activation_checkpointing=partial"], ["activation_checkpointing=partial", "'full'"],
    ),
    "section that is a word": (GOOD + "optimizer: adam", [], ["optimizer='adam'", "section"]),
    "section that is empty": (GOOD + "optimizer:", [], ["optimizer=None", "section"]),
    "missing section": ("run: {name: a, steps: 1}\nmodel: {kind: lenet5}", [], ["missing"]),
    "missing key": (GOOD.replace(", steps: 10", ""), [], ["run.steps", "missing"]),
    "missing model kind": (GOOD.replace("kind: transformer, ", ""), [], ["model.kind"]),
    "key twice": (GOOD + "run: {name: other, steps: 5}", [], ["line 6", "'run'", "twice"]),
    "key twice in a section": (GOOD.replace("layers: 2", "layers: 2, layers: 3"), [], ["line 3", "'layers'", "twice"]),
    "not YAML": (GOOD + "optimizer: {lr: 0.1", [], ["line 6"]),
    "tab in YAML": (GOOD + "optimizer:\n\tlr: 0.1", [], ["line 7"]),
    "two documents": (GOOD + "---\n" + GOOD, [], ["bad.yaml"]),
    "a list": ("- run\n- model", [], ["must hold sections"]),
    "empty file": ("", [], ["must hold sections"]),
    "tag that runs code": (GOOD + "optimizer: !!python/object/apply:os.system ['true']", [], ["line 6"]),
    "override without =": (GOOD, ["run.steps"], ["'run.steps'", "section.key=value"]),
    "override without a section": (GOOD, ["steps=3"], ["'steps=3'", "section.key=value"]),
    "override below a value": (GOOD, ["run.steps.more=3"], ["run.steps.more=3", "steps is not a section"]),
    "override that is not YAML": (GOOD, ["run.steps=[1"], ["run.steps=[1"]),
    "override of a section by a word": (GOOD, ["optimizer=adam"], ["'optimizer=adam'", "section.key=value"]),
}  # fmt: skip

# Runs `lockstep` once for each list of arguments in one interpreter that has no torch to import.
_WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from launch.cli import main
answers = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def answers_without_torch(arguments: list[list[str]], cwd: Path) -> list[list[Any]]:
    """[exit code, stdout, stderr] of `lockstep` for each list of arguments; importing torch would be an error."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH],
        cwd=cwd, input=json.dumps(arguments), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answers: list[list[Any]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def bad_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = tmp_path_factory.mktemp("bad")
    lines = []
    for number, (text, overrides, _) in enumerate(BAD.values()):
        path = root / str(number) / "bad.yaml"
        path.parent.mkdir()
        path.write_text(text)
        lines.append(["train", str(path), *overrides])
    return dict(zip(BAD, answers_without_torch(lines, root), strict=True))


@pytest.mark.parametrize("what", BAD)
def test_a_bad_recipe_is_one_clear_line(what: str, bad_answers: dict[str, list[Any]]) -> None:
    code, out, err = bad_answers[what]
    assert code == 2, err
    assert out == ""
    assert err.startswith("lockstep: error: ")
    assert err.count("\n") == 1, err
    for part in BAD[what][2]:
        assert part in err


def test_the_table_starts_from_a_good_recipe(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load_recipe(str(tmp_path / "good.yaml")).run.steps == 10


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("gpt-stdlb", ["'gpt-stdlb'", "nearest: gpt-stdlib"]),
        ("zzz", ["'zzz'", "shipped: gpt-stdlib"]),
        ("no/such.yaml", ["no/such.yaml", "no such file"]),
        (".", ["'.'"]),
    ],
)
def test_an_unknown_recipe_names_the_nearest(recipe: str, parts: list[str], tmp_path: Path) -> None:
    [[code, _, err]] = answers_without_torch([["train", recipe]], tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_recipe_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    [[code, _, err]] = answers_without_torch([["train", "binary.yaml"]], tmp_path)
    assert code == 2
    assert "binary.yaml: cannot be read" in err
    assert err.count("\n") == 1


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    config = load_recipe(str(tmp_path / "good.yaml"), ["run.steps=3", "run.steps=4", "optimizer.lr=0.5"])
    assert (config.run.steps, config.optimizer.lr) == (4, 0.5)


def test_yaml_is_read_as_people_mean_it() -> None:
    assert parse_yaml("{a: off, b: 1e-3, c: 0123, d: no, e: true, f: 2026-01-01, g: 1_000}", "x") == {
        "a": "off", "b": 1e-3, "c": 123, "d": "no", "e": True, "f": "2026-01-01", "g": 1000,
    }  # fmt: skip
