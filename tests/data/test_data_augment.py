"""Augmentation: each choice has its law and its key, and does to the pixels what its definition says."""

import colorsys
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from data.augment import (
    BRIGHTNESS,
    CROP,
    FLIP,
    HUE,
    JITTER_ORDER,
    WORDS,
    augmentation_words,
    augmented,
    crop_box,
    evaluated,
    jittered,
)
from data.draws import integer, uniform
from data.image_config import AugmentationConfig, ColourJitterConfig, RandomResizedCropConfig
from data.samples import Choices

# p-values of fixed words cannot flicker; below this a law would be wrong.
DOUBTFUL = 1e-3
BILINEAR = Image.Resampling.BILINEAR


def words_of(count: int, seed: int = 0, epoch: int = 0, first_id: int = 0) -> list[list[int]]:
    ids = np.arange(first_id, first_id + count)
    return augmentation_words(Choices(seed, np.full(count, epoch)), ids).tolist()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def whole(image: Image.Image, words: list[int], size: int, **config: Any) -> np.ndarray:
    return np.asarray(augmented(image, words, AugmentationConfig.model_validate(config), size, None, BILINEAR))


def test_choices_that_must_never_change() -> None:
    """Golden values: whoever changes them changes what every run begun before is trained on."""
    words = augmentation_words(Choices(7, np.array([0, 0, 1, 123_456])), np.array([0, 5, 5, 2**40]))
    assert words.shape == (4, WORDS)
    assert words[:, [0, WORDS - 1]].tolist() == [
        [16768221370495503228, 17513029230858173373],
        [11528406597978967737, 17780437132421134645],
        [13719318918995576683, 2269273749402318779],
        [7100820808930024149, 13208349678002745665],
    ]
    assert [crop_box(row, (500, 375), RandomResizedCropConfig()) for row in words.tolist()] == [
        (52, 3, 495, 373),
        (111, 56, 375, 256),
        (105, 40, 482, 371),
        (199, 25, 373, 173),
    ]
    assert [uniform(row[FLIP]) < 0.5 for row in words.tolist()] == [False, False, False, True]
    assert [integer(row[JITTER_ORDER], 24) for row in words.tolist()] == [13, 19, 15, 16]


def test_words_depend_on_seed_epoch_and_id_and_on_nothing_else() -> None:
    ids, epochs = np.array([3, 9, 3, 0, 2**50]), np.array([0, 0, 1, 2, 0])
    together = augmentation_words(Choices(1, epochs), ids)
    assert len(np.unique(together)) == together.size
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3], [1, 1]):
        assert np.array_equal(augmentation_words(Choices(1, epochs[order]), ids[order]), together[order])
    # Seed 7 of epoch 1 shares nothing with seed 8 of epoch 0.
    assert not np.isin(words_of(50, seed=7, epoch=1), words_of(50, seed=8, epoch=0)).any()


def test_a_crop_has_the_law_of_inception() -> None:
    """An image in which every draw fits: then area, shape and place are each what was drawn."""
    config = RandomResizedCropConfig(scale=(0.1, 0.5), ratio=(0.6, 1.6))
    side = 4000
    boxes = np.array([crop_box(words, (side, side), config) for words in words_of(5000)], dtype=np.float64)
    left, upper, right, lower = boxes.T
    width, height = right - left, lower - upper
    for values, law in [
        (width * height / side**2, stats.uniform(0.1, 0.4)),
        (np.log(width / height), stats.uniform(math.log(0.6), math.log(1.6 / 0.6))),
        ((left + 0.5) / (side - width + 1), stats.uniform()),
        ((upper + 0.5) / (side - height + 1), stats.uniform()),
    ]:
        assert stats.kstest(values, law.cdf).pvalue > DOUBTFUL
    assert abs(stats.spearmanr(left / (side - width), upper / (side - height)).statistic) < 0.05


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    scale=st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)).map(sorted),
    ratio=st.tuples(st.floats(0.01, 90.0), st.floats(0.01, 90.0)).map(sorted),
    first_id=st.integers(0, 2**60),
)
@settings(max_examples=300, deadline=None)
def test_a_crop_is_never_empty_and_never_outside(width, height, scale, ratio, first_id) -> None:
    config = RandomResizedCropConfig(scale=tuple(scale), ratio=tuple(ratio))
    [words] = words_of(1, first_id=first_id)
    left, upper, right, lower = crop_box(words, (width, height), config)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


