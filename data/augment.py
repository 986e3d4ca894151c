"""How an image becomes a square of pixels: as evaluated, or with random choices keyed by (seed, epoch, sample id).

Pure functions of an image and of hashed words. The transforms are torchvision's (RandomResizedCrop, RandomHorizontalFlip,
ColorJitter, in the order of its reference training; Resize and CenterCrop for evaluation), on Pillow images, whose
resizing is antialiased. Each choice has words of its own: switching one transform off leaves the others as they were.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from data.digest import mix64
from data.draws import integer, key_words, log_uniform, uniform
from data.image_config import AugmentationConfig, ColourJitterConfig, RandomResizedCropConfig
from data.order import derive_key
from data.samples import Choices, SampleIds

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, as Pillow has it."""

FLIP, JITTER_ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, CROP = range(7)
"""The place of each choice among an image's words. A crop takes four for each of its attempts."""
CROP_ATTEMPTS = 10
WORDS = CROP + 4 * CROP_ATTEMPTS

_JITTER_ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


def augmentation_words(choices: Choices, sample_ids: SampleIds) -> npt.NDArray[np.uint64]:
    """The words (n, WORDS) that samples (n,) are altered by: a function of (seed, epoch, id) for each of them."""
    epochs, inverse = np.unique(choices.epochs, return_inverse=True)
    keys = [derive_key(seed=choices.seed, epoch=epoch, purpose="augment") for epoch in epochs.tolist()]
    words = mix64(np.array(keys, dtype=np.uint64)[inverse])
    words += sample_ids.view(np.uint64)
    return key_words(words, WORDS)


def evaluated(image: Image.Image, size: int, shorter_side: int | None, resample: Image.Resampling) -> Image.Image:
    """The image as a square of `size` pixels without any choice.

    Its shorter side is resized to `shorter_side` and the middle cut out; without `shorter_side` the whole image is
    resized to the square, whatever its shape.
    """
    if shorter_side is None:
        return image if image.size == (size, size) else image.resize((size, size), resample)
    width, height = image.size
    shorter = min(width, height)
    # The longer side is rounded down, as torchvision does.
    scaled = (width * shorter_side // shorter, height * shorter_side // shorter)
    if scaled != image.size:
        image = image.resize(scaled, resample)
    left, upper = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return image.crop((left, upper, left + size, upper + size))


def augmented(
    image: Image.Image,
    words: list[int],
    config: AugmentationConfig,
    size: int,
    shorter_side: int | None,
    resample: Image.Resampling,
) -> Image.Image:
    """The image as a square of `size` pixels, altered by its WORDS words."""
    if config.random_resized_crop is None:
        image = evaluated(image, size, shorter_side, resample)
    else:
        # Cut out first: a filter that saw beyond the part would show what is not in it.
        part = image.crop(crop_box(words, image.size, config.random_resized_crop))
        image = evaluated(part, size, None, resample)
    if uniform(words[FLIP]) < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image if config.colour_jitter is None else jittered(image, words, config.colour_jitter)


def crop_box(words: list[int], image_size: tuple[int, int], config: RandomResizedCropConfig) -> Box:
    """A random part of an image (width, height): Inception's crop (Szegedy et al. 2015), as in torchvision.

    The area's share is uniform, the shape log-uniform, the place uniform. A part that does not fit is drawn anew, ten times in
    all; then it is the largest in the middle whose shape is as near to the image's as `ratio` allows.
    """
    width, height = image_size
    for attempt in range(CROP_ATTEMPTS):
        area_word, ratio_word, x_word, y_word = words[CROP + 4 * attempt : CROP + 4 * attempt + 4]
        area = width * height * uniform(area_word, *config.scale)
        ratio = log_uniform(ratio_word, *config.ratio)
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = integer(x_word, width - part_width + 1)
            upper = integer(y_word, height - part_height + 1)
            return left, upper, left + part_width, upper + part_height
    low, high = config.ratio
    part_width = min(width, max(1, round(height * high)))
    part_height = min(height, max(1, round(width / low)))
    left, upper = (width - part_width) // 2, (height - part_height) // 2
    return left, upper, left + part_width, upper + part_height


def jittered(image: Image.Image, words: list[int], config: ColourJitterConfig) -> Image.Image:
    """Brightness, contrast, saturation and hue altered in a random order, each by a uniform factor, as in torchvision."""
    strengths = {BRIGHTNESS: config.brightness, CONTRAST: config.contrast, SATURATION: config.saturation}
    enhancers = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, SATURATION: ImageEnhance.Color}
    for choice in _JITTER_ORDERS[integer(words[JITTER_ORDER], len(_JITTER_ORDERS))]:
        if choice == HUE:
            if config.hue:
                image = _turn_hue(image, uniform(words[HUE], -config.hue, config.hue))
        elif strength := strengths[choice]:
            factor = uniform(words[choice], max(0.0, 1.0 - strength), 1.0 + strength)
            image = enhancers[choice](image).enhance(factor)
    return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hues by a share of the circle, in steps of 1/255 of it, towards 0."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + int(turn * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
