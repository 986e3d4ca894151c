"""Mixup and CutMix: the pixels and the label's weight say the same, for whoever is mixed with whom."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from data.draws import key_words, symmetric_beta
from data.image_config import AugmentationConfig
from data.mixing import blend, mix, paste
from data.samples import Fields

DOUBTFUL = 1e-3
MIXUP = AugmentationConfig(mixup_alpha=0.4)
CUTMIX = AugmentationConfig(cutmix_alpha=1.0)
BOTH = AugmentationConfig(mixup_alpha=0.4, cutmix_alpha=1.0)


def batch(samples: int, height: int = 6, width: int = 5) -> Fields:
    random = np.random.RandomState(0)
    return {
        "images": random.randint(0, 256, (samples, 3, height, width), dtype=np.uint8),
        "labels": np.arange(samples, dtype=np.int64) * 10,
    }


def some_words(count: int, first: int = 0) -> np.ndarray:
    return key_words(np.arange(first, first + count, dtype=np.uint64), 1)[:, 0]


def sources(count: int, side: int) -> Fields:
    """Pairs of a black and a white image: a mixed pixel says how much of it came from where."""
    images = np.zeros((count, 1, side, side), dtype=np.uint8)
    images[1::2] = 255
    return {"images": images, "labels": np.arange(count, dtype=np.int64)}


def neighbours(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) ^ 1


@given(
    pair=arrays.arrays(np.uint8, (2, 1, 4, 4)),
    weight=st.one_of(st.integers(0, 256), st.sampled_from([0, 1, 128, 255, 256])),
)
@settings(max_examples=200, deadline=None)
def test_a_blend_is_the_nearest_level(pair: np.ndarray, weight: int) -> None:
    own, partner = pair.astype(object)  # exact integers of any size
    exact = (own * weight + partner * (256 - weight) + 128) // 256
    assert np.array_equal(blend(pair[0], pair[1], weight), exact.astype(np.int64))


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.floats(0.0, 1.0),
    row=st.integers(0, 2**64 - 1),
    column=st.integers(0, 2**64 - 1),
)
@settings(max_examples=300, deadline=None)
def test_a_pasted_rectangle_is_weighed_as_it_was_clipped(height, width, share, row, column) -> None:
    own, partner = np.zeros((2, height, width), dtype=np.uint8), np.ones((2, height, width), dtype=np.uint8)
    mixed, weight = paste(own, partner, share, row, column)
    assert weight == 1.0 - mixed.sum() / mixed.size
    assert weight >= share - 1e-12  # clipping and rounding only ever take from the rectangle
    assert np.array_equal(mixed[0], mixed[1])
    rows, columns = mixed[0].any(axis=1), mixed[0].any(axis=0)
    assert np.array_equal(mixed[0], np.outer(rows, columns))
    for covered in (rows, columns):  # in one piece
        assert np.count_nonzero(np.diff(covered.astype(int), prepend=0, append=0)) in (0, 2)


def test_a_rectangle_lies_as_in_the_paper() -> None:
    own, partner = np.zeros((1, 8, 10), dtype=np.uint8), np.ones((1, 8, 10), dtype=np.uint8)
    middle = 2**63
    mixed, weight = paste(own, partner, 0.75, middle, middle)  # half of each side, centred at row 4, column 5
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[2:6, 3:7] = 1
    assert np.array_equal(mixed[0], expected)
    assert weight == 1 - 16 / 80
    mixed, weight = paste(own, partner, 0.75, 0, 2**64 - 1)  # centred at the upper right corner
    expected[:] = 0
    expected[:2, 7:] = 1
    assert np.array_equal(mixed[0], expected)
    assert weight == 1 - 6 / 80


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_pixels_and_labels_are_mixed_alike(config: AugmentationConfig) -> None:
    fields = sources(400, 16)
    mixed = mix(fields, neighbours(400), some_words(400), config)
    assert {name: field.dtype for name, field in mixed.items()} == {
        "images": np.uint8, "labels": np.int64, "partner_labels": np.int64, "label_weights": np.float32,
    }  # fmt: skip
    assert np.array_equal(mixed["labels"], fields["labels"])
    assert np.array_equal(mixed["partner_labels"], fields["labels"] ^ 1)
    white = mixed["images"].reshape(400, -1).mean(axis=1) / 255
    own = np.where(np.arange(400) % 2, white, 1 - white)
    np.testing.assert_allclose(own, mixed["label_weights"], atol=0.5 / 255 + 1e-6)
    assert 0 <= mixed["label_weights"].min() < 0.3
    assert 0.8 < mixed["label_weights"].max() <= 1
    blended = ((mixed["images"] != 0) & (mixed["images"] != 255)).any(axis=(1, 2, 3))
    assert blended.any() == (config.mixup_alpha is not None)
    assert (~blended).sum() > 100 or config is MIXUP


def test_the_sources_stay_as_they_were() -> None:
    fields = batch(6)
    before = {name: field.copy() for name, field in fields.items()}
    mix(fields, neighbours(6), some_words(6), BOTH)
    assert all(np.array_equal(fields[name], field) for name, field in before.items())


def test_a_mixture_depends_on_its_pair_and_its_word_alone() -> None:
    """So it is the same on whichever rank it is made, with whatever beside it."""
    fields, words = batch(10), some_words(10)
    whole = mix(fields, neighbours(10), words, BOTH)
    for rows in ([0, 1, 2, 3], [6], [9, 2, 5]):
        partners = [row ^ 1 for row in rows]
        part = {name: field[rows + partners] for name, field in fields.items()}
        apart = mix(part, np.arange(len(rows)) + len(rows), words[rows], BOTH)
        for name, field in apart.items():
            assert np.array_equal(field, whole[name][rows]), name


def test_a_sample_without_a_partner_is_itself() -> None:
    fields = batch(1)
    for word in some_words(50):
        mixed = mix(fields, np.array([0]), np.array([word], dtype=np.uint64), BOTH)
        assert np.array_equal(mixed["images"], fields["images"])
        assert mixed["partner_labels"] == mixed["labels"]


def test_mixtures_that_must_never_change() -> None:
    """Golden values: both kinds are among them."""
    mixed = mix(batch(6), neighbours(6), some_words(6), BOTH)
    assert mixed["label_weights"].tolist() == [
        0.98828125,
        0.9666666388511658,
        0.7333333492279053,
        0.8666666746139526,
        0.08203125,
        0.8666666746139526,
    ]
    assert mixed["images"].reshape(6, -1).sum(axis=1).tolist() == [11855, 11449, 11945, 11494, 10578, 10423]


def test_weights_have_their_law_and_the_coin_is_fair() -> None:
    count = 4000
    fields = sources(count, 2)
    weights = mix(fields, neighbours(count), some_words(count), MIXUP)["label_weights"]
    # Rounded to 1/256: as many between two halves of a level as the law has there.
    edges = np.array([0.5, 3.5, 20.5, 63.5, 127.5, 180.5, 240.5, 254.5, 255.5]) / 256
    cells = np.diff(stats.beta(0.4, 0.4).cdf(edges), prepend=0.0, append=1.0)
    counts = np.diff(np.searchsorted(np.sort(weights), edges), prepend=0, append=count)
    assert stats.chisquare(counts, cells * count).pvalue > DOUBTFUL
    both = mix(fields, neighbours(count), some_words(count), BOTH)["label_weights"]
    cut = mix(fields, neighbours(count), some_words(count), CUTMIX)["label_weights"]
    blended = mix(fields, neighbours(count), some_words(count), MIXUP)["label_weights"]
    assert ((both == cut) | (both == blended)).all()
    differing = cut != blended
    assert stats.binomtest(int((both == cut)[differing].sum()), int(differing.sum())).pvalue > DOUBTFUL


def test_rectangles_have_their_law() -> None:
    """Area drawn from Beta(1, 1), which is uniform; the centre anywhere. Unclipped ones show the drawn area."""
    count, side = 6000, 64
    mixed = mix(sources(count, side), neighbours(count), some_words(count), CUTMIX)["images"][:, 0]
    mixed[1::2] = 255 - mixed[1::2]
    rows, columns = (mixed.any(axis=2), mixed.any(axis=1))
    drawn = [symmetric_beta(*draws, 1.0) for draws in key_words(some_words(count), 5)[:, 1:3].tolist()]
    sides = 2 * (np.floor(side * np.sqrt(1 - np.array(drawn))).astype(int) // 2)
    for covered in (rows, columns):
        length = covered.sum(axis=1)
        inside = ~covered[:, 0] & ~covered[:, -1] & (length > 0)
        assert inside.sum() > 300
        assert np.array_equal(length[inside], sides[inside])
        assert (length <= sides).all()
    # Rectangles of at most 16 rows that touch no border: their centres are uniform over the rows that allow it.
    narrow = (sides > 0) & (sides <= 16) & rows.any(axis=1) & ~rows[:, 0] & ~rows[:, -1]
    starts = rows[narrow].argmax(axis=1)
    assert stats.kstest((starts - 0.5) / (side - 1 - sides[narrow]), stats.uniform().cdf).pvalue > DOUBTFUL