@pytest.mark.parametrize(
    ("image_size", "ratio", "box"),
    [
        ((10, 300), (0.75, 4 / 3), (0, 143, 10, 156)),  # too tall: as wide as it is, 10 / 0.75 high, in the middle
        ((300, 10), (0.75, 4 / 3), (143, 0, 156, 10)),  # too wide: as high as it is
        ((300, 10), (30.0, 40.0), (0, 0, 300, 10)),  # the whole image is of a shape that is asked for
    ],
)
def test_a_crop_that_never_fits_is_the_largest_in_the_middle(image_size, ratio, box) -> None:
    config = RandomResizedCropConfig(scale=(1.0, 1.0), ratio=ratio)
    nothing_fits = [2**64 - 1] * WORDS  # the upper end of the shapes, each time
    if image_size == (300, 10):
        nothing_fits[CROP + 1 :: 4] = [0] * len(nothing_fits[CROP + 1 :: 4])  # the lower end
    found = crop_box(nothing_fits, image_size, config)
    assert found == box


def test_the_part_is_cut_out_resized_and_flipped() -> None:
    image = picture(60, 45)
    crop = RandomResizedCropConfig()
    flips = 0
    for words in words_of(40):
        part = image.crop(crop_box(words, image.size, crop)).resize((24, 24), BILINEAR)
        flipped = uniform(words[FLIP]) < 0.3
        flips += flipped
        expected = np.asarray(part)[:, ::-1] if flipped else np.asarray(part)
        assert np.array_equal(whole(image, words, 24, random_resized_crop={}, flip=0.3), expected)
    assert 0 < flips < 40


def test_one_transform_does_not_move_the_choices_of_another() -> None:
    image = picture(30, 30)
    for words in words_of(20):
        alone = whole(image, words, 30, flip=0.5)
        jitter = ColourJitterConfig(brightness=0.5)
        with_colours = whole(image, words, 30, flip=0.5, colour_jitter=jitter.model_dump())
        assert np.array_equal(np.asarray(jittered(Image.fromarray(alone), words, jitter)), with_colours)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_flips_are_as_frequent_as_asked(probability: float) -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    config = AugmentationConfig(flip=probability)
    flips = sum(augmented(image, words, config, 2, None, BILINEAR).getpixel((0, 0)) == 255 for words in words_of(5000))
    assert stats.binomtest(flips, 5000, probability).pvalue > DOUBTFUL


def test_certain_flips_and_no_flips() -> None:
    image = picture(8, 8)
    for words in words_of(50):
        assert np.array_equal(whole(image, words, 8, flip=1.0), np.asarray(image)[:, ::-1])
        # The smallest crop that is the whole image: nothing is altered at all.
        all_of_it = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
        assert np.array_equal(whole(image, words, 8, random_resized_crop=all_of_it), np.asarray(image))


def test_brightness_multiplies_by_a_uniform_factor() -> None:
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    for strength, low in ((0.4, 0.6), (2.0, 0.0)):
        config = ColourJitterConfig(brightness=strength)
        levels = np.array([jittered(grey, words, config).getpixel((0, 0))[0] for words in words_of(4000)])
        factors = np.array([uniform(words[BRIGHTNESS], low, 1 + strength) for words in words_of(4000)])
        assert np.abs(levels - np.minimum(100 * factors, 255)).max() <= 1
        assert stats.kstest(factors, stats.uniform(low, 1 + strength - low).cdf).pvalue > DOUBTFUL


