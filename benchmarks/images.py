"""Images decoded and augmented by 0, 1 and 2 workers, against a bare loop over Pillow.

    python benchmarks/images.py

Writes benchmarks/results/images.json and images.md. The images are JPEGs of 500 x 375 pixels, about ImageNet's
mean, cut out of the two photographs that scikit-learn ships. The contenders alternate in one process, every few hundred
images, so that what else the machine does meets them alike; the page cache is warm.
"""

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images

from benchmarks.machine import device
from data.config import DataConfig
from data.dataset import open_dataset
from data.draws import integer, key_words
from data.prepare import prepare
from data.samples import Choices
from data.store import LocalStore

RESULTS = Path(__file__).parent / "results"
IMAGES = 3000
STORED, SIZE, SHORTER_SIDE = (500, 375), 224, 256
BATCH_SAMPLES = 64
ROUND_BATCHES = 8
WORKERS = (0, 1, 2)
CROP_AND_FLIP = {"random_resized_crop": {}, "flip": 0.5}
COLOURS = {"colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}}
CASES: dict[str, dict[str, Any] | None] = {
    "crop, flip": CROP_AND_FLIP,
    "crop, flip, colours": CROP_AND_FLIP | COLOURS,
    "evaluation": None,
}


def write_photographs(folder: Path) -> None:
    """JPEGs of parts of the two photographs, at places and with flips of their own, in two classes."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number, words in enumerate(key_words(np.arange(IMAGES, dtype=np.uint64), 3).tolist()):
        photograph = photographs[number % 2]
        left = integer(words[0], photograph.width - STORED[0] + 1)
        upper = integer(words[1], photograph.height - STORED[1] + 1)
        part = photograph.crop((left, upper, left + STORED[0], upper + STORED[1]))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if integer(words[2], 2) else part
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        part.save(folder / str(number % 2) / f"{number:05d}.jpg", quality=90)


def bare(contents: list[bytes]) -> None:
    """What a script would write: decode and resize in one loop, no checks, no choices."""
    for content in contents:
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def gathered(config: DataConfig, directory: Path, number: int) -> tuple[float, float]:
    """Wall and CPU seconds of a round's batches, all contenders' the same ones."""
    dataset = open_dataset(LocalStore(directory), config, "train")
    batches = [
        (np.arange(BATCH_SAMPLES) + (number * ROUND_BATCHES + batch) * BATCH_SAMPLES) % dataset.samples
        for batch in range(ROUND_BATCHES)
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    for ids in batches:
        dataset.gather(ids, Choices(0, np.full(len(ids), number)))
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(rounds: int) -> dict[str, Any]:
    """All measurements, as they go into images.json."""
    rates: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    cores: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    bare_rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "photographs")
        common = {"source": f"images:{root / 'photographs'}", "directory": root / "prepared", "image_size_pixels": SIZE}
        directory = prepare(DataConfig.model_validate(common))
        contents = [path.read_bytes() for path in sorted((root / "photographs").glob("*/*"))]
        images = ROUND_BATCHES * BATCH_SAMPLES
        for number in range(rounds + 1):  # the first one warms up
            part = [contents[index % len(contents)] for index in range(number * images, (number + 1) * images)]
            begun = time.perf_counter()
            bare(part)
            if number:
                bare_rates.append(images / (time.perf_counter() - begun))
            for case, augmentation in CASES.items():
                for workers in WORKERS:
                    keys = {"augmentation": augmentation, "workers": workers}
                    keys |= {"shorter_side_pixels": SHORTER_SIDE} if augmentation is None else {}
                    config = DataConfig.model_validate(common | keys)
                    wall, cpu = gathered(config, directory, number)
                    if number:
                        rates[case].setdefault(str(workers), []).append(images / wall)
                        cores[case].setdefault(str(workers), []).append(cpu / wall)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(["benchmarks/images.py", *sys.argv[1:]]),
        "device": device(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "pillow")}
        | {"libjpeg-turbo": features.version("libjpeg_turbo")},
        "load": [round(load, 1) for load in os.getloadavg()],
        "rounds": rounds,
        "images": IMAGES,
        "images_per_round": images,
        "stored_bytes": round(statistics.mean(map(len, contents))),
        "bare_images_per_second": spread(bare_rates),
        "images_per_second": {case: {w: spread(r) for w, r in table.items()} for case, table in rates.items()},
        "speedup_of_2": {
            case: spread([two / none for none, two in zip(table["0"], table["2"], strict=True)])
            for case, table in rates.items()
        },
        "cores_busy": {case: {w: spread(c) for w, c in table.items()} for case, table in cores.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| transforms | workers | images/s (median, min to max) | cores busy |", "|---|---:|---:|---:|"]
    rate = results["bare_images_per_second"]
    lines.append(
        f"| bare loop: decode and resize | - | {rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f}) | 1 |"
    )
    for case, by_workers in results["images_per_second"].items():
        for workers, rate in by_workers.items():
            busy = results["cores_busy"][case][workers]["median"]
            numbers = f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"
            lines.append(f"| {case} | {workers} | {numbers} | {busy:.2f} |")
    speedups = ", ".join(f"{case} {value['median']:.2f}" for case, value in results["speedup_of_2"].items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"""# Images by workers

`{results["command"]}`, {results["date"]}, {results["device"]}, {versions};
{results["rounds"]} rounds of {results["images_per_round"]} images, alternating. The machine's load at the end was
{results["load"][0]} (1 minute) and {results["load"][2]} (15 minutes).

{results["images"]:,} JPEGs of {STORED[0]} x {STORED[1]} pixels and {results["stored_bytes"]:,} bytes on average, cut out of
scikit-learn's two photographs, to {SIZE} x {SIZE}; batches of {BATCH_SAMPLES}, warm page cache. The dataset is opened anew each
round, so blocks are checked, and every image is hashed. "Crop" is RandomResizedCrop (0.08 to 1), "colours" jitters brightness,
contrast and saturation by 0.4 and hue by 0.1, "evaluation" resizes the shorter side to {SHORTER_SIDE} and cuts the middle out.
Workers are threads of this process; "cores busy" is its CPU time by the clock's. The bare loop resizes whole images.

2 workers against none, per round: {speedups}.

"""
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    torch.set_num_threads(1)
    results = measure(parser.parse_args().rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "images.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "images.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
