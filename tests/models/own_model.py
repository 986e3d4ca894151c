"""A user's own model and task, as a recipe names them: `kind: tests.models.own_model:build`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.base import Model
from models.build import InputShape
from models.initialisation import constant_, he_
from models.tasks import Classification, LossSum


class Perceptron(Model):
    """Two linear layers over the pixels."""

    def __init__(self, pixels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU())
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.hidden(images))

    def blocks(self) -> list[nn.Module]:
        return [self.hidden]

    def initialise_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias"):
            constant_(parameter, 0.0)
        else:
            he_(parameter, generator)


def build(shape: InputShape, hidden: int = 16) -> Perceptron:
    return Perceptron(shape.channels * shape.image_size_pixels**2, hidden, shape.classes)


def build_text(shape: InputShape) -> str:
    return "not a module"


class Partial(nn.Linear):
    """Says what its blocks are, and not how its parameters start."""

    def blocks(self) -> list[nn.Module]:
        return [self]


def build_partial(shape: InputShape) -> nn.Module:
    return Partial(1, 1)


class ScaledClassification(Classification):
    """Classification with a weighted loss."""

    def __init__(self, classes: int, weight: float) -> None:
        super().__init__(classes)
        self.weight = weight

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
        plain = super().loss(model, batch)
        return LossSum(plain.total * self.weight, plain.items, plain.per_sample * self.weight)


def build_own_task(*, token_bytes: Tensor | None, classes: int, weight: float = 1.0) -> ScaledClassification:
    return ScaledClassification(classes, weight)


def build_wrong_task(*, token_bytes: Tensor | None, classes: int) -> dict[str, int]:
    return {}


NOT_A_FUNCTION = 3
