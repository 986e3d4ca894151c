"""Final metrics from exact sums: plain functions of numbers, with no idea of batches or ranks."""

import math

import torch
from torch import Tensor


def perplexity(loss_nats: float) -> float:
    """exp of the mean loss in nats; infinite where that is beyond a float."""
    return torch.tensor(loss_nats, dtype=torch.float64).exp().item()


def bits_per_byte(loss_sum_nats: float, target_bytes: int) -> float:
    """Bits spent per byte of text predicted, which, unlike perplexity, can be compared between tokenizers."""
    return loss_sum_nats / math.log(2) / target_bytes


def accuracy(confusion: Tensor) -> float:
    """Share of samples on the diagonal of a (true class, predicted class) count matrix."""
    return int(confusion.diagonal().sum()) / int(confusion.sum())  # in Python: torch would divide in fp32


def macro_precision_recall(confusion: Tensor) -> tuple[float, float]:
    """The unweighted means over classes of precision and of recall, from a (true class, predicted class) count matrix.

    A class that occurs neither among the labels nor among the predictions is left out. A class never predicted has
    precision 0, a class without labels that was predicted has recall 0 (scikit-learn's `average="macro"` with
    `zero_division=0`).
    """
    counts = confusion.to(torch.float64)
    right, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    occurs = (true + predicted) > 0
    precision = right / predicted.clamp(min=1.0)
    recall = right / true.clamp(min=1.0)
    return precision[occurs].mean().item(), recall[occurs].mean().item()
