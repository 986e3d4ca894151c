"""The `model` and `task` sections of a recipe: what can be asked for, and what is refused before anything is built.

Nothing here imports torch, so that a bad recipe is answered at once. Impossible values are refused one at a time, in
one line that names the key and the way out. Unknown keys and wrong types are pydantic's `ValidationError` (a
`ValueError`); whoever reads the recipe turns it into lines, with `model_config_class(kind).model_fields` for the valid
names.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

USER_CODE_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""How a recipe names a user's own function: `package.module:function`."""

FEED_FORWARD_MULTIPLE = 64
"""A default SwiGLU width is rounded up to a multiple of this, which keeps matrix multiplications on fast tile sizes."""

Initialisation = Literal["he", "xavier"]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RopeScalingConfig(_Section):
    """The frequency scaling of Llama 3.1 and later (Llama 1, 2 and 3.0 have none): wavelengths longer than
    `original_context_tokens / low_frequency_factor` are stretched by `factor`, those shorter than
    `original_context_tokens / high_frequency_factor` are left alone, those between are blended."""

    factor: PositiveFloat
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_context_tokens: PositiveInt = 8192

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor {self.low_frequency_factor} must be below "
                f"high_frequency_factor {self.high_frequency_factor}"
            )
        return self


class TransformerConfig(_Section):
    """A decoder-only transformer.

    GPT-2 is `positions: learned, norm: layernorm, activation: gelu_tanh, bias: true, tied_embeddings: true`. Llama is
    `positions: rope, norm: rmsnorm, activation: swiglu, bias: false`, with `rope_scaling` from Llama 3.1 on.
    """

    kind: Literal["transformer"] = "transformer"
    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    key_value_heads: PositiveInt | None = None
    """Fewer than `heads` is grouped-query attention (Ainslie et al. 2023). None: as many as `heads`."""
    head_width: PositiveInt | None = None
    """None: width / heads."""
    feed_forward_width: PositiveInt | None = None
    """None: 4 x width; with swiglu 8/3 x width rounded up to a multiple of FEED_FORWARD_MULTIPLE."""
    vocabulary_size: PositiveInt | None = None
    """None: the dataset's. May be larger than the dataset's (rows that no token uses), never smaller."""
    context_tokens: PositiveInt | None = None
    """The longest sequence the model takes. None: data.sequence_tokens."""
    positions: Literal["rope", "learned"] = "rope"
    rope_base: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: PositiveFloat = 1e-5
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    bias: bool = False
    """Of every linear layer but the output projection, and of LayerNorm."""
    tied_embeddings: bool = True
    dropout: Probability = 0.0
    """After the embeddings, on the attention weights and after each residual branch, as in GPT-2."""
    initialisation_std: PositiveFloat = 0.02

    @property
    def resolved_key_value_heads(self) -> int:
        return self.key_value_heads or self.heads

    @property
    def resolved_head_width(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def resolved_feed_forward_width(self) -> int:
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        if self.activation != "swiglu":
            return 4 * self.width
        # SwiGLU has three matrices where GELU has two: 8/3 keeps the parameter count (Shazeer 2020).
        return -(-8 * self.width // (3 * FEED_FORWARD_MULTIPLE)) * FEED_FORWARD_MULTIPLE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; change one of them or set head_width"
            )
        if self.heads % self.resolved_key_value_heads:
            raise ValueError(
                f"heads {self.heads} is not divisible by key_value_heads {self.key_value_heads}; "
                "each key/value head serves the same number of heads"
            )
        if self.positions == "rope" and self.resolved_head_width % 2:
            raise ValueError(
                f"positions rope turns pairs of numbers and needs an even head width, not {self.resolved_head_width}; "
                "set head_width or positions: learned"
            )
        if self.positions == "learned" and self.rope_scaling is not None:
            raise ValueError("rope_scaling has no effect with positions: learned; remove it or set positions: rope")
        return self


class LeNetConfig(_Section):
    """LeNet-5 (LeCun et al. 1998): 61,706 parameters for 32 x 32 x 1 images and 10 classes.

    The third layer sees all maps of the second (the paper's table of connections is left out), pooling has no weights,
    and the output is a plain linear layer, as is usual today.
    """

    kind: Literal["lenet5"] = "lenet5"
    activation: Literal["tanh", "relu"] = "tanh"
    pooling: Literal["average", "max"] = "average"
    padding_pixels: Annotated[int, Field(ge=0, le=16)] = 0
    """Zeros put around the image: 2 turns 28 x 28 into the paper's 32 x 32."""
    initialisation: Initialisation = "xavier"


class ConvNetConfig(_Section):
    """A plain ConvNet: per stage two 3 x 3 convolutions and a 2 x 2 max pooling, then the mean over pixels."""

    kind: Literal["convnet"] = "convnet"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128)
    """Channels of each stage."""
    norm: Literal["none", "batch", "group"] = "group"
    groups: PositiveInt = 8
    dropout: Probability = 0.0
    """Before the classifier."""
    initialisation: Initialisation = "he"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_groups(self.norm, self.groups, self.widths)
        return self


