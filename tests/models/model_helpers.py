"""What several tests of the models need: a small model with real initial values."""

import hashlib

import torch
from torch import nn

from models.build import InputShape, build_model
from models.config import parse_model

TEXT_SHAPE = InputShape(vocabulary_size=50, sequence_tokens=12)
IMAGE_SHAPE = InputShape(channels=1, image_size_pixels=32, classes=10)

TINY_GPT = {"kind": "transformer", "layers": 2, "width": 32, "heads": 4}
ALL_MODELS = [
    (TINY_GPT, TEXT_SHAPE),
    (TINY_GPT | {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True}, TEXT_SHAPE),
    (TINY_GPT | {"key_value_heads": 2, "tied_embeddings": False}, TEXT_SHAPE),
    ({"kind": "lenet5"}, IMAGE_SHAPE),
    ({"kind": "convnet", "widths": (8, 16), "norm": "batch"}, IMAGE_SHAPE),
    ({"kind": "convnet", "widths": (8, 16), "norm": "none"}, IMAGE_SHAPE),
    ({"kind": "resnet", "layers": 20}, IMAGE_SHAPE),
    ({"kind": "resnet", "layers": 20, "norm": "group"}, IMAGE_SHAPE),
    ({"kind": "resnet", "layers": 50, "stem": "cifar", "norm": "group"}, IMAGE_SHAPE),
]


def generator_for(seed: int, name: str, shape: torch.Size) -> torch.Generator:
    """A generator that depends on (seed, name, shape) and nothing else, as the engines make it."""
    digest = hashlib.sha256(f"{seed}|{name}|{tuple(shape)}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "little"))


def initialise(model: nn.Module, seed: int = 0, *, backwards: bool = False) -> nn.Module:
    named = list(model.named_parameters())
    for name, parameter in reversed(named) if backwards else named:
        model.initialise_parameter(name, parameter, generator_for(seed, name, parameter.shape))
    model.initialise_buffers()
    return model


def make(settings: dict, shape: InputShape, seed: int = 0) -> nn.Module:
    return initialise(build_model(parse_model(settings), shape), seed)
