"""The recipe's `data.augmentation`: how training images are altered. Imports no torch and no numpy."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RandomResizedCropConfig(_Section):
    """A random part of the image, resized to the final square (Szegedy et al. 2015)."""

    scale: tuple[Positive, Positive] = Field((0.08, 1.0), description="the part's share of the area, uniform")
    ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="its width / height, log-uniform")

    @model_validator(mode="after")
    def _ranges_rise(self) -> "RandomResizedCropConfig":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} runs from {low} down to {high}; give the lower end first")
        if self.scale[1] > 1.0:
            raise ValueError(f"scale ends at {self.scale[1]}, more than the whole image; end it at 1 or less")
        if max(self.ratio[1], 1 / self.ratio[0]) > 1000:
            raise ValueError(f"ratio {self.ratio} reaches beyond 1:1000; narrow it")
        return self


class ColourJitterConfig(_Section):
    """Colours altered in a random order, each by a random factor (torchvision's ColorJitter)."""

    brightness: float = Field(0.0, ge=0.0, description="factor of [max(0, 1 - b), 1 + b] towards black")
    contrast: float = Field(0.0, ge=0.0, description="likewise towards the image's mean grey")
    saturation: float = Field(0.0, ge=0.0, description="likewise towards the grey image")
    hue: float = Field(0.0, ge=0.0, le=0.5, description="turn of the colour circle, of [-h, h]")

    @model_validator(mode="after")
    def _alters_something(self) -> "ColourJitterConfig":
        if not any((self.brightness, self.contrast, self.saturation, self.hue)):
            raise ValueError("colour_jitter with nothing above 0 has no effect; remove it")
        return self


class AugmentationConfig(_Section):
    """How training images are altered; evaluation sees them unaltered. Every choice is keyed by (run.seed, epoch, sample)."""

    random_resized_crop: RandomResizedCropConfig | None = Field(
        None, description="null: the image as evaluation sees it"
    )
    flip: Probability = Field(0.0, description="probability that left and right change places")
    colour_jitter: ColourJitterConfig | None = Field(None, description="null: colours as they are")
    mixup_alpha: Positive | None = Field(
        None, description="mix pairs of images with a weight of Beta(alpha, alpha) (Zhang et al. 2018); null: never"
    )
    cutmix_alpha: Positive | None = Field(
        None, description="paste a part of area 1 - Beta(alpha, alpha) of the partner (Yun et al. 2019); null: never"
    )

    @model_validator(mode="after")
    def _alters_something(self) -> "AugmentationConfig":
        parts = (self.random_resized_crop, self.colour_jitter, self.mixup_alpha, self.cutmix_alpha)
        if not self.flip and all(part is None for part in parts):
            raise ValueError("augmentation that asks for nothing has no effect; remove it")
        return self

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with each other."""
        return self.mixup_alpha is not None or self.cutmix_alpha is not None
