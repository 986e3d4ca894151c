"""Initial values: the right distributions, and nothing but the generator in them."""

import math

import pytest
import torch

from models.build import InputShape, build_model
from models.config import parse_model
from models.initialisation import fans, he_, xavier_
from tests.models.model_helpers import ALL_MODELS, IMAGE_SHAPE, generator_for, initialise, make


@pytest.mark.parametrize(("settings", "shape"), ALL_MODELS)
def test_values_depend_on_neither_order_nor_how_the_model_was_made(settings, shape):
    expected = make(settings, shape).state_dict()
    torch.manual_seed(99)  # must not matter
    with torch.device("meta"):
        model = build_model(parse_model(settings), shape)
    model.to_empty(device="cpu")
    initialise(model, backwards=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    other_seed = make(settings, shape, seed=1).state_dict()
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in other_seed.items())


@pytest.mark.parametrize(("settings", "shape"), ALL_MODELS)
def test_initialisation_uses_no_global_random_state(settings, shape):
    model = build_model(parse_model(settings), shape)
    before = torch.random.get_rng_state()
    initialise(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_lower_precision_parameter_is_the_rounded_fp32_value():
    shape = torch.Size((64, 32))
    single, half = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    he_(single, generator_for(0, "w", shape))
    he_(half, generator_for(0, "w", shape))
    assert torch.equal(single.bfloat16(), half)


def test_transformer_statistics():
    shape = InputShape(vocabulary_size=2000, sequence_tokens=256)
    settings = {"kind": "transformer", "layers": 4, "width": 256, "heads": 4, "bias": True, "norm": "layernorm"}
    model = make(settings | {"positions": "learned", "tied_embeddings": False}, shape)
    branch_ends = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            ends_branch = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            branch_ends += ends_branch
            std = 0.02 / math.sqrt(8) if ends_branch else 0.02
            # The standard error of a sample's deviation is std / sqrt(2n), of its mean std / sqrt(n): 5 of each.
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert branch_ends == 8


def test_the_first_loss_is_that_of_guessing():
    model = make(
        {"kind": "transformer", "layers": 6, "width": 128, "heads": 4, "tied_embeddings": False},
        InputShape(vocabulary_size=1000, sequence_tokens=64),
    )
    tokens = (torch.arange(4 * 64) * 7919 % 1000).view(4, 64)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
    assert abs(loss.item() - math.log(1000)) < 0.1


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), [((300, 200), 200, 300), ((64, 32, 3, 3), 288, 576)])
def test_xavier_and_he_statistics(shape, fan_in, fan_out):
    weight = torch.empty(shape)
    assert fans(weight.shape) == (fan_in, fan_out)
    tolerance = 5 / math.sqrt(2 * weight.numel())
    xavier_(weight, generator_for(0, "w", weight.shape))
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=tolerance)
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.99 * bound < weight.abs().max().item() <= bound
    he_(weight, generator_for(0, "w", weight.shape))
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)


def test_a_vector_has_no_fan_in():
    with pytest.raises(ValueError, match=r"shape \(3,\) has no fan-in"):
        he_(torch.empty(3), torch.Generator())


def test_he_keeps_the_scale_of_activations_through_a_deep_plain_network():
    settings = {"kind": "convnet", "widths": (32, 32, 32), "norm": "none"}
    images = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    shape = InputShape(channels=1, image_size_pixels=64, classes=10)
    scales = {}
    for scheme in ("he", "xavier"):
        model = make(settings | {"initialisation": scheme}, shape)
        maps = images
        for stage in model.stages:
            for layer in list(stage)[:-1]:  # pooling takes maxima and would raise the scale
                maps = layer(maps)
        scales[scheme] = maps.square().mean().item()
    assert 0.1 < scales["he"] < 10
    assert scales["xavier"] < 0.05 * scales["he"]  # the control: half the variance is lost at every ReLU


def test_zero_initialised_branches_make_every_block_an_identity():
    settings = {"kind": "resnet", "layers": 20, "zero_initialised_branches": True}
    model = make(settings, IMAGE_SHAPE)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(model.stages[0][1](x), x)
    plain = make(settings | {"zero_initialised_branches": False}, IMAGE_SHAPE)
    assert not torch.allclose(plain.stages[0][1](x), x)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_cnn_norms_start_at_one_and_the_classifier_without_the_gain_for_relu(norm):
    model = make(
        {"kind": "resnet", "layers": 18, "norm": norm}, InputShape(channels=3, image_size_pixels=32, classes=1000)
    )
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert all((value == (0 if name.endswith("bias") else 1)).all() for name, value in weights.items())
    assert model.classifier.weight.std().item() == pytest.approx(math.sqrt(1 / 512), rel=0.01)
