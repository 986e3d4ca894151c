"""The model and task sections: what they accept, what they refuse, and that asking costs no torch."""

import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError

from models.config import (
    ConvNetConfig,
    CustomModelConfig,
    LeNetConfig,
    ModelConfig,
    ResNetConfig,
    TaskConfig,
    TransformerConfig,
    model_config_class,
    parse_model,
)

GPT = {"kind": "transformer", "layers": 2, "width": 32, "heads": 4}


def test_importing_the_configuration_imports_no_torch_or_numpy():
    code = (
        "import sys, models.config; print([m for m in ('torch', 'numpy', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (GPT, TransformerConfig),
        ({"kind": "lenet5"}, LeNetConfig),
        ({"kind": "convnet", "widths": [8, 16]}, ConvNetConfig),
        ({"kind": "resnet", "layers": 20}, ResNetConfig),
        ({"kind": "package.module:build", "options": {"depth": 3}}, CustomModelConfig),
    ],
)
def test_kind_chooses_the_class_alone_and_inside_a_larger_configuration(settings, expected):
    class Recipe(BaseModel):
        model: ModelConfig

    assert model_config_class(settings["kind"]) is expected
    config = parse_model(settings)
    assert type(config) is expected
    assert Recipe.model_validate({"model": settings}).model == config
    # The resolved recipe spells out every key, and must read back as the same thing.
    assert parse_model(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.kind = "other"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("transfromer", "did you mean transformer"),
        ("lenet", "did you mean lenet5"),
        ("module:", "valid: transformer, lenet5, convnet, resnet, or package.module:build"),
        ("some/path:build", "package.module:build"),
        (None, "model.kind None is not a name"),
    ],
)
def test_an_unknown_kind_names_the_valid_ones(kind, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_model(GPT | {"kind": kind})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GPT | {"heads": 5}, "width 32 is not divisible by heads 5"),
        (GPT | {"key_value_heads": 3}, "heads 4 is not divisible by key_value_heads 3"),
        (GPT | {"width": 12}, "needs an even head width, not 3"),
        (GPT | {"head_width": 5}, "needs an even head width, not 5"),
        (GPT | {"positions": "learned", "rope_scaling": {"factor": 8}}, "rope_scaling has no effect"),
        (GPT | {"rope_scaling": {"factor": 8, "low_frequency_factor": 4}}, "must be below high_frequency_factor"),
        (GPT | {"dropout": 1.0}, "less than 1"),
        (GPT | {"layers": 0}, "greater than 0"),
        (GPT | {"norm_epsilon": float("nan")}, "norm_epsilon"),
        (GPT | {"hedas": 4}, "hedas"),
        ({"kind": "transformer", "width": 32, "heads": 4}, "layers"),
        ({"kind": "resnet", "layers": 19}, "layers"),
        ({"kind": "resnet", "layers": 20, "stem": "imagenet"}, "has no imagenet stem"),
        ({"kind": "resnet", "layers": 20, "norm": "group", "groups": 32}, "groups 32 does not divide 16 channels"),
        ({"kind": "convnet", "widths": []}, "widths"),
        ({"kind": "convnet", "widths": [12], "groups": 8}, "groups 8 does not divide 12 channels"),
        ({"kind": "a.b:c", "depth": 3}, "depth"),
    ],
)
def test_an_impossible_value_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message) as error:
        parse_model(settings)
    for detail in error.value.errors():
        assert "\n" not in detail["msg"]


def test_defaults_that_follow_from_other_keys():
    config = TransformerConfig(layers=1, width=512, heads=8)
    assert (config.resolved_head_width, config.resolved_key_value_heads) == (64, 8)
    assert config.resolved_feed_forward_width == 1408  # 8/3 x 512 = 1365.3, up to a multiple of 64
    assert config.model_copy(update={"width": 96}).resolved_feed_forward_width == 256  # exactly 8/3 x 96
    assert config.model_copy(update={"activation": "gelu"}).resolved_feed_forward_width == 2048
    assert ResNetConfig(layers=20).resolved_stem == "cifar"
    assert ResNetConfig(layers=18).resolved_stem == "imagenet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "classify"}, "did you mean classification"),
        ({"kind": "language_modelling", "image_mean": (0.1,)}, "image_mean has no effect"),
        ({"kind": "classification", "options": {"a": 1}}, "options has no effect"),
        ({"kind": "a.b:c", "label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"kind": "classification", "image_mean": (0.1, 0.2, 0.3)}, "image_mean has 3 values and image_std 1"),
        ({"kind": "classification", "image_std": (0.0,)}, "greater than 0"),
        ({"kind": "classification", "label_smoothing": 1.0}, "less than 1"),
    ],
)
def test_a_task_refuses_what_it_would_ignore(settings, message):
    with pytest.raises(ValidationError, match=message):
        TaskConfig.model_validate(settings)


@pytest.mark.parametrize("kind", ["language_modelling", "classification", "own.tasks:build"])
def test_a_resolved_task_reads_back(kind):
    config = TaskConfig(kind=kind)
    assert TaskConfig.model_validate(config.model_dump(mode="json")) == config
