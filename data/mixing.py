"""Mixup and CutMix: samples mixed with their partners, pixels and labels alike.

Mixup (Zhang et al. 2018) takes w of a sample and 1 - w of its partner, w of Beta(alpha, alpha). CutMix (Yun et al. 2019) pastes a
rectangle of the partner's pixels, of area 1 - w and centred anywhere; the label's weight is the share of the sample's own
pixels that is left once the rectangle has been clipped at the borders. Where both are asked for, a fair coin
decides. Every sample draws for itself, coin, weight and rectangle (`elem` in timm's words), so two partners
are two different mixtures.

Mixed pixels are rounded to uint8, as timm's FastCollateMixup does on the host: a batch stays as small as an unmixed one. The
weight is a whole number of 1/256, finer than which a level of uint8 hardly shows: so the arithmetic is of integers, fits 16
bits, which is many times as fast as 32, and the label's weight is exactly that of the pixels.
"""

import math

import numpy as np
import numpy.typing as npt

from data.draws import integer, key_words, symmetric_beta
from data.image_config import AugmentationConfig
from data.samples import Fields, SampleIds

Pixels = npt.NDArray[np.uint8]

_COIN, _FIRST, _SECOND, _ROW, _COLUMN = range(5)
_ONE = 256


def mix(fields: Fields, partners: SampleIds, words: npt.NDArray[np.uint64], config: AugmentationConfig) -> Fields:
    """The first n rows of `fields`, each mixed with row `partners[k]` by word `words[k]`; both (n,).

    `images` uint8 (m, C, H, W) and `labels` int64 (m,) with m >= n become `images` (n, C, H, W), `labels` (n,), `partner_labels`
    int64 (n,) and `label_weights` float32 (n,), the weight of the sample's own label.
    """
    count = len(partners)
    images: Pixels = fields["images"]
    mixed = np.empty_like(images[:count])
    weights = np.empty(count, dtype=np.float32)
    for row, (partner, draws) in enumerate(zip(partners.tolist(), key_words(words, 5).tolist(), strict=True)):
        mixed[row], weights[row] = _mix_images(images[row], images[partner], draws, config)
    labels = fields["labels"]
    return {
        "images": mixed,
        "labels": labels[:count],
        "partner_labels": labels[partners],
        "label_weights": weights,
    }


def _mix_images(own: Pixels, partner: Pixels, draws: list[int], config: AugmentationConfig) -> tuple[Pixels, float]:
    cut = config.cutmix_alpha is not None and (config.mixup_alpha is None or integer(draws[_COIN], 2) == 1)
    alpha = config.cutmix_alpha if cut else config.mixup_alpha
    assert alpha is not None
    share = symmetric_beta(draws[_FIRST], draws[_SECOND], alpha)
    if cut:
        return paste(own, partner, share, draws[_ROW], draws[_COLUMN])
    weight = round(share * _ONE)
    return blend(own, partner, weight), weight / _ONE


def blend(own: Pixels, partner: Pixels, weight: int) -> Pixels:
    """weight / 256 of one image and the rest of another, rounded to the nearest level, halves up."""
    mixed = own.astype(np.uint16)
    mixed *= np.uint16(weight)
    other = partner.astype(np.uint16)
    other *= np.uint16(_ONE - weight)
    mixed += other  # at most 255 x 256
    mixed += np.uint16(_ONE // 2)
    mixed >>= np.uint16(8)
    return mixed.astype(np.uint8)


def paste(own: Pixels, partner: Pixels, share: float, row_word: int, column_word: int) -> tuple[Pixels, float]:
    """An image (C, H, W) with a rectangle of another's, and the share of its own pixels that is left.

    The sides are the image's times (1 - share)^(1/2); the centre is any pixel, and what lies outside is clipped.
    """
    height, width = own.shape[1:]
    scale = math.sqrt(1.0 - share)
    row, column = integer(row_word, height), integer(column_word, width)
    half_height, half_width = int(height * scale) // 2, int(width * scale) // 2
    rows = slice(max(0, row - half_height), min(height, row + half_height))
    columns = slice(max(0, column - half_width), min(width, column + half_width))
    mixed = own.copy()
    mixed[:, rows, columns] = partner[:, rows, columns]
    return mixed, 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
