"""Images as a dataset gives them: the same for every batch, order and number of workers, and never a broken one unnoticed."""

import contextlib
import gc
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.augment import augmentation_words, augmented
from data.config import DataConfig
from data.dataset import open_dataset
from data.errors import CorruptData
from data.image_config import AugmentationConfig
from data.image_dataset import ImageDataset
from data.manifest import BLOCK_BYTES
from data.mixing import mix
from data.prepare import prepare
from data.samples import Choices
from data.store import LocalStore
from data.stream import Stream
from tests.data.data_helpers import plan_of, prepared_tokens, rewrite

AUGMENTATION: dict[str, Any] = {
    "random_resized_crop": {"scale": [0.2, 1.0]},
    "flip": 0.5,
    "colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}
SIZE = 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty colour images of many shapes in two classes, and their prepared dataset beside them."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for number in range(60):
        place = root / "source" / ("dog" if number % 3 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        shape = (int(random.randint(20, 50)), int(random.randint(20, 50)), 3)
        image = Image.fromarray(random.randint(0, 256, shape, dtype=np.uint8))
        image.save(place / f"{number:02d}.{'png' if number % 2 else 'jpg'}")
    prepare(config_of(root))
    return root


def config_of(root: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "source": f"images:{root / 'source'}",
        "directory": root / "prepared",
        "validation_fraction": 0.2,
        "image_size_pixels": SIZE,
    }
    return DataConfig.model_validate(values | changes)


def opened(root: Path, split: str = "train", **changes: Any) -> ImageDataset:
    dataset = open_dataset(LocalStore(root / "prepared"), config_of(root, **changes), split)  # type: ignore[arg-type]
    assert isinstance(dataset, ImageDataset)
    return dataset


def choices_of(epochs: Any, seed: int = 3) -> Choices:
    return Choices(seed, np.asarray(epochs, dtype=np.int64))


def image_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lockstep-images")]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_image_is_the_same_whatever_is_gathered_with_it(photos: Path, data: st.DataObject) -> None:
    datasets = [opened(photos, augmentation=AUGMENTATION, workers=workers) for workers in (0, 1, 3)]
    every = np.arange(datasets[0].samples)
    whole = [datasets[0].gather(every, choices_of(np.full(len(every), epoch)))[0]["images"] for epoch in range(2)]
    ids = np.array(data.draw(st.lists(st.sampled_from(every.tolist()), min_size=1, max_size=20)), dtype=np.int64)
    epochs = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))), dtype=np.int64)
    for dataset in datasets:
        fields, hashes = dataset.gather(ids, choices_of(epochs))
        assert np.array_equal(fields["images"], np.stack([whole[e][i] for e, i in zip(epochs, ids, strict=True)]))
        plain, plain_hashes = dataset.gather(ids)
        assert np.array_equal(fields["labels"], plain["labels"])
        assert np.array_equal(hashes, plain_hashes)  # the proof is about what is stored


