"""Augmented and mixed images in a stream: the same pixels, labels and weights however a step is split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.dataset import open_dataset
from data.image_dataset import ImageDataset
from data.plan import Plan
from data.prepare import prepare
from data.store import LocalStore
from data.stream import Stream, evaluation_batches
from tests.data.data_helpers import plan_of, write_images

AUGMENTATION: dict[str, Any] = {
    "random_resized_crop": {"scale": [0.3, 1.0]},
    "flip": 0.5,
    "colour_jitter": {"brightness": 0.4, "hue": 0.1},
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
}
FIELDS = ("images", "labels", "partner_labels", "label_weights")


def opened(root: Path, **changes: Any) -> ImageDataset:
    values = {"source": f"images:{root / 'source'}", "directory": root / "prepared", "validation_fraction": 0.2}
    config = DataConfig.model_validate(values | {"image_size_pixels": 8, "shard_bytes": 4000} | changes)
    dataset = open_dataset(LocalStore(prepare(config)), config, "train")
    assert isinstance(dataset, ImageDataset)
    return dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "source", count=50)
    assert len(opened(root).shard_samples) > 2
    return root


def rows(
    dataset: ImageDataset, plan: Plan, *, world_size: int, micro_samples: int, position: int, stop: int
) -> list[dict[str, torch.Tensor]]:
    """The samples of each step in the order of positions, whoever read them."""
    steps: list[list[dict[str, torch.Tensor]]] = []
    for rank in range(world_size):
        stream = Stream(
            {"": dataset},
            plan,
            rank=rank,
            world_size=world_size,
            micro_samples=micro_samples,
            position=position,
            stop_position=stop,
            count_items=lambda batch: len(batch["labels"]),
            reduce_items=None if world_size == 1 else lambda items: items,  # what the sum would be does not matter here
        )
        for number, step in enumerate(stream):
            if rank == 0:
                steps.append([])
            steps[number] += [batch.tensors for batch in step.micro_batches if batch.weight]
        stream.close()
    return [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in steps]


@settings(deadline=None, max_examples=25)
@given(
    world_size=st.integers(1, 5),
    global_samples=st.integers(1, 13),
    micro_samples=st.integers(1, 13),
    workers=st.sampled_from([0, 2]),
    skipped_steps=st.integers(0, 9),
    ragged=st.integers(0, 12),
)
def test_pixels_do_not_depend_on_who_reads_them(
    root: Path, world_size: int, global_samples: int, micro_samples: int, workers: int, skipped_steps: int, ragged: int
) -> None:
    """Over more than an epoch, from a restart on, to a last step that may be ragged."""
    alone = opened(root, augmentation=AUGMENTATION)
    plan = plan_of(alone, global_samples)
    stop = 9 * global_samples + min(ragged, global_samples - 1)
    whole = rows(alone, plan, world_size=1, micro_samples=global_samples, position=0, stop=stop)
    split = rows(
        opened(root, augmentation=AUGMENTATION, workers=workers),
        plan,
        world_size=world_size,
        micro_samples=min(micro_samples, global_samples),
        position=min(skipped_steps * global_samples, stop),
        stop=stop,
    )
    expected = whole[skipped_steps:]
    assert len(split) == len(expected)
    for found, wanted in zip(split, expected, strict=True):
        assert set(found) == set(wanted) == set(FIELDS)
        for name in FIELDS:
            assert torch.equal(found[name], wanted[name]), name


def test_partners_are_neighbours_of_the_step(root: Path) -> None:
    """Slots 0 and 1, 2 and 3, ...; the last of an odd step takes the one before it."""
    dataset = opened(root, augmentation={"mixup_alpha": 1.0})
    for step in rows(dataset, plan_of(dataset, 7), world_size=1, micro_samples=7, position=0, stop=70):
        labels = step["labels"]
        assert torch.equal(step["partner_labels"], labels[[1, 0, 3, 2, 5, 4, 5]])
    steps = rows(dataset, plan_of(dataset, 8), world_size=1, micro_samples=8, position=0, stop=800)
    weights = torch.stack([step["label_weights"] for step in steps])
    # Each slot draws for itself, partners too, and in each step anew.
    assert len(weights.unique(dim=0)) == 100
    assert len(weights.unique(dim=1)[0]) == 8
    assert (weights[:, 0::2] != weights[:, 1::2]).float().mean() > 0.97


def test_a_sample_is_altered_anew_in_each_epoch_and_never_for_evaluation(root: Path) -> None:
    dataset = opened(root, augmentation={"random_resized_crop": {}, "flip": 0.5})
    samples = dataset.samples
    plan = plan_of(dataset, samples)
    epochs = []
    for epoch in range(2):
        stream = Stream(
            {"": dataset},
            plan,
            rank=0,
            world_size=1,
            micro_samples=samples,
            position=epoch * samples,
            stop_position=(epoch + 1) * samples,
            count_items=lambda batch: len(batch["labels"]),
        )
        [step] = stream
        stream.close()
        [batch] = step.micro_batches
        epochs.append(batch.tensors["images"].numpy()[np.argsort(batch.sample_ids)])
    [plain] = evaluation_batches(dataset, rank=0, world_size=1, micro_samples=samples, samples=None)
    unaltered = opened(root).gather(np.arange(samples))[0]
    assert np.array_equal(plain.tensors["images"].numpy(), unaltered["images"])
    assert set(plain.tensors) == {"images", "labels"}
    for altered in epochs:
        assert (altered != unaltered["images"]).any(axis=(1, 2, 3)).mean() > 0.9
    assert (epochs[0] != epochs[1]).any(axis=(1, 2, 3)).mean() > 0.9
