"""From a configuration and the shape of the data to a model."""

import inspect
from dataclasses import dataclass

from torch import nn

from models.config import ConvNetConfig, CustomModelConfig, LeNetConfig, ModelConfig, ResNetConfig, TransformerConfig
from models.convnet import ConvNet
from models.lenet import LeNet
from models.resnet import ResNet
from models.transformer import Transformer
from models.user_code import call_function, check_methods, load_function


@dataclass(frozen=True)
class InputShape:
    """What a model and a task must know of the data: the text fields or the image fields, the others None.

    `separate_documents`: batches say which document each token belongs to, and the model takes that as `documents`.
    """

    vocabulary_size: int | None = None
    sequence_tokens: int | None = None
    separate_documents: bool = False
    channels: int | None = None
    image_size_pixels: int | None = None
    classes: int | None = None


def build_model(config: ModelConfig, shape: InputShape) -> nn.Module:
    """The model's modules, on the current default device (`torch.device("meta")` included).

    The values of its parameters are not the initial ones yet: those are set by `initialise_parameter`. ValueError
    where model and data do not fit.
    """
    if isinstance(config, CustomModelConfig):
        return _build_custom(config, shape)
    if isinstance(config, TransformerConfig):
        return _build_transformer(config, shape)
    channels = _required(shape.channels, config.kind, "image channels")
    image_size_pixels = _required(shape.image_size_pixels, config.kind, "an image size")
    classes = _required(shape.classes, config.kind, "a number of classes")
    if isinstance(config, LeNetConfig):
        return LeNet(config, channels=channels, image_size_pixels=image_size_pixels, classes=classes)
    if isinstance(config, ConvNetConfig):
        return ConvNet(config, channels=channels, image_size_pixels=image_size_pixels, classes=classes)
    assert isinstance(config, ResNetConfig)
    return ResNet(config, channels=channels, classes=classes)


def _build_transformer(config: TransformerConfig, shape: InputShape) -> nn.Module:
    vocabulary_size = _required(
        config.vocabulary_size or shape.vocabulary_size, config.kind, "a vocabulary size or model.vocabulary_size"
    )
    if shape.vocabulary_size is not None and shape.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size {vocabulary_size} is smaller than the data's {shape.vocabulary_size}; "
            "raise it, or leave it out to take the data's"
        )
    context_tokens = _required(
        config.context_tokens or shape.sequence_tokens, config.kind, "a sequence length or model.context_tokens"
    )
    if shape.sequence_tokens is not None and shape.sequence_tokens > context_tokens:
        raise ValueError(
            f"model.context_tokens {context_tokens} is shorter than data.sequence_tokens {shape.sequence_tokens}; "
            "raise it or shorten the sequences"
        )
    return Transformer(config, vocabulary_size=vocabulary_size, context_tokens=context_tokens)


def _build_custom(config: CustomModelConfig, shape: InputShape) -> nn.Module:
    model = call_function(load_function(config.kind, "model.kind"), config.kind, "model", shape, **config.options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.kind {config.kind}: returned a {type(model).__name__}, not a torch.nn.Module")
    methods = ("blocks", "initialise_parameter", "initialise_buffers")
    if shape.separate_documents and "documents" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model.kind {config.kind}: its forward takes no `documents`, which data.separate_documents needs (see "
            "models/transformer.py); add it, or leave data.separate_documents out"
        )
    if any(hasattr(model, method) for method in methods):
        # A plain module is taken as it is, initialised by its submodules; one that offers a part must offer all of it.
        check_methods(model, methods, config.kind, "model.kind", "models/base.py")
    return model


def _required(value: int | None, kind: str, what: str) -> int:
    if value is None:
        raise ValueError(f"model.kind {kind} needs {what}, and the data has none; choose a model that fits the data")
    return value
