"""Tasks: from a batch to a loss sum and its number of items, and to the sums that an evaluation is made of.

Everything returned is a sum, never a mean: sums can be added over micro-batches and ranks and stay exact, a mean of
means cannot. Raw batches are made ready on their device: token ids may be uint16, images are uint8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.build import InputShape
from models.config import TaskConfig
from models.metrics import accuracy, bits_per_byte, macro_precision_recall, perplexity
from models.user_code import call_function, check_methods, load_function

IGNORED_TARGET = -100
"""Target of a position that takes no part in the loss (cross_entropy's default)."""


@dataclass(frozen=True)
class LossSum:
    """The loss of one micro-batch."""

    total: Tensor
    """Scalar fp32 with gradient: the sum of the losses of all items, in nats."""
    items: Tensor | int
    """How many items `total` is the sum of; a tensor only where counting is the device's work."""
    per_sample: Tensor
    """(B,) fp32, detached: the sum of the losses of each sample's items; `total` is their sum."""


class Task(Protocol):
    """What a task offers; a user's own needs no base class."""

    def items(self, batch: Mapping[str, Tensor]) -> int:
        """Number of items (tokens with a target, or samples) of a batch on the host, without running the model."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
        """The training loss of a batch on the model's device."""

    def evaluate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """float64 and int64 sums, the same keys and shapes for every batch; to be added up, then summarised.

        The caller has put the model in evaluation mode; no gradient is kept."""

    def summarise(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The final metrics, from sums over the whole evaluation."""

    def example(self, shape: InputShape, samples: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """A batch of the right form, for counting FLOPs and for dry runs; uses no random numbers."""


def build_task(
    config: TaskConfig, *, token_bytes: np.ndarray | Tensor | None = None, classes: int | None = None
) -> Task:
    """The task of a recipe.

    `token_bytes`: (V,) int64, the bytes of text that each token stands for; without it no bits per byte are reported.
    `classes`: the number of classes, required for classification.
    """
    if config.kind == "language_modelling":
        return LanguageModelling(label_smoothing=config.label_smoothing, token_bytes=token_bytes)
    if config.kind == "classification":
        if classes is None:
            raise ValueError("task.kind classification needs labelled data; choose a source with labels")
        return Classification(
            classes,
            image_mean=config.image_mean,
            image_std=config.image_std,
            label_smoothing=config.label_smoothing,
        )
    build = load_function(config.kind, "task.kind")
    task: Task = call_function(build, config.kind, "task", token_bytes=token_bytes, classes=classes, **config.options)
    methods = ("items", "loss", "evaluate", "summarise", "example")
    check_methods(task, methods, config.kind, "task.kind", "models/tasks.py")
    return task


class _DeviceCopies:
    """A task's constants on the devices that asked for them (the meta device, too): no copy per step."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def get(self, name: str, original: Tensor, device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            self._copies[name, device] = original.to(device)
        return self._copies[name, device]


class LanguageModelling:
    """Next-token prediction: {"tokens": (B, T+1) uint16, uint32 or int64, optional "loss_mask": (B, T) bool and
    "documents": (B, T) integers}.

    Position t predicts token t+1; `loss_mask` says which of the T targets count; `documents`, which number the documents
    within each sample, are handed to the model, which computes each as if it were alone. Metrics: loss (nats per token),
    perplexity, tokens, and bits_per_byte = total nats / ln 2 / total bytes of the target tokens.
    """

    def __init__(self, *, label_smoothing: float = 0.0, token_bytes: np.ndarray | Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.token_bytes = None if token_bytes is None else torch.as_tensor(token_bytes, dtype=torch.int64)
        self._on_device = _DeviceCopies()

    def items(self, batch: Mapping[str, Tensor]) -> int:
        if "loss_mask" in batch:
            return int(batch["loss_mask"].sum())
        samples, tokens = batch["tokens"].shape
        return samples * (tokens - 1)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
        losses, targets = self._token_losses(model, batch, self.label_smoothing)
        items = batch["loss_mask"].sum() if "loss_mask" in batch else targets.numel()
        return LossSum(losses.sum(), items, losses.detach().sum(dim=1))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses, targets = self._token_losses(model, batch, label_smoothing=0.0)
        counted = targets != IGNORED_TARGET
        sums = {"loss_sum": losses.sum(dtype=torch.float64), "tokens": counted.sum()}
        if self.token_bytes is not None:
            token_bytes = self._on_device.get("token_bytes", self.token_bytes, targets.device)
            sums["bytes"] = (token_bytes[targets.clamp(min=0)] * counted).sum()
        return sums

    def summarise(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        tokens = int(sums["tokens"])
        if tokens == 0:
            raise ValueError("the evaluation saw no token with a target; give it more batches or check loss_mask")
        loss_sum = float(sums["loss_sum"])
        metrics = {"loss": loss_sum / tokens, "perplexity": perplexity(loss_sum / tokens), "tokens": float(tokens)}
        if "bytes" in sums:
            if int(sums["bytes"]) == 0:
                raise ValueError("the evaluation's target tokens stand for no text; check the tokenizer's token_bytes")
            metrics["bits_per_byte"] = bits_per_byte(loss_sum, int(sums["bytes"]))
        return metrics

    def example(self, shape: InputShape, samples: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        if shape.sequence_tokens is None or shape.vocabulary_size is None:
            raise ValueError("task.kind language_modelling needs text, and the data has none; choose another task")
        count = samples * (shape.sequence_tokens + 1)
        tokens = torch.arange(count, dtype=torch.int64, device=device) % shape.vocabulary_size
        return {"tokens": tokens.view(samples, shape.sequence_tokens + 1)}

    @staticmethod
    def _token_losses(model: nn.Module, batch: Mapping[str, Tensor], label_smoothing: float) -> tuple[Tensor, Tensor]:
        """Losses (B, T) fp32, 0 where masked, and targets (B, T) int64, IGNORED_TARGET where masked."""
        tokens = batch["tokens"].to(torch.int64)  # first of all: torch has few operations on unsigned integers
        targets = tokens[:, 1:]
        if "loss_mask" in batch:
            targets = targets.masked_fill(~batch["loss_mask"], IGNORED_TARGET)
        apart = {"documents": batch["documents"]} if "documents" in batch else {}
        logits = model(tokens[:, :-1], **apart)  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED_TARGET,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.view(targets.shape), targets


class Classification:
    """Image classification: {"images": (B, C, H, W) uint8, "labels": (B,) int64}, and of mixed images (mixup, CutMix)
    "partner_labels": (B,) int64 and "label_weights": (B,) float32 in [0, 1] as well.

    A mixed image has two targets: its loss is w x that of its own label + (1 - w) x that of its partner's, and it is one item.
    Pixels become (pixel / 255 - mean) / std on the device. Metrics: loss (nats per sample), accuracy, macro precision
    and recall (see `models.metrics.macro_precision_recall` for classes that do not occur), samples.
    """

    def __init__(
        self,
        classes: int,
        *,
        image_mean: tuple[float, ...] = (0.5,),
        image_std: tuple[float, ...] = (0.5,),
        label_smoothing: float = 0.0,
    ) -> None:
        self.classes = classes
        self.image_mean = torch.tensor(image_mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.image_std = torch.tensor(image_std, dtype=torch.float32).view(1, -1, 1, 1)
        self._on_device = _DeviceCopies()
        self.label_smoothing = label_smoothing

    def items(self, batch: Mapping[str, Tensor]) -> int:
        return batch["labels"].shape[0]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
        logits = model(self._normalise(batch["images"])).float()  # (B, classes)
        losses = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=self.label_smoothing)
        if "partner_labels" in batch:
            others = F.cross_entropy(
                logits, batch["partner_labels"], reduction="none", label_smoothing=self.label_smoothing
            )
            # Not w x (own - other) + other: a weight of exactly 1 must leave the loss to the last bit.
            losses = batch["label_weights"] * losses + (1.0 - batch["label_weights"]) * others
        return LossSum(losses.sum(), losses.shape[0], losses.detach())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        logits = model(self._normalise(batch["images"]))
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        cells = labels * self.classes + logits.argmax(dim=1)  # (true class, predicted class) as one index
        # index_add rather than bincount, which waits for the device to learn the size of its result.
        counts = torch.zeros(self.classes**2, dtype=torch.int64, device=labels.device)
        confusion = counts.index_add(0, cells, torch.ones_like(cells)).view(self.classes, self.classes)
        return {"loss_sum": losses.sum(dtype=torch.float64), "confusion": confusion}

    def summarise(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        confusion = sums["confusion"]
        samples = int(confusion.sum())
        if samples == 0:
            raise ValueError("the evaluation saw no sample; give it more batches")
        precision, recall = macro_precision_recall(confusion)
        return {
            "loss": float(sums["loss_sum"]) / samples,
            "accuracy": accuracy(confusion),
            "precision": precision,
            "recall": recall,
            "samples": float(samples),
        }

    def example(self, shape: InputShape, samples: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        if shape.channels is None or shape.image_size_pixels is None:
            raise ValueError("task.kind classification needs images, and the data has none; choose another task")
        size = (samples, shape.channels, shape.image_size_pixels, shape.image_size_pixels)
        labels = torch.arange(samples, dtype=torch.int64, device=device) % self.classes
        return {"images": torch.zeros(size, dtype=torch.uint8, device=device), "labels": labels}

    def _normalise(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        if self.image_mean.shape[1] not in (1, channels):
            raise ValueError(
                f"task.image_mean has {self.image_mean.shape[1]} values and the images {channels} channels; "
                "give one value, or one per channel"
            )
        mean = self._on_device.get("mean", self.image_mean, images.device)
        std = self._on_device.get("std", self.image_std, images.device)
        return (images.to(torch.float32) / 255.0 - mean) / std
