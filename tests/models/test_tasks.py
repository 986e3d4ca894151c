"""Tasks: loss sums against float64 references, metrics against scikit-learn, sums that add up."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_score, recall_score
from torch import Tensor, nn

from models.build import InputShape
from models.config import TaskConfig
from models.metrics import macro_precision_recall, perplexity
from models.tasks import build_task
from tests.models.model_helpers import IMAGE_SHAPE, TEXT_SHAPE, TINY_GPT, make
from tests.models.own_model import ScaledClassification

TEXT = TaskConfig(kind="language_modelling")
IMAGES = TaskConfig(kind="classification")


class Scores(nn.Module):
    """Gives prepared logits whatever it is shown, so that a test knows the whole answer."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs
        return self.logits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def ragged_batch(samples: int = 6, tokens: int = 9, vocabulary: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 1, 0, 4, 7, 2])[:samples]  # one sample with nothing to learn from
    return {
        "tokens": torch.randint(0, vocabulary, (samples, tokens + 1), generator=generator),
        "loss_mask": torch.arange(tokens) < lengths[:, None],
    }


def reference_losses(logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
    """-log softmax at the target in float64 NumPy, 0 where masked."""
    scores = logits.detach().numpy().astype(np.float64)
    largest = scores.max(axis=-1, keepdims=True)
    log_normaliser = np.log(np.exp(scores - largest).sum(axis=-1)) + largest[..., 0]
    targets = batch["tokens"][:, 1:].numpy().astype(np.int64)
    losses = log_normaliser - np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return losses * batch["loss_mask"].numpy() if "loss_mask" in batch else losses


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64])
@pytest.mark.parametrize("masked", [True, False])
def test_language_modelling_loss_is_the_float64_reference(dtype, masked):
    task = build_task(TEXT)
    batch = ragged_batch()
    if not masked:
        del batch["loss_mask"]
    expected = reference_losses(random(6, 9, 50), batch)
    batch["tokens"] = batch["tokens"].to(dtype)
    model = Scores(random(6, 9, 50))
    result = task.loss(model, batch)
    assert result.total.dtype == torch.float32
    assert result.total.item() == pytest.approx(expected.sum(), rel=1e-6)
    assert int(result.items) == task.items(batch) == (23 if masked else 54)
    np.testing.assert_allclose(result.per_sample.numpy(), expected.sum(axis=1), rtol=1e-5)
    assert not result.per_sample.requires_grad
    assert torch.equal(model.seen, batch["tokens"][:, :-1].to(torch.int64))
    # The gradient of a masked position is exactly zero, that of any other is not.
    result.total.backward()
    learned = model.logits.grad.abs().sum(dim=-1) > 0
    assert torch.equal(learned, batch.get("loss_mask", torch.ones(6, 9, dtype=torch.bool)))


def test_a_half_precision_model_still_gets_its_loss_in_fp32():
    batch = ragged_batch()
    logits = random(6, 9, 50).bfloat16()
    result = build_task(TEXT).loss(Scores(logits), batch)
    assert result.total.dtype == torch.float32
    assert result.total.item() == pytest.approx(reference_losses(logits.float(), batch).sum(), rel=1e-6)


