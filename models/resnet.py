"""Residual networks for CIFAR-sized and ImageNet-sized images (He et al. 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Model
from models.config import ResNetConfig
from models.initialisation import initialise_cnn_parameter
from models.norms import make_norm

IMAGENET_STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_EXPANSION = 4
_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class PaddedShortcut(nn.Module):
    """The CIFAR family's shortcut without weights: every second pixel, new channels filled with zeros (option A)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + new_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class ResidualBlock(nn.Module):
    """activation(branch(x) + shortcut(x)). The branch is two 3 x 3 convolutions or, as a bottleneck, 1 x 1, 3 x 3, 1 x 1."""

    def __init__(self, config: ResNetConfig, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        bottleneck = config.layers in (50, 101)
        outputs = width * BOTTLENECK_EXPANSION if bottleneck else width
        if bottleneck:
            self.branch = nn.Sequential(
                *_convolution(config, inputs, width, kernel_size=1, stride=1),
                _ACTIVATIONS[config.activation](),
                *_convolution(config, width, width, kernel_size=3, stride=stride),
                _ACTIVATIONS[config.activation](),
                nn.Conv2d(width, outputs, kernel_size=1, bias=False),
            )
        else:
            self.branch = nn.Sequential(
                *_convolution(config, inputs, width, kernel_size=3, stride=stride),
                _ACTIVATIONS[config.activation](),
                nn.Conv2d(width, outputs, kernel_size=3, padding=1, bias=False),
            )
        self.last_norm = make_norm(config.norm, outputs, config.groups)
        self.shortcut = _shortcut(config, inputs, outputs, stride)
        self.activation = _ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.activation(self.last_norm(self.branch(x)) + self.shortcut(x))


class ResNet(Model):
    """A stem, stages of residual blocks (each but the first halves the image), the mean over pixels, a classifier."""

    def __init__(self, config: ResNetConfig, *, channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        if config.cifar_family:
            widths: tuple[int, ...] = (16, 32, 64)
            stage_blocks: tuple[int, ...] = ((config.layers - 2) // 6,) * 3
        else:
            widths = (64, 128, 256, 512)
            stage_blocks = IMAGENET_STAGE_BLOCKS[config.layers]
        self.stem = _stem(config, channels, widths[0])
        self.stages = nn.ModuleList()
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, stage_blocks, strict=True)):
            blocks = nn.Sequential()
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(config, inputs, width, stride))
                inputs = width * BOTTLENECK_EXPANSION if config.layers in (50, 101) else width
            self.stages.append(blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> logits (B, classes)."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        return self.classifier(maps.mean(dim=(2, 3)))  # (B, C, H, W) -> (B, C) -> (B, classes)

    def blocks(self) -> list[nn.Module]:
        return list(self.stages)

    def initialise_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        initialise_cnn_parameter(
            name,
            parameter,
            generator,
            scheme=self.config.initialisation,
            zero_norms=self.config.zero_initialised_branches,
        )


def _convolution(
    config: ResNetConfig, inputs: int, outputs: int, *, kernel_size: int, stride: int
) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return convolution, make_norm(config.norm, outputs, config.groups)


def _stem(config: ResNetConfig, channels: int, width: int) -> nn.Sequential:
    if config.resolved_stem == "cifar":
        return nn.Sequential(
            *_convolution(config, channels, width, kernel_size=3, stride=1), _ACTIVATIONS[config.activation]()
        )
    return nn.Sequential(
        *_convolution(config, channels, width, kernel_size=7, stride=2),
        _ACTIVATIONS[config.activation](),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )


def _shortcut(config: ResNetConfig, inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if config.cifar_family:
        return PaddedShortcut(outputs - inputs, stride)
    return nn.Sequential(*_convolution(config, inputs, outputs, kernel_size=1, stride=stride))
