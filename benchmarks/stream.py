"""The stream against a bare memory-map gather of the same samples in the same random order.

    python benchmarks/stream.py

Writes benchmarks/results/stream.json and stream.md. The contenders alternate in one process, once with what they opened
before and once opening it anew, when the stream checks every block again. The page cache is warm.
"""

import argparse
import datetime
import functools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import device
from data.config import DataConfig
from data.dataset import open_dataset
from data.digest import EMPTY_DIGEST, chain
from data.order import GlobalOrder
from data.plan import Plan, Segment, StreamPart
from data.prepare import prepare
from data.store import LocalStore
from data.stream import Stream
from data.token_dataset import TokenDataset
from data.windows import WindowedOrder

Rows = npt.NDArray[np.uint16]

RESULTS = Path(__file__).parent / "results"
SEQUENCE_TOKENS = 1024
BLOCKS = 65_536
BATCH_SAMPLES = 32
SMALL_BATCH_SAMPLES, SMALL_SEQUENCE_TOKENS, SMALL_STEPS = 8, 32, 20_000
RESUME_POSITION = 10**9


def prepared_corpus(root: Path) -> Path:
    """Prepare a little more than 65,536 blocks of text from a fixed seed, through the real preparation."""
    words = ["".join(random.Random(word).choices("abcdefghijklmnopqrstuvwxyz", k=2 + word % 9)) for word in range(5000)]
    generator = random.Random(0)
    corpus = root / "corpus.jsonl"
    size_bytes = 0
    with corpus.open("w") as lines:
        while size_bytes < 1.08 * BLOCKS * SEQUENCE_TOKENS:
            text = " ".join(generator.choices(words, k=10_000))
            size_bytes += len(text)
            lines.write(json.dumps({"text": text}) + "\n")
    return prepare(DataConfig(source=f"jsonl:{corpus}#text", directory=root / "prepared"))


def opened(directory: Path, sequence_tokens: int) -> TokenDataset:
    """The training split."""
    dataset = open_dataset(LocalStore(directory), DataConfig(sequence_tokens=sequence_tokens), "train")
    assert isinstance(dataset, TokenDataset)
    return dataset


def stream_of(dataset: TokenDataset, batch_samples: int, position: int, stop_position: int) -> Stream:
    """A shuffled, checked and digested stream for one rank."""
    sequence_tokens = dataset.facts.sequence_tokens
    assert sequence_tokens is not None
    segment = Segment(
        start_position=0,
        streams=(StreamPart(fingerprint=dataset.fingerprint, sequence_tokens=sequence_tokens),),
        seed=1,
        global_samples=batch_samples,
    )
    return Stream(
        {"": dataset},
        Plan.of([segment]),
        rank=0,
        world_size=1,
        micro_samples=batch_samples,
        position=position,
        stop_position=stop_position,
        count_items=lambda batch: batch["tokens"].shape[0] * sequence_tokens,
    )


def run_stream(dataset: TokenDataset, first: int, *, widen: bool = False) -> None:
    """Stream BLOCKS samples from position `first` on and chain the digests; `widen`: make int64 batches of them."""
    stream = stream_of(dataset, BATCH_SAMPLES, first, first + BLOCKS)
    digest, samples = EMPTY_DIGEST, 0
    for step in stream:
        digest = chain(digest, step.fold)
        samples += step.samples
        if widen:
            for batch in step.micro_batches:
                batch.tensors["tokens"].long()
    stream.close()
    assert samples == BLOCKS


def write_flat(dataset: TokenDataset, path: Path) -> None:
    """All samples as rows of one flat file: the bare gather has no shards to look for."""
    with path.open("wb") as file:
        for start in range(0, dataset.samples, 4096):
            rows = np.arange(start, min(start + 4096, dataset.samples))
            file.write(dataset.gather(rows)[0]["tokens"].data)


def map_flat(path: Path) -> Rows:
    """The flat file as an array of rows, a plain view of the memory map."""
    return np.asarray(np.memmap(path, dtype=np.uint16, mode="r")).reshape(-1, SEQUENCE_TOKENS + 1)


def run_bare(rows: Rows, ids: npt.NDArray[np.int64], *, widen: bool = False) -> None:
    """The limit: copy the rows of one batch after another, in an order that was computed before."""
    for start in range(0, BLOCKS, BATCH_SAMPLES):
        batch = rows[ids[start : start + BATCH_SAMPLES]]
        if widen:
            torch.from_numpy(batch).long()