class ResNetConfig(_Section):
    """Residual networks (He et al. 2016): 20, 32, 44 and 56 layers are the paper's CIFAR family of 6 n + 2, 8 its smallest;
    18, 34, 50 and 101 are the ImageNet family (with the stride in a bottleneck's 3 x 3 convolution, as usual since)."""

    kind: Literal["resnet"] = "resnet"
    layers: Literal[8, 18, 20, 32, 34, 44, 50, 56, 101]
    stem: Literal["cifar", "imagenet"] | None = None
    """cifar: one 3 x 3 convolution; imagenet: 7 x 7 with stride 2, then pooling. None: that of the family."""
    norm: Literal["batch", "group"] = "batch"
    groups: PositiveInt = 8
    activation: Literal["relu", "silu"] = "relu"
    """silu (Elfwing et al. 2018) is smooth: a last bit that differs never switches a unit on or off."""
    zero_initialised_branches: bool = False
    """Start the last norm of every residual branch at zero, so that each block starts as the identity
    (Goyal et al. 2017)."""
    initialisation: Initialisation = "he"

    @property
    def cifar_family(self) -> bool:
        return self.layers in (8, 20, 32, 44, 56)

    @property
    def resolved_stem(self) -> Literal["cifar", "imagenet"]:
        return self.stem or ("cifar" if self.cifar_family else "imagenet")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cifar_family and self.stem == "imagenet":
            raise ValueError(
                f"layers {self.layers} is of the CIFAR family and has no imagenet stem; "
                "use stem: cifar, or layers 18, 34, 50 or 101"
            )
        _check_groups(self.norm, self.groups, (16,) if self.cifar_family else (64,))
        return self


class CustomModelConfig(_Section):
    """A user's own model: `kind: package.module:build` calls `build(shape, **options)`, see `models.base.Model`."""

    kind: Annotated[str, Field(pattern=USER_CODE_PATTERN)]
    options: dict[str, Any] = {}


def _check_groups(norm: str, groups: int, widths: tuple[int, ...]) -> None:
    if norm != "group" and groups != ResNetConfig.model_fields["groups"].default:
        raise ValueError(f"groups {groups} means nothing to norm: {norm}; remove it")
    for width in widths:
        if norm == "group" and width % groups:
            raise ValueError(
                f"norm group: groups {groups} does not divide {width} channels; choose a divisor of {width}"
            )


_CLASSES: dict[str, type[BaseModel]] = {
    "transformer": TransformerConfig,
    "lenet5": LeNetConfig,
    "convnet": ConvNetConfig,
    "resnet": ResNetConfig,
}


def _tag(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if isinstance(kind, str) and ":" in kind:
        return "custom"
    return kind if isinstance(kind, str) else None


ModelConfig = Annotated[
    Annotated[TransformerConfig, Tag("transformer")]
    | Annotated[LeNetConfig, Tag("lenet5")]
    | Annotated[ConvNetConfig, Tag("convnet")]
    | Annotated[ResNetConfig, Tag("resnet")]
    | Annotated[CustomModelConfig, Tag("custom")],
    Discriminator(_tag),
]
"""Any model's configuration, chosen by `kind`; usable as the type of a pydantic field."""


def model_config_class(kind: str) -> type[BaseModel]:
    """The configuration class of a model kind. ValueError names the nearest valid kinds."""
    if re.match(USER_CODE_PATTERN, kind):
        return CustomModelConfig
    if kind not in _CLASSES:
        raise ValueError(f"model.kind {kind!r} is unknown; {_valid_kinds(kind, list(_CLASSES))}")
    return _CLASSES[kind]


def parse_model(mapping: Mapping[str, Any]) -> ModelConfig:
    """The `model` section as a frozen configuration.

    Raises ValueError where `kind` is missing or unknown, and pydantic's ValidationError for the other keys.
    """
    kind = mapping.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"model.kind {kind!r} is not a name; {_valid_kinds('', list(_CLASSES))}")
    return model_config_class(kind).model_validate(dict(mapping))  # type: ignore[return-value]


class TaskConfig(_Section):
    """What is learned from a batch, and how it is measured.

    `kind` may also be a user's own `package.module:build`, called as
    `build(token_bytes=..., classes=..., **options)`; see `models.tasks.Task`.
    """

    kind: str
    image_mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5,)
    """Per channel (or one for all), of pixels scaled to 0..1. Classification only, like image_std."""
    image_std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5,)
    label_smoothing: Annotated[NonNegativeFloat, Field(lt=1.0)] = 0.0
    """Share of the target spread over all classes while training (Szegedy et al. 2016). Evaluation never smooths."""
    options: dict[str, Any] = {}
    """Keywords for a user's own task."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        known = ["language_modelling", "classification"]
        if kind not in known and not re.match(USER_CODE_PATTERN, kind):
            raise ValueError(f"task.kind {kind!r} is unknown; {_valid_kinds(kind, known)}")
        return kind

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        # Compared with the defaults, not with what was written: the resolved recipe of a run spells out every key.
        used = {
            "language_modelling": {"label_smoothing"},
            "classification": {"label_smoothing", "image_mean", "image_std"},
        }
        for name, field in type(self).model_fields.items():
            if name != "kind" and name not in used.get(self.kind, {"options"}) and getattr(self, name) != field.default:
                raise ValueError(f"{name} has no effect with task.kind {self.kind}; remove it")
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"image_mean has {len(self.image_mean)} values and image_std {len(self.image_std)}; "
                "give both as many, one per channel or one for all"
            )
        return self


def _valid_kinds(kind: str, known: list[str]) -> str:
    near = difflib.get_close_matches(kind, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}valid: {', '.join(known)}, or package.module:build for your own"
