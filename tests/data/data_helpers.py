"""Small real datasets and streams for the tests of the data room."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.config import DataConfig
from data.manifest import fingerprint_of
from data.plan import Plan, Segment, StreamPart
from data.prepare import prepare
from data.samples import Dataset


def lorem(number: int) -> str:
    """A text of some hundred bytes that differs for every number."""
    return " ".join(f"document {number} says word {number * word % 97}" for word in range(8 + number % 5)) + "\n"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One record per text, under the field `text`."""
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return path


def write_images(folder: Path, *, count: int = 24, mode: str = "RGB", size: tuple[int, int] = (12, 12)) -> Path:
    """`count` images in the classes `cat` and `dog`, every second one a JPEG."""
    pixels = np.random.RandomState(0).randint(0, 256, (count, size[1], size[0], len(mode)), dtype=np.uint8)
    for number in range(count):
        place = folder / ("dog" if number % 3 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[number].squeeze())
        image.save(place / f"{number:03d}.{'png' if number % 2 else 'jpg'}")
    return folder


def token_config(root: Path, *, documents: int = 60, **changes: object) -> DataConfig:
    """A configuration of a JSONL corpus in `root`, to be prepared in `root/prepared`."""
    source = write_jsonl(root / "corpus.jsonl", [lorem(number) for number in range(documents)])
    values: dict[str, object] = {
        "source": f"jsonl:{source}#text",
        "directory": root / "prepared",
        "sequence_tokens": 16,
    }
    return DataConfig.model_validate(values | {"validation_fraction": 0.2} | changes)


def prepared_tokens(root: Path, **changes: object) -> tuple[Path, DataConfig]:
    """A prepared dataset of tokens and its configuration."""
    config = token_config(root, **changes)
    return prepare(config), config


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def plan_of(dataset: Dataset, global_samples: int, seed: int = 1) -> Plan:
    """A plan of one segment."""
    return Plan.of([segment_of(dataset, global_samples, seed)])


def segment_of(dataset: Dataset, global_samples: int, seed: int = 1, start_position: int = 0) -> Segment:
    """A segment that reads `dataset` from `start_position` on."""
    return Segment(
        start_position=start_position,
        streams=(StreamPart(fingerprint=dataset.fingerprint, sequence_tokens=dataset.facts.sequence_tokens),),
        seed=seed,
        global_samples=global_samples,
    )


def count_targets(batch: Mapping[str, torch.Tensor]) -> int:
    """Items of a batch of tokens: its targets that are not a space, so that samples differ in their number."""
    return int((batch["tokens"].long()[:, 1:] != 32).sum())


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter the manifest and give it the fingerprint that fits: what a forger or a newer version would write."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]
    change(manifest)
    document = {"fingerprint": fingerprint_of(manifest), "manifest": manifest}
    path.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