def seconds_of(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_small_steps(directory: Path) -> float:
    """CPU microseconds, all threads of the process together, that a step of 8 samples of 33 tokens costs."""
    stream = stream_of(
        opened(directory, SMALL_SEQUENCE_TOKENS), SMALL_BATCH_SAMPLES, 0, SMALL_BATCH_SAMPLES * SMALL_STEPS
    )
    start = time.process_time()
    digest = EMPTY_DIGEST
    for step in stream:
        digest = chain(digest, step.fold)
    stream.close()
    return (time.process_time() - start) / SMALL_STEPS * 1e6


def measure_resume(directory: Path) -> float:
    """Milliseconds from an opened dataset to the first batch at position 10^9."""
    dataset = opened(directory, SEQUENCE_TOKENS)
    start = time.perf_counter()
    stream = stream_of(dataset, BATCH_SAMPLES, RESUME_POSITION, RESUME_POSITION + 10**6)
    step = next(iter(stream))
    seconds = time.perf_counter() - start
    assert step.first_position == RESUME_POSITION
    stream.close()
    return seconds * 1e3


def measure_order() -> float:
    """Milliseconds for 256 sample ids at position 10^12 of 10^13 samples, the first time they are asked for."""
    start = time.perf_counter()
    GlobalOrder(10**13, 1).sample_ids(10**12 + np.arange(256))
    return (time.perf_counter() - start) * 1e3


def measure_windowed_order() -> float:
    """As `measure_order`, of 10,000 shards in lanes and windows, whose order is made for the first time as well."""
    shard_samples = np.full(10_000, 10**9)
    start = time.perf_counter()
    WindowedOrder(shard_samples, 1, lanes=64, window_shards=4).sample_ids(10**12 + np.arange(256))
    return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(bare: list[float], stream: list[float]) -> dict[str, float]:
    """The stream's speed as a share of the bare gather's, round by round."""
    return spread([limit / own for limit, own in zip(bare, stream, strict=True)])


def measure(rounds: int) -> dict[str, Any]:
    """All measurements, as they go into stream.json."""
    seconds: dict[str, list[float]] = defaultdict(list)
    small, resume, order_cost, windowed_cost = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        directory = prepared_corpus(root)
        dataset = opened(directory, SEQUENCE_TOKENS)
        assert dataset.samples >= BLOCKS
        write_flat(dataset, root / "flat.bin")
        rows = map_flat(root / "flat.bin")
        order = GlobalOrder(dataset.samples, 1)
        run_stream(dataset, 0)
        for number in range(rounds):
            first = number * BLOCKS
            ids = order.sample_ids(np.arange(first, first + BLOCKS))[1]
            works: dict[str, Callable[[], None]] = {
                "bare": partial(run_bare, rows, ids),
                "stream": partial(run_stream, dataset, first),
                "bare_int64": partial(run_bare, rows, ids, widen=True),
                "stream_int64": partial(run_stream, dataset, first, widen=True),
                "bare_anew": lambda ids=ids: run_bare(map_flat(root / "flat.bin"), ids),  # type: ignore[misc]
                "stream_anew": lambda first=first: run_stream(opened(directory, SEQUENCE_TOKENS), first),  # type: ignore[misc]
            }
            for name, work in works.items():
                seconds[name].append(seconds_of(work))
            small.append(measure_small_steps(directory))
            resume.append(measure_resume(directory))
            order_cost.append(measure_order())
            windowed_cost.append(measure_windowed_order())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(["benchmarks/stream.py", *sys.argv[1:]]),
        "device": device(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "xxhash")},
        "rounds": rounds,
        "samples": BLOCKS,
        "sequence_tokens": SEQUENCE_TOKENS,
        "batch_samples": BATCH_SAMPLES,
        "samples_per_second": {name: spread([BLOCKS / value for value in values]) for name, values in seconds.items()},
        "ratio": ratio(seconds["bare"], seconds["stream"]),
        "ratio_int64": ratio(seconds["bare_int64"], seconds["stream_int64"]),
        "ratio_anew": ratio(seconds["bare_anew"], seconds["stream_anew"]),
        "small_step_cpu_microseconds": spread(small),
        "resume_milliseconds": spread(resume),
        "order_milliseconds": spread(order_cost),
        "windowed_order_milliseconds": spread(windowed_cost),
    }


ROWS = {
    "samples_per_second.bare": "bare memory-map gather, samples/s",
    "samples_per_second.stream": "stream, samples/s",
    "ratio": "**stream / bare, per round** (goal: at least 0.5)",
    "samples_per_second.bare_int64": "bare, batches widened to int64, samples/s",
    "samples_per_second.stream_int64": "stream, batches widened to int64, samples/s",
    "ratio_int64": "**stream / bare, both int64, per round** (goal: at least 0.5)",
    "samples_per_second.bare_anew": "bare, file mapped anew in each round, samples/s",
    "samples_per_second.stream_anew": "stream, dataset opened anew and every block checked again, samples/s",
    "ratio_anew": "stream / bare, both anew, per round",
    "small_step_cpu_microseconds": "CPU of a step of 8 samples of 33 tokens, all threads, µs",
    "resume_milliseconds": "first batch after resuming at position 10^9, ms (goal: at most 50)",
    "order_milliseconds": "256 ids at position 10^12 of 10^13 samples, ms (goal: at most 10)",
    "windowed_order_milliseconds": "the same in lanes and windows of 10,000 shards, ms",
}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| what | median | min | max |", "|---|---:|---:|---:|"]
    for key, label in ROWS.items():
        values = functools.reduce(dict.__getitem__, key.split("."), results)
        digits = 0 if values["median"] > 1000 else 3
        cells = [f"{values[name]:,.{digits}f}" for name in ("median", "min", "max")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"""# The stream against a bare gather

`{results["command"]}`, {results["date"]}, {results["device"]}, {versions}; {results["rounds"]} rounds, alternating.

{results["samples"]:,} samples of {results["sequence_tokens"]} + 1 tokens in batches of {results["batch_samples"]}, one rank,
warm page cache. The stream computes the order, gathers from shards, checks each block the first time it is touched, hashes every
sample, folds, and chains the digest of every step. The bare gather has its order ready and only copies rows from one flat
file. Both deliver uint16, as stored; "int64" adds the conversion that a model's embedding asks for, which other loaders do
while loading. "Anew" includes opening files, mapping their pages and, for the stream, checking all blocks.

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
    (RESULTS / "stream.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "stream.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