def test_the_key_is_seed_epoch_and_sample(photos: Path) -> None:
    dataset = opened(photos, augmentation=AUGMENTATION)
    ids = np.arange(10)
    tables = [
        dataset.gather(ids, choices_of(np.full(10, epoch), seed))[0]["images"]
        for seed, epoch in ((3, 0), (3, 1), (4, 0), (7, 1), (8, 0))
    ]
    for first in range(len(tables)):
        for second in range(first):
            assert all((a != b).any() for a, b in zip(tables[first], tables[second], strict=True))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_definition(photos: Path, interpolation: str, channels: int) -> None:
    """Against the files themselves, found by their content."""
    resample = Image.Resampling[interpolation.upper()]
    mode = "L" if channels == 1 else "RGB"
    jitter = AUGMENTATION["colour_jitter"] | ({"saturation": 0.0, "hue": 0.0} if channels == 1 else {})
    values = AUGMENTATION | {"colour_jitter": jitter}
    keys: dict[str, Any] = {"interpolation": interpolation, "image_channels": channels, "shorter_side_pixels": 20}
    plain, altering = opened(photos, **keys), opened(photos, **keys, augmentation=values)
    files = {}
    for path in (photos / "source").glob("*/*"):
        content = path.read_bytes()
        files[xxhash.xxh3_64_intdigest(content, seed=int(path.parent.name == "dog"))] = Image.open(io.BytesIO(content))
    ids = np.arange(plain.samples)
    fields, hashes = plain.gather(ids)
    altered = altering.gather(ids, choices_of(np.zeros(len(ids))))[0]["images"]
    # Without choices, as in evaluation and in a dry run, nothing is altered.
    assert np.array_equal(altering.gather(ids)[0]["images"], fields["images"])
    words = augmentation_words(choices_of(np.zeros(len(ids))), ids).tolist()
    augmentation = AugmentationConfig.model_validate(values)
    for row, key in enumerate(hashes.tolist()):
        image = files.pop(key).convert(mode)
        expected = augmented(image, words[row], augmentation, SIZE, 20, resample)
        assert np.array_equal(altered[row], np.asarray(expected).reshape(SIZE, SIZE, channels).transpose(2, 0, 1))
        scale = 20 / min(image.size)
        resized = image.resize((int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)), resample)
        left, top = round((resized.width - SIZE) / 2), round((resized.height - SIZE) / 2)
        middle = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).reshape(SIZE, SIZE, channels)
        assert np.array_equal(fields["images"][row], middle.transpose(2, 0, 1))
    assert fields["images"].flags.c_contiguous


def test_without_augmentation_choices_change_nothing(photos: Path) -> None:
    dataset = opened(photos)
    ids = np.arange(dataset.samples)
    plain, chosen = dataset.gather(ids), dataset.gather(ids, choices_of(np.full(len(ids), 5)))
    assert np.array_equal(plain[0]["images"], chosen[0]["images"])
    assert not dataset.mixes


def test_mixing_is_that_of_the_recipe(photos: Path) -> None:
    values = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    dataset = opened(photos, augmentation=values)
    assert dataset.mixes
    assert not opened(photos, augmentation={"flip": 0.5}).mixes
    fields, _ = dataset.gather(np.arange(12))
    partners, words = np.arange(8) ^ 1, np.arange(8, dtype=np.uint64)
    mixed = dataset.mix(fields, partners, words)
    expected = mix(fields, partners, words, AugmentationConfig.model_validate(values))
    assert set(mixed) == {"images", "labels", "partner_labels", "label_weights"}
    assert all(np.array_equal(mixed[name], expected[name]) for name in expected)
    assert [len(field) for field in mixed.values()] == [8] * 4


def corrupt(root: Path, rows: list[int]) -> None:
    """Break images of the training split and give the manifest the hashes that fit: only decoding can notice."""
    [path] = root.glob("prepared/train-*.arrow")
    dataset = opened(root)
    content = bytearray(path.read_bytes())
    for row in rows:
        image, _ = dataset._shards[0].read(row)
        at = content.index(bytes(image))
        content[at : at + 8] = bytes(8)
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(content)
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]

    def rehash(manifest: dict[str, Any]) -> None:
        [shard] = manifest["splits"]["train"]["shards"]
        shard["data"]["blocks"] = [xxhash.xxh3_64_hexdigest(bytes(block)) for block in blocks]

    rewrite(root / "prepared", rehash)


@pytest.fixture
def broken(photos: Path, tmp_path: Path) -> Path:
    """The same images, 5, 6 and 20 of the training split no longer images."""
    (tmp_path / "source").symlink_to(photos / "source")
    prepare(config_of(tmp_path))
    corrupt(tmp_path, [5, 6, 20])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_first_image_that_is_none_is_named(broken: Path, workers: int) -> None:
    dataset = opened(broken, workers=workers)
    dataset.gather(np.arange(5))
    for _ in range(20):  # whichever thread comes first
        with pytest.raises(CorruptData, match="image 20 cannot be decoded") as refused:
            dataset.gather(np.array([0, 1, 20, 2, 5, 6, *range(7, 15)]))
        assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(broken / "prepared"))
    assert image_threads() == []
    # What came after is none the worse.
    images = dataset.gather(np.array([7, 0]))[0]["images"]
    assert np.array_equal(images, opened(broken).gather(np.array([7, 0]))[0]["images"])


