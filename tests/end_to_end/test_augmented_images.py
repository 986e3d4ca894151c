"""Augmented and mixed images from a recipe to its log: the same run on any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import WarmProcess, digests, final_bytes, lockstep, losses

RECIPE = """
run: {name: augmented, steps: 12}
model: {kind: resnet, layers: 8, norm: group, groups: 8, activation: silu}
task: {kind: classification, label_smoothing: 0.1}
data:
  source: digits
  validation_fraction: 0.2
  image_size_pixels: 12
  shorter_side_pixels: 14
  augmentation:
    random_resized_crop: {scale: [0.5, 1.0]}
    colour_jitter: {brightness: 0.3, contrast: 0.3}
    mixup_alpha: 0.2
    cutmix_alpha: 1.0
batch: {global_samples: 11, micro_samples: 4}
optimizer: {kind: sgd, lr: 0.05}
schedule: {kind: constant}
checkpoint: {every_steps: 6}
evaluation: {every_steps: 6, samples: 40}
tracking: {wandb: "off", tensorboard: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("augmented") / "augmented.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, warm: WarmProcess) -> Path:
    warm.worker(recipe, "run.directory=alone", cwd=recipe.parent).succeeded()
    return recipe.parent / "alone"


def test_two_workers_see_what_one_sees(recipe: Path, alone: Path) -> None:
    """The step of 11 is cut between slots 4 and 5, which are partners; slot 10 takes 9 as its own."""
    arguments = ["run.directory=two", "data.workers=2", "--workers", 2]
    lockstep("train", recipe, *arguments, cwd=recipe.parent).succeeded()
    two = recipe.parent / "two"
    assert digests(two) == digests(alone)
    assert losses(two) == pytest.approx(losses(alone), rel=2e-6)
    for own, other in zip(read_metrics(two)[1], read_metrics(alone)[1], strict=True):
        assert own["evaluation"]["loss"] == pytest.approx(other["evaluation"]["loss"], rel=2e-6)


def test_image_workers_change_no_byte_and_augmentation_every_loss(recipe: Path, alone: Path, warm: WarmProcess) -> None:
    warm.worker(recipe, "run.directory=threads", "data.workers=3", cwd=recipe.parent).succeeded()
    assert final_bytes(recipe.parent / "threads") == final_bytes(alone)
    assert losses(recipe.parent / "threads") == losses(alone)
    values = yaml.safe_load(RECIPE)
    del values["data"]["augmentation"]
    plain = recipe.with_name("plain.yaml")
    plain.write_text(yaml.safe_dump(values))
    warm.worker(plain, "run.directory=plain", "run.steps=6", cwd=recipe.parent).succeeded()
    assert digests(recipe.parent / "plain") == digests(alone)[:6]  # the same samples, as stored
    pairs = zip(losses(recipe.parent / "plain"), losses(alone), strict=False)
    assert all(abs(one / other - 1) > 1e-5 for one, other in pairs)  # far above rounding


def test_a_resumed_run_is_the_one_that_went_through(recipe: Path, alone: Path, warm: WarmProcess) -> None:
    """From the middle on, and the same bytes at the end; another augmentation needs permission."""
    where = {"cwd": recipe.parent}
    arguments = [recipe, "run.directory=halves", "--resume", "auto"]
    warm.worker(*arguments, "run.steps=6", **where).succeeded()
    refused = warm.worker(*arguments, "--allow-change", "data.interpolation=bicubic", **where)
    refused.failed_with(2, "impossible: data.interpolation")
    refused = warm.worker(*arguments, "data.augmentation.mixup_alpha=null", **where)
    refused.failed_with(2, "needs --allow-change: data.augmentation.mixup_alpha: 0.2 -> None")
    warm.worker(*arguments, "--allow-change", "data.workers=1", **where).succeeded()
    assert losses(recipe.parent / "halves") == losses(alone)
    assert final_bytes(recipe.parent / "halves") == final_bytes(alone)
