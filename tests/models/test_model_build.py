"""Building models: known sizes, shapes that do not fit, a user's own model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.attention import RotaryPositions, rotary_frequencies
from models.build import InputShape, build_model
from models.config import parse_model
from models.flops import count_parameters
from models.norms import BatchNorm
from models.resnet import PaddedShortcut
from tests.models.model_helpers import ALL_MODELS, IMAGE_SHAPE, TEXT_SHAPE, TINY_GPT, make
from tests.models.own_model import Perceptron

GPT2 = {"kind": "transformer", "layers": 12, "width": 768, "heads": 12, "positions": "learned", "norm": "layernorm"}
GPT2 |= {"activation": "gelu_tanh", "bias": True}
LLAMA = {"kind": "transformer", "layers": 16, "width": 2048, "heads": 32, "key_value_heads": 8}
LLAMA |= {"feed_forward_width": 8192}
TINY_LLAMA = {"kind": "transformer", "layers": 22, "width": 2048, "heads": 32, "key_value_heads": 4}
TINY_LLAMA |= {"feed_forward_width": 5632, "tied_embeddings": False}
IMAGENET = InputShape(channels=3, image_size_pixels=224, classes=1000)
CIFAR = InputShape(channels=3, image_size_pixels=32, classes=10)


@pytest.mark.parametrize(
    ("settings", "shape", "parameters"),
    [
        (GPT2, InputShape(vocabulary_size=50257, sequence_tokens=1024), 124_439_808),
        (LLAMA, InputShape(vocabulary_size=128_256, sequence_tokens=8192), 1_235_814_400),
        (TINY_LLAMA, InputShape(vocabulary_size=32_000, sequence_tokens=2048), 1_100_048_384),
        ({"kind": "resnet", "layers": 18}, IMAGENET, 11_689_512),
        ({"kind": "resnet", "layers": 34}, IMAGENET, 21_797_672),
        ({"kind": "resnet", "layers": 50}, IMAGENET, 25_557_032),
        ({"kind": "resnet", "layers": 101}, IMAGENET, 44_549_160),
        ({"kind": "resnet", "layers": 50, "norm": "group", "groups": 32}, IMAGENET, 25_557_032),
        ({"kind": "resnet", "layers": 20}, CIFAR, 269_722),
        ({"kind": "resnet", "layers": 56}, CIFAR, 853_018),
        ({"kind": "resnet", "layers": 18, "stem": "cifar"}, CIFAR, 11_173_962),
        ({"kind": "lenet5"}, InputShape(channels=1, image_size_pixels=32, classes=10), 61_706),
        ({"kind": "lenet5", "padding_pixels": 2}, InputShape(channels=1, image_size_pixels=28, classes=10), 61_706),
    ],
)
def test_parameter_counts_are_the_published_ones(settings, shape, parameters):
    with torch.device("meta"):
        assert count_parameters(build_model(parse_model(settings), shape)) == parameters


@pytest.mark.parametrize(("settings", "shape"), ALL_MODELS)
def test_every_model_gives_finite_logits_and_a_gradient_to_every_parameter(settings, shape):
    model = make(settings, shape)
    if shape.vocabulary_size is not None:
        logits = model(torch.arange(24).view(2, 12))
        assert logits.shape == (2, 12, shape.vocabulary_size)
    else:
        logits = model(torch.linspace(-1, 1, 2 * 32 * 32).sin().view(2, 1, 32, 32))
        assert logits.shape == (2, shape.classes)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("settings", "shape"), ALL_MODELS)
def test_blocks_are_distinct_parts_of_the_model_and_do_not_overlap(settings, shape):
    model = make(settings, shape)
    blocks = model.blocks()
    assert blocks
    modules = set(model.modules())
    owned = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert all(block in modules for block in blocks)
    assert len(owned) == len(set(owned)) > 0


def test_the_transformer_does_not_see_the_future():
    model = make(TINY_GPT, TEXT_SHAPE).eval()
    tokens = torch.arange(12).view(1, 12)
    changed = tokens.clone()
    changed[0, 7] = 40
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_dropout_acts_in_training_only():
    model = make(TINY_GPT | {"dropout": 0.5}, TEXT_SHAPE)
    tokens = torch.arange(12).view(1, 12)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_rotary_tables_survive_casts_and_the_meta_device():
    expected = RotaryPositions(8, 4096, 10_000.0, None)
    angles = torch.outer(torch.arange(4096).double(), rotary_frequencies(8, 10_000.0, None).double())
    torch.testing.assert_close(expected.signed_sines[:, 4:].double(), angles.sin(), rtol=0, atol=3e-4)
    cast = RotaryPositions(8, 4096, 10_000.0, None).bfloat16()
    assert cast.signed_sines.dtype == torch.float32
    assert torch.equal(cast.signed_sines, expected.signed_sines)
    with torch.device("meta"):
        late = RotaryPositions(8, 4096, 10_000.0, None)
    assert late.signed_sines.is_meta
    late.to_empty(device="cpu")
    assert torch.equal(late.cosines, expected.cosines)


def test_buffers_can_be_set_after_meta_construction():
    for settings, shape in ALL_MODELS:
        expected = dict(build_model(parse_model(settings), shape).named_buffers())
        with torch.device("meta"):
            model = build_model(parse_model(settings), shape)
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)
        model.initialise_buffers()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name


def test_batch_norm_is_torchs_and_keeps_its_statistics_in_fp32():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm2d(4)
    for seed in range(3):
        maps = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) + 2
        assert torch.equal(ours(maps), theirs(maps))
    ours.eval()
    theirs.eval()
    assert torch.equal(ours(maps), theirs(maps))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ours.bfloat16().train()
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert ours(maps.bfloat16()).dtype == torch.bfloat16
    assert ours.running_var.dtype == torch.float32


def test_the_cifar_shortcut_keeps_every_second_pixel_and_pads_with_zeros():
    x = torch.randn(2, 3, 4, 4)
    shortcut = PaddedShortcut(new_channels=2, stride=2)(x)
    assert torch.equal(shortcut[:, :3], F.max_pool2d(x, kernel_size=1, stride=2))
    assert torch.equal(shortcut[:, 3:], torch.zeros(2, 2, 2, 2))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        (TINY_GPT | {"vocabulary_size": 40}, TEXT_SHAPE, "vocabulary_size 40 is smaller than the data's 50"),
        (TINY_GPT | {"context_tokens": 8}, TEXT_SHAPE, "context_tokens 8 is shorter than data.sequence_tokens 12"),
        (TINY_GPT, IMAGE_SHAPE, "needs a vocabulary size"),
        ({"kind": "lenet5"}, TEXT_SHAPE, "needs image channels"),
        ({"kind": "lenet5"}, InputShape(channels=1, image_size_pixels=8, classes=10), "8 pixels are too small"),
        ({"kind": "convnet"}, InputShape(channels=1, image_size_pixels=7, classes=10), "7 pixels are too small"),
        ({"kind": "resnet", "layers": 20}, InputShape(channels=1, image_size_pixels=8), "a number of classes"),
        ({"kind": "nowhere.at_all:build"}, IMAGE_SHAPE, "no module named 'nowhere'"),
        ({"kind": "tests.models.own_model:bilud"}, IMAGE_SHAPE, "tests.models.own_model has no function 'bilud'"),
        ({"kind": "tests.models.own_model:NOT_A_FUNCTION"}, IMAGE_SHAPE, "has no function 'NOT_A_FUNCTION'"),
        ({"kind": "tests.models.own_model:build_text"}, IMAGE_SHAPE, "returned a str, not a torch.nn.Module"),
        (
            {"kind": "tests.models.own_model:build_partial"},
            IMAGE_SHAPE,
            r"Partial has no method initialise_parameter\(\)",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(settings, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(parse_model(settings), shape)
    assert "\n" not in str(error.value)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than the model's 12"):
        make(TINY_GPT, TEXT_SHAPE)(torch.zeros(1, 13, dtype=torch.int64))


def test_a_larger_vocabulary_and_context_than_the_data_need():
    model = make(TINY_GPT | {"vocabulary_size": 64, "context_tokens": 100}, TEXT_SHAPE)
    assert model(torch.zeros(1, 100, dtype=torch.int64)).shape == (1, 100, 64)


def test_a_users_own_model_is_built_with_its_options():
    model = make({"kind": "tests.models.own_model:build", "options": {"hidden": 5}}, IMAGE_SHAPE)
    assert type(model) is Perceptron
    assert count_parameters(model) == 32 * 32 * 5 + 5 + 5 * 10 + 10
    assert model(torch.zeros(3, 1, 32, 32)).shape == (3, 10)


def test_an_error_inside_a_users_module_is_shown_as_it_is(tmp_path: Path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('mine')\n")
    code = (
        "from models.build import InputShape, build_model; from models.config import parse_model;"
        "build_model(parse_model({'kind': 'broken:build'}), InputShape())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("RuntimeError: mine")