def test_sums_of_ragged_parts_are_the_whole_and_a_mean_of_means_is_not():
    task = build_task(TEXT, token_bytes=np.arange(50))
    batch = ragged_batch()
    logits = random(6, 9, 50)
    whole = task.evaluate(Scores(logits), batch)
    parts = [
        task.evaluate(Scores(logits[rows]), {key: value[rows] for key, value in batch.items()})
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    for key, value in whole.items():
        assert not value.requires_grad
        assert sum(part[key] for part in parts).item() == pytest.approx(value.item(), rel=1e-12)
        assert value.dtype == (torch.float64 if key == "loss_sum" else torch.int64)
    means = [(part["loss_sum"] / part["tokens"]).item() for part in parts]
    assert abs(np.mean(means) / task.summarise(whole)["loss"] - 1) > 0.01  # the control


def test_language_modelling_metrics():
    token_bytes = np.array([*range(1, 50), 0], dtype=np.int64)  # the last token is special and stands for no text
    task = build_task(TEXT, token_bytes=token_bytes)
    batch = ragged_batch()
    batch["tokens"] = batch["tokens"].to(torch.uint16)
    logits = random(6, 9, 50)
    expected = reference_losses(logits, batch).sum()
    metrics = task.summarise(task.evaluate(Scores(logits), batch))
    target_bytes = token_bytes[batch["tokens"][:, 1:].numpy()][batch["loss_mask"].numpy()].sum()
    assert metrics["tokens"] == 23
    assert metrics["loss"] == pytest.approx(expected / 23, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected / 23), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(expected / math.log(2) / target_bytes, rel=1e-6)
    assert "bits_per_byte" not in build_task(TEXT).summarise(build_task(TEXT).evaluate(Scores(logits), batch))


def test_uniform_guesses_over_bytes_cost_eight_bits_a_byte():
    task = build_task(TEXT, token_bytes=torch.ones(256, dtype=torch.int64))
    metrics = task.summarise(task.evaluate(Scores(torch.zeros(2, 5, 256)), {"tokens": torch.arange(12).view(2, 6)}))
    assert metrics["bits_per_byte"] == pytest.approx(8.0, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(256.0, rel=1e-6)


def test_an_enormous_loss_has_infinite_perplexity():
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize("kind", ["language_modelling", "classification"])
def test_label_smoothing_is_for_training_only(kind):
    smoothed = build_task(TaskConfig(kind=kind, label_smoothing=0.1), classes=50)
    plain = build_task(TaskConfig(kind=kind), classes=50)
    if kind == "language_modelling":
        batch, logits = ragged_batch(), random(6, 9, 50)
        counted = batch["loss_mask"]
        uniform = (-torch.log_softmax(logits.double(), -1).mean(-1) * counted).sum()
    else:
        batch = {"images": torch.zeros(6, 1, 2, 2, dtype=torch.uint8), "labels": torch.arange(6)}
        logits = random(6, 50)
        uniform = -torch.log_softmax(logits.double(), -1).mean(-1).sum()
    plain_loss = plain.loss(Scores(logits), batch).total
    smooth_loss = smoothed.loss(Scores(logits), batch).total
    assert smooth_loss.item() == pytest.approx(0.9 * plain_loss.item() + 0.1 * uniform.item(), rel=1e-5)
    evaluated = smoothed.evaluate(Scores(logits), batch)["loss_sum"].item()
    assert evaluated == pytest.approx(plain_loss.item(), rel=1e-6)


def classified(samples: int, classes: int, seed: int, labelled: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, labelled, (samples,), generator=generator)
    images = torch.zeros(samples, 1, 2, 2, dtype=torch.uint8)
    return torch.randn(samples, classes, generator=generator), {"images": images, "labels": labels}


@pytest.mark.parametrize(
    ("samples", "classes", "labelled"),
    [(500, 10, 10), (7, 10, 10), (40, 10, 4), (1, 3, 3)],  # the last three with classes that never occur
)
def test_classification_metrics_are_scikit_learns(samples, classes, labelled):
    task = build_task(IMAGES, classes=classes)
    logits, batch = classified(samples, classes, seed=samples, labelled=labelled)
    sums = [
        task.evaluate(Scores(logits[rows]), {key: value[rows] for key, value in batch.items()})
        for rows in (slice(0, samples // 3), slice(samples // 3, samples))
    ]
    metrics = task.summarise({key: sums[0][key] + sums[1][key] for key in sums[0]})
    true, predicted = batch["labels"].numpy(), logits.argmax(dim=1).numpy()
    macro = {"average": "macro", "zero_division": 0}
    assert metrics["samples"] == samples == task.items(batch)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, predicted), abs=1e-12)
    assert metrics["precision"] == pytest.approx(precision_score(true, predicted, **macro), abs=1e-12)
    assert metrics["recall"] == pytest.approx(recall_score(true, predicted, **macro), abs=1e-12)
    reference = -torch.log_softmax(logits.double(), dim=1)[torch.arange(samples), batch["labels"]]
    assert metrics["loss"] == pytest.approx(reference.mean().item(), rel=1e-6)
    result = task.loss(Scores(logits), batch)
    assert result.items == samples
    np.testing.assert_allclose(result.per_sample.numpy(), reference.numpy(), rtol=1e-5, atol=1e-6)
    assert result.total.item() == pytest.approx(reference.sum().item(), rel=1e-6)


def test_precision_and_recall_by_hand():
    # class 0: 2 of 3 found; class 1: 1 found, 1 taken from class 0; class 2: never seen; class 3: only predicted.
    confusion = torch.tensor([[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    precision, recall = macro_precision_recall(confusion)
    assert precision == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert recall == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_pixels_are_normalised_per_channel_on_the_way_in():
    config = TaskConfig(kind="classification", image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 2.0))
    model = Scores(torch.zeros(1, 10))
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    build_task(config, classes=10).loss(model, {"images": images, "labels": torch.tensor([1])})
    torch.testing.assert_close(model.seen.flatten(), torch.tensor([-1.0, 3.0, 0.1]))
    with pytest.raises(ValueError, match="image_mean has 3 values and the images 1 channels"):
        build_task(config, classes=10).loss(model, {"images": images[:, :1], "labels": torch.tensor([1])})


def test_example_batches_fit_task_and_model_and_use_no_random_numbers():
    before = torch.random.get_rng_state()
    for config, settings, shape in (
        (TEXT, TINY_GPT, TEXT_SHAPE),
        (IMAGES, {"kind": "lenet5"}, IMAGE_SHAPE),
    ):
        task = build_task(config, classes=shape.classes)
        batch = task.example(shape, 3)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert task.loss(make(settings, shape), batch).total.isfinite()
        before = torch.random.get_rng_state()
        assert all(value.is_meta for value in task.example(shape, 3, device="meta").values())
    with pytest.raises(ValueError, match="needs text"):
        build_task(TEXT).example(IMAGE_SHAPE, 1)
    with pytest.raises(ValueError, match="needs images"):
        build_task(IMAGES, classes=10).example(InputShape(vocabulary_size=9, sequence_tokens=3), 1)


def test_nothing_to_evaluate_is_an_error_not_a_number():
    sums = {"loss_sum": torch.tensor(0.0), "tokens": torch.tensor(0)}
    with pytest.raises(ValueError, match="no token with a target"):
        build_task(TEXT).summarise(sums)
    with pytest.raises(ValueError, match="stand for no text"):
        build_task(TEXT).summarise({"loss_sum": torch.tensor(1.0), "tokens": torch.tensor(1), "bytes": torch.tensor(0)})
    with pytest.raises(ValueError, match="saw no sample"):
        build_task(IMAGES, classes=2).summarise({"loss_sum": torch.tensor(0.0), "confusion": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="needs labelled data"):
        build_task(IMAGES)


def test_a_users_own_task():
    task = build_task(TaskConfig(kind="tests.models.own_model:build_own_task", options={"weight": 2.0}), classes=10)
    assert type(task) is ScaledClassification
    logits, batch = classified(5, 10, seed=0, labelled=10)
    plain = build_task(IMAGES, classes=10).loss(Scores(logits), batch).total
    assert task.loss(Scores(logits), batch).total.item() == pytest.approx(2 * plain.item())
    with pytest.raises(ValueError, match=r"dict has no method loss\(\)"):
        build_task(TaskConfig(kind="tests.models.own_model:build_wrong_task"), classes=10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_image_has_two_targets_and_is_one_item(smoothing):
    """The loss is that of a soft target: w on one label, 1 - w on the other, in float64 by hand."""
    task = build_task(TaskConfig(kind="classification", label_smoothing=smoothing), classes=5)
    logits = random(6, 5)
    weights = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.9, 0.25])
    batch = {"images": torch.zeros(6, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1, 2, 3, 4, 0])}
    mixed = {**batch, "partner_labels": torch.tensor([1, 0, 2, 4, 3, 4]), "label_weights": weights}
    one_hot = torch.eye(5, dtype=torch.float64)
    targets = weights.double()[:, None] * one_hot[mixed["labels"]]
    targets += (1 - weights.double())[:, None] * one_hot[mixed["partner_labels"]]
    targets = (1 - smoothing) * targets + smoothing / 5
    expected = -(targets * torch.log_softmax(logits.double(), -1)).sum(-1)
    model = Scores(logits)
    result = task.loss(model, mixed)
    np.testing.assert_allclose(result.per_sample.numpy(), expected.numpy(), rtol=1e-6)
    assert result.total.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert result.items == task.items(mixed) == 6
    result.total.backward()
    gradient = torch.softmax(logits.double(), -1) - targets
    np.testing.assert_allclose(model.logits.grad.numpy(), gradient.numpy(), atol=1e-6)
    # Weights of 1 and 0, and equal labels, are single targets, to the last bit where a weight decides it.
    own, partners = (task.loss(Scores(logits), {**batch, "labels": mixed[key]}) for key in ("labels", "partner_labels"))
    assert result.per_sample[1] == own.per_sample[1]
    assert result.per_sample[0] == partners.per_sample[0]
    assert result.per_sample[2].item() == pytest.approx(own.per_sample[2].item(), rel=1e-6)
    # Evaluation knows only what an image is.
    plain, other = (task.evaluate(Scores(logits), one) for one in (batch, mixed))
    assert torch.equal(plain["loss_sum"], other["loss_sum"])


@pytest.mark.parametrize(
    ("config", "settings", "shape", "rate"),
    [(TEXT, TINY_GPT, TEXT_SHAPE, 0.5), (IMAGES, {"kind": "resnet", "layers": 20, "norm": "group"}, IMAGE_SHAPE, 0.05)],
)
def test_a_few_steps_of_descent_learn_one_batch(config, settings, shape, rate):
    task = build_task(config, classes=shape.classes)
    model = make(settings, shape)
    batch = task.example(shape, 4)
    if "images" in batch:
        batch["images"] += torch.tensor([0, 80, 160, 240], dtype=torch.uint8).view(4, 1, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        result = task.loss(model, batch)
        (result.total / task.items(batch)).backward()
        optimizer.step()
        losses.append(result.total.item() / task.items(batch))
    assert min(losses[-3:]) < 0.3 * losses[0]