def test_no_thread_outlives_what_it_was_started_for(photos: Path, broken: Path) -> None:
    dataset = opened(photos, augmentation=AUGMENTATION, workers=3)
    before = {*threading.enumerate()}
    dataset.gather(np.arange(dataset.samples), choices_of(np.zeros(dataset.samples)))
    assert {*threading.enumerate()} <= before
    for root, ends in ((photos, contextlib.nullcontext()), (broken, pytest.raises(CorruptData))):
        source = opened(root, workers=2)
        stream = Stream(
            {"": source},
            plan_of(source, 8),
            rank=0,
            world_size=1,
            micro_samples=8,
            position=0,
            stop_position=20 * 8,
            count_items=lambda batch: len(batch["labels"]),
        )
        with ends:
            assert len(list(stream)) == 20
        stream.close()
        assert image_threads() == []
    del dataset, source, stream
    gc.collect()
    assert {*threading.enumerate()} <= before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": {}}, "asks for nothing"),
        ({"augmentation": {"flip": 1.5}}, "flip"),
        ({"augmentation": {"flip": float("nan")}}, "flip"),
        ({"augmentation": {"mixup_alpha": 0.0}}, "mixup_alpha"),
        ({"augmentation": {"mixup_alpha": float("inf")}}, "mixup_alpha"),
        ({"augmentation": {"cutmix_alpha": -1}}, "cutmix_alpha"),
        ({"augmentation": {"random_resized_crop": {"scale": [0.5, 0.4]}}}, "lower end first"),
        ({"augmentation": {"random_resized_crop": {"scale": [0.5, 1.1]}}}, "more than the whole image"),
        ({"augmentation": {"random_resized_crop": {"scale": [0.0, 1.0]}}}, "scale"),
        ({"augmentation": {"random_resized_crop": {"ratio": [2.0, 1.0]}}}, "lower end first"),
        ({"augmentation": {"random_resized_crop": {"ratio": [1.0, 1e6]}}}, "beyond 1:1000"),
        ({"augmentation": {"colour_jitter": {}}}, "nothing above 0"),
        ({"augmentation": {"colour_jitter": {"hue": 0.6}}}, "hue"),
        ({"augmentation": {"colour_jitter": {"brightness": -0.1}}}, "brightness"),
        ({"augmentation": {"colour": 1}}, "colour"),
        ({"workers": -1}, "workers"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"shorter_side_pixels": 15}, "has no square of image_size_pixels 16 in it"),
        ({"shorter_side_pixels": 20, "image_size_pixels": None}, "has no square of image_size_pixels"),
    ],
)
def test_impossible_wishes_are_refused(photos: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(photos, **changes)


@pytest.mark.parametrize("part", ["saturation", "hue"])
def test_colours_of_grey_images_are_refused(photos: Path, part: str) -> None:
    jitter = {"augmentation": {"colour_jitter": {part: 0.2}}}
    opened(photos, **jitter)
    with pytest.raises(ValueError, match="mean nothing to grey images; remove them"):
        opened(photos, **jitter, image_channels=1)


IMAGE_OPTIONS: list[dict[str, Any]] = [
    {"workers": 2},
    {"augmentation": {"flip": 0.5}},
    {"interpolation": "bicubic"},
    {"image_size_pixels": 8, "shorter_side_pixels": 9},
]


@pytest.mark.parametrize("changes", IMAGE_OPTIONS)
def test_what_means_nothing_to_text_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    for source in ("stdlib", "jsonl:a#text", "text:a", "parquet:a#text"):
        with pytest.raises(ValueError, match=f"{next(reversed(changes))} means nothing to data.source={source}"):
            DataConfig.model_validate({"source": source} | changes)
    # What a hub's dataset holds is known once it is opened.
    config = DataConfig.model_validate({"source": "hf:name"} | changes)
    directory, _ = prepared_tokens(tmp_path)
    with pytest.raises(ValueError, match=f"{next(reversed(changes))} means nothing to {directory}, which is text"):
        open_dataset(LocalStore(directory), config, "train")
