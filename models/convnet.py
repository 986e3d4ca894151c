"""A small plain ConvNet."""

import torch
from torch import Tensor, nn

from models.base import Model
from models.config import ConvNetConfig
from models.initialisation import initialise_cnn_parameter
from models.norms import make_norm


class ConvNet(Model):
    """Stages of two 3 x 3 convolutions and a pooling that halves, the mean over pixels, a linear classifier."""

    def __init__(self, config: ConvNetConfig, *, channels: int, image_size_pixels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        smallest_pixels = 2 ** len(config.widths)
        if image_size_pixels < smallest_pixels:
            raise ValueError(
                f"images of {image_size_pixels} pixels are too small for convnet with {len(config.widths)} stages, "
                f"which needs {smallest_pixels}; shorten model.widths or set data.image_size_pixels"
            )
        inputs = (channels, *config.widths[:-1])
        self.stages = nn.ModuleList(
            _stage(config, stage_input, width) for stage_input, width in zip(inputs, config.widths, strict=True)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> logits (B, classes)."""
        maps = images
        for stage in self.stages:
            maps = stage(maps)  # (B, width of the stage, H / 2, W / 2)
        features = maps.mean(dim=(2, 3))  # (B, last width)
        return self.classifier(self.dropout(features))

    def blocks(self) -> list[nn.Module]:
        return list(self.stages)

    def initialise_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        initialise_cnn_parameter(name, parameter, generator, scheme=self.config.initialisation)


def _stage(config: ConvNetConfig, inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, width):
        # A norm with its own shift makes the convolution's bias useless.
        layers += [
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=config.norm == "none"),
            make_norm(config.norm, width, config.groups),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
