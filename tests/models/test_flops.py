"""FLOPs per sample against closed forms, and peaks that are never another device's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import InputShape, build_model
from models.config import TaskConfig, parse_model
from models.flops import count_parameters, peak_flops, training_flops_per_sample
from models.tasks import build_task
from tests.models.model_helpers import IMAGE_SHAPE, TEXT_SHAPE, TINY_GPT, make


def counted(settings: dict, shape: InputShape) -> int:
    kind = "classification" if shape.classes else "language_modelling"
    task = build_task(TaskConfig(kind=kind), classes=shape.classes)
    return training_flops_per_sample(lambda: build_model(parse_model(settings), shape), task, shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False},
        {"key_value_heads": 2},
        {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "dropout": 0.1},
    ],
)
def test_a_transformer_costs_six_n_and_attention(changes):
    layers, width, tokens, vocabulary = 3, 64, 48, 200
    settings = {"kind": "transformer", "layers": layers, "width": width, "heads": 4} | changes
    shape = InputShape(vocabulary_size=vocabulary, sequence_tokens=tokens)
    with torch.device("meta"):
        model = build_model(parse_model(settings), shape)
    # Parameters that take part in a matrix multiplication: the embedding only where it is the output projection too.
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embedding" not in name
    )
    if settings.get("tied_embeddings", True):
        matrices += vocabulary * width
    # PaLM (Chowdhery et al. 2022), appendix B: (6 N + 12 L H Q T) per token, with H Q = width.
    assert counted(settings, shape) == (6 * matrices + 12 * layers * width * tokens) * tokens


def test_attention_on_the_cpu_is_not_counted_which_is_why_the_meta_device_is_used():
    shape = (1, 2, 16, 8)
    counts = {}
    for device in ("cpu", "meta"):
        query = torch.zeros(shape, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        counts[device] = counter.get_total_flops()
    assert counts == {"cpu": 0, "meta": 3 * 2 * (2 * 2 * 16 * 16 * 8)}


def test_lenet_by_hand():
    convolution1 = 28 * 28 * 6 * 25  # multiply-adds: output pixels x maps x receptive field x input maps
    convolution2 = 10 * 10 * 16 * 25 * 6
    dense = 400 * 120 + 120 * 84 + 84 * 10
    # The first layer has no gradient to hand to its input: twice the forward cost instead of three times.
    expected = 2 * (2 * convolution1 + 3 * (convolution2 + dense))
    assert counted({"kind": "lenet5"}, InputShape(channels=1, image_size_pixels=32, classes=10)) == expected


def test_resnet50_forward_and_backward_are_three_times_the_published_forward():
    shape = InputShape(channels=3, image_size_pixels=224, classes=1000)
    # 4.09 G multiply-adds at 224 pixels; the stem's missing input gradient is 0.12 G of them.
    assert counted({"kind": "resnet", "layers": 50}, shape) == pytest.approx(2 * (3 * 4.09e9 - 0.118e9), rel=2e-3)


def test_batch_norm_on_a_single_pixel_can_be_counted():
    shape = InputShape(channels=3, image_size_pixels=32, classes=10)  # the last stage of an imagenet stem sees 1 x 1
    assert counted({"kind": "resnet", "layers": 18}, shape) > 0


def test_tied_parameters_count_once():
    layer = torch.nn.Linear(3, 3, bias=False)
    assert count_parameters(torch.nn.Sequential(layer, layer)) == 9


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        # Near a known name, and another device: a slice, a laptop, an export version, nothing known.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H20", None, None),
        ("cpu", None, None),
        ("", None, None),
    ],
)
def test_peaks(name, bf16, fp32):
    assert peak_flops(name, torch.bfloat16) == pytest.approx(bf16)
    assert peak_flops(name, torch.float32) == pytest.approx(fp32)
    assert peak_flops(name, torch.float64) is None


@pytest.mark.parametrize("kind", ["language_modelling", "classification"])
def test_a_task_that_was_counted_with_still_works_on_real_tensors(kind):
    text = kind == "language_modelling"
    shape, settings = (TEXT_SHAPE, TINY_GPT) if text else (IMAGE_SHAPE, {"kind": "lenet5"})
    task = build_task(TaskConfig(kind=kind), classes=10, token_bytes=torch.ones(50, dtype=torch.int64))
    model = make(settings, shape)
    batch = task.example(shape, 2)
    expected = task.summarise(task.evaluate(model, batch))
    assert training_flops_per_sample(lambda: build_model(parse_model(settings), shape), task, shape) > 0
    with torch.device("meta"):
        task.evaluate(build_model(parse_model(settings), shape), task.example(shape, 2, device="meta"))
    assert task.summarise(task.evaluate(model, batch)) == expected