def test_contrast_and_saturation_blend_with_grey() -> None:
    image = picture(5, 5)
    pixels = np.asarray(image).astype(np.float64)
    grey = np.asarray(image.convert("L")).astype(np.float64)
    for words in words_of(50):
        for name, towards in (("contrast", np.full_like(grey, int(grey.mean() + 0.5))), ("saturation", grey)):
            place = {"contrast": BRIGHTNESS + 1, "saturation": BRIGHTNESS + 2}[name]
            factor = uniform(words[place], 0.2, 1.8)
            expected = np.clip(towards[..., None] + factor * (pixels - towards[..., None]), 0, 255)
            found = np.asarray(jittered(image, words, ColourJitterConfig.model_validate({name: 0.8})))
            assert np.abs(found - expected).max() <= 1.0


def test_hue_is_turned_by_a_share_of_the_circle() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (30, 60, 250), (200, 180, 20), (77, 77, 77)]
    image = Image.new("RGB", (len(colours), 1))
    image.putdata(colours)
    for words in words_of(200):
        turn = int(uniform(words[HUE], -0.5, 0.5) * 255) / 255
        found = np.asarray(jittered(image, words, ColourJitterConfig(hue=0.5)))[0]
        for colour, pixel in zip(colours, found, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
            expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)) * 255
            assert np.abs(pixel - expected).max() <= 12  # Pillow's hues are steps of 1/255, each worth six levels
    assert stats.kstest([uniform(w[HUE], -0.5, 0.5) for w in words_of(4000)], stats.uniform(-0.5, 1).cdf).pvalue > 1e-3


def test_colours_are_altered_in_every_order() -> None:
    orders = np.bincount([integer(words[JITTER_ORDER], 24) for words in words_of(4800)], minlength=24)
    assert stats.chisquare(orders).pvalue > DOUBTFUL
    image = picture(4, 4)
    config = ColourJitterConfig(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    [words] = words_of(1)
    seen = {
        jittered(image, [*words[:JITTER_ORDER], -(-(order << 64) // 24), *words[JITTER_ORDER + 1 :]], config).tobytes()
        for order in range(24)
    }
    assert len(seen) == 24


@pytest.mark.parametrize("image_size", [(40, 30), (30, 40), (33, 33), (100, 31), (7, 90), (24, 24)])
@pytest.mark.parametrize(("size", "shorter_side"), [(24, 24), (24, 28), (17, 32)])
@pytest.mark.parametrize("resample", [BILINEAR, Image.Resampling.BICUBIC])
def test_evaluation_is_resize_then_centre_crop(image_size, size, shorter_side, resample) -> None:
    image = picture(*image_size)
    width, height = image_size
    if width <= height:
        resized = image.resize((shorter_side, int(shorter_side * height / width)), resample)
    else:
        resized = image.resize((int(shorter_side * width / height), shorter_side), resample)
    top, left = round((resized.height - size) / 2.0), round((resized.width - size) / 2.0)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    assert np.array_equal(np.asarray(evaluated(image, size, shorter_side, resample)), expected)


def test_without_a_shorter_side_the_whole_image_is_resized() -> None:
    image = picture(40, 30)
    assert np.array_equal(np.asarray(evaluated(image, 9, None, BILINEAR)), np.asarray(image.resize((9, 9), BILINEAR)))
    square = picture(9, 9)
    assert np.array_equal(np.asarray(evaluated(square, 9, None, BILINEAR)), np.asarray(square))


def test_neighbouring_keys_give_independent_choices() -> None:
    """Flips of one sample over epochs, over seeds and over ids, and of the two choices of one sample."""
    tables = [
        [words_of(1, epoch=epoch)[0] for epoch in range(2000)],
        [words_of(1, seed=seed)[0] for seed in range(2000)],
        words_of(2000),
    ]
    for table in tables:
        draws = np.array([[uniform(word) for word in words[:12]] for words in table])
        for first, second in itertools.combinations(range(12), 2):
            assert abs(np.corrcoef(draws[:, first], draws[:, second])[0, 1]) < 0.1
        assert abs(np.corrcoef(draws[:-1, FLIP], draws[1:, FLIP])[0, 1]) < 0.1
