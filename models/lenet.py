"""LeNet-5, the convolutional network of LeCun et al. 1998."""

import torch
from torch import Tensor, nn

from models.base import Model
from models.config import LeNetConfig
from models.initialisation import initialise_cnn_parameter


class LeNet(Model):
    """Two convolution and pooling stages, then three linear layers."""

    def __init__(self, config: LeNetConfig, *, channels: int, image_size_pixels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        # 5 x 5 without padding takes 4 pixels away; pooling halves, rounding down.
        map_pixels = ((image_size_pixels + 2 * config.padding_pixels - 4) // 2 - 4) // 2
        if map_pixels < 1:
            raise ValueError(
                f"images of {image_size_pixels} pixels are too small for lenet5, which needs 16 after padding; "
                "set data.image_size_pixels or model.padding_pixels"
            )
        activation = nn.Tanh if config.activation == "tanh" else nn.ReLU
        pooling = nn.AvgPool2d if config.pooling == "average" else nn.MaxPool2d
        self.stage1 = nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5, padding=config.padding_pixels), activation(), pooling(2)
        )
        self.stage2 = nn.Sequential(nn.Conv2d(6, 16, kernel_size=5), activation(), pooling(2))
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * map_pixels**2, 120),
            activation(),
            nn.Linear(120, 84),
            activation(),
        )
        self.classifier = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> logits (B, classes)."""
        maps = self.stage2(self.stage1(images))  # (B, 16, map_pixels, map_pixels)
        return self.classifier(self.dense(maps))

    def blocks(self) -> list[nn.Module]:
        return [self.stage1, self.stage2, self.dense]

    def initialise_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        initialise_cnn_parameter(name, parameter, generator, scheme=self.config.initialisation)
