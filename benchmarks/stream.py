"""The stream against a bare memory-map gather of the same samples in the same random order.

    python benchmarks/stream.py

Writes benchmarks/results/stream.json and stream.md. The two contenders alternate in one process and map
their files anew in each round, so the stream's time includes checking every block. The page cache is warm.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from data.config import DataConfig
from data.dataset import TokenDataset, open_dataset
from data.digest import EMPTY_DIGEST, chain
from data.order import ORDER_VERSION, Order
from data.plan import Plan, Segment
from data.prepare import prepare
from data.stream import Stream

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
    dataset = open_dataset(directory, DataConfig(sequence_tokens=sequence_tokens), "train")
    assert isinstance(dataset, TokenDataset)
    return dataset


def stream_of(dataset: TokenDataset, batch_samples: int, position: int, stop_position: int) -> Stream:
    """A shuffled, checked and digested stream for one rank."""
    sequence_tokens = dataset.facts.sequence_tokens
    assert sequence_tokens is not None
    segment = Segment(
        start_position=0,
        fingerprints=(dataset.fingerprint,),
        order=ORDER_VERSION,
        sequence_tokens=sequence_tokens,
        seed=1,
        global_samples=batch_samples,
    )
    return Stream(
        dataset,
        Plan.of([segment]),
        rank=0,
        world_size=1,
        micro_samples=batch_samples,
        position=position,
        stop_position=stop_position,
        count_items=lambda batch: batch["tokens"].shape[0] * sequence_tokens,
    )


def run_stream(directory: Path, first: int) -> float:
    """Seconds to stream BLOCKS samples from position `first` on, opening the dataset and chaining digests included."""
    start = time.perf_counter()
    stream = stream_of(opened(directory, SEQUENCE_TOKENS), BATCH_SAMPLES, first, first + BLOCKS)
    digest, samples = EMPTY_DIGEST, 0
    for step in stream:
        digest = chain(digest, step.fold)
        samples += step.samples
    stream.close()
    assert samples == BLOCKS
    return time.perf_counter() - start


def bare_gather(directory: Path, root: Path) -> Callable[[int], float]:
    """The limit: one flat file of all samples, mapped; batches are fancy-indexed rows, the order is computed before."""
    flat = root / "flat.bin"
    with flat.open("wb") as file:
        dataset = opened(directory, SEQUENCE_TOKENS)
        for start in range(0, dataset.samples, 4096):
            rows = np.arange(start, min(start + 4096, dataset.samples))
            file.write(dataset.gather(rows)[0]["tokens"].data)
    order = Order(dataset.samples, 1)

    def run(first: int) -> float:
        ids = order.sample_ids(np.arange(first, first + BLOCKS))[1]
        start = time.perf_counter()
        blocks = np.asarray(np.memmap(flat, dtype=np.uint16, mode="r")).reshape(-1, SEQUENCE_TOKENS + 1)
        for at in range(0, BLOCKS, BATCH_SAMPLES):
            blocks[ids[at : at + BATCH_SAMPLES]]
        return time.perf_counter() - start

    return run


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
    Order(10**13, 1).sample_ids(10**12 + np.arange(256))
    return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def device() -> str:
    """The processor's name and the number of cores this process may use."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def measure(rounds: int) -> dict[str, object]:
    """All measurements, as they go into stream.json."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        directory = prepared_corpus(root)
        dataset = opened(directory, SEQUENCE_TOKENS)
        assert dataset.samples >= BLOCKS
        bare = bare_gather(directory, root)
        bare(0), run_stream(directory, 0)  # the first round only warms the page cache
        bare_seconds, stream_seconds, small, resume, order = [], [], [], [], []
        for number in range(rounds):
            bare_seconds.append(bare(number * BLOCKS))
            stream_seconds.append(run_stream(directory, number * BLOCKS))
            small.append(measure_small_steps(directory))
            resume.append(measure_resume(directory))
            order.append(measure_order())
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
        "bare_samples_per_second": spread([BLOCKS / seconds for seconds in bare_seconds]),
        "stream_samples_per_second": spread([BLOCKS / seconds for seconds in stream_seconds]),
        "ratio": spread([bare / stream for bare, stream in zip(bare_seconds, stream_seconds, strict=True)]),
        "small_step_cpu_microseconds": spread(small),
        "resume_milliseconds": spread(resume),
        "order_milliseconds": spread(order),
    }


def table(results: dict[str, object]) -> str:
    """The results as Markdown."""
    rows = {
        "bare memory-map gather, samples/s": "bare_samples_per_second",
        "stream, samples/s": "stream_samples_per_second",
        "stream / bare, per round (goal: at least 0.25)": "ratio",
        "CPU of a step of 8 samples of 33 tokens, all threads, µs": "small_step_cpu_microseconds",
        "first batch after resuming at position 10^9, ms (goal: at most 50)": "resume_milliseconds",
        "256 ids at position 10^12 of 10^13 samples, ms": "order_milliseconds",
    }
    lines = ["| what | median | min | max |", "|---|---:|---:|---:|"]
    for label, key in rows.items():
        values = results[key]
        assert isinstance(values, dict)
        digits = 0 if values["median"] > 1000 else 3
        lines.append(
            f"| {label} | " + " | ".join(f"{values[name]:,.{digits}f}" for name in ("median", "min", "max")) + " |"
        )
    head = (
        f"# The stream against a bare gather\n\n`{results['command']}`, {results['date']}, {results['device']}; "
        f"{results['versions']}; {results['rounds']} rounds, alternating.\n\n"
        f"{results['samples']} samples of {results['sequence_tokens']} + 1 uint16 tokens in batches of "
        f"{results['batch_samples']}, one rank, warm page cache. The stream opens the dataset, computes the order, checks every "
        "block, hashes every sample, folds, and chains the digest in each round; the bare gather has its order ready and "
        "does nothing but map one flat file and copy rows from it.\n\n"
    )
    return head + "\n".join(lines) + "\n"


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
