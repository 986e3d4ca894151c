"""What packing and keeping documents apart cost: gathering samples, and making the index; and how few documents it cuts.

    python benchmarks/packing.py

Writes packing.json and packing.md to benchmarks/results (or --output). One process, warm page cache; the contenders
alternate. The documents are cut from the standard library's sources to lengths drawn from a log-normal distribution.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import device
from data.config import DataConfig, parse_source
from data.dataset import open_dataset
from data.order import GlobalOrder
from data.packing import ensure_packing, pack_shard
from data.prepare import prepare
from data.sources import source_files
from data.store import LocalStore
from data.token_dataset import TokenDataset

RESULTS = Path(__file__).parent / "results"
SEQUENCE_TOKENS = 1024
BATCH_SAMPLES = 256
# Of the logarithm of a document's characters: half of them are shorter than 400, one in 14 is longer than a sequence.
LOCATION, SCALE = 6.0, 0.64
CONTENDERS: dict[str, dict[str, Any]] = {
    "concatenate": {},
    "concatenate, documents apart": {"separate_documents": True},
    "best fit": {"packing": "best_fit"},
    "best fit, documents apart": {"packing": "best_fit", "separate_documents": True},
}


def prepared_corpus(root: Path, characters: int) -> Path:
    """Prepare documents of the standard library's text, cut anew."""
    text = "".join(path.read_text() for path in source_files(parse_source("stdlib")))[:characters]
    lengths = random.Random(0)
    at = 0
    with (root / "corpus.jsonl").open("w") as lines:
        while at < len(text):
            length = 1 + int(lengths.lognormvariate(LOCATION, SCALE))
            lines.write(json.dumps({"text": text[at : at + length]}) + "\n")
            at += length
    return prepare(DataConfig(source=f"jsonl:{root}/corpus.jsonl#text", directory=root / "prepared"))


def opened(directory: Path, options: dict[str, Any]) -> TokenDataset:
    """The training split."""
    config = DataConfig(sequence_tokens=SEQUENCE_TOKENS, **options)
    ensure_packing(LocalStore(directory), config)
    dataset = open_dataset(LocalStore(directory), config, "train")
    assert isinstance(dataset, TokenDataset)
    return dataset


def gather_all(dataset: TokenDataset, seed: int) -> float:
    """Seconds to gather every sample once, in a random order, in batches."""
    ids = GlobalOrder(dataset.samples, seed).sample_ids(np.arange(dataset.samples))[1]
    start = time.perf_counter()
    for first in range(0, len(ids), BATCH_SAMPLES):
        dataset.gather(ids[first : first + BATCH_SAMPLES])
    return time.perf_counter() - start


def share_cut(directory: Path, *, best_fit: bool) -> float:
    """The share of documents that would fit into a sample and do not lie whole in one."""
    fitting = cut = 0
    for path in sorted(directory.glob("train-*.docs")):
        ends = np.fromfile(path, dtype="<u8").astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        short = ends - starts <= SEQUENCE_TOKENS + 1
        fitting += int(short.sum())
        if not best_fit:  # sample i holds tokens [iT, iT + T]
            cut += int((ends[short] > starts[short] // SEQUENCE_TOKENS * SEQUENCE_TOKENS + SEQUENCE_TOKENS + 1).sum())
        else:
            _, piece_starts, piece_tokens = pack_shard(ends, SEQUENCE_TOKENS)
            whole = set(zip(piece_starts.tolist(), (piece_starts + piece_tokens).tolist(), strict=True))
            cut += sum(pair not in whole for pair in zip(starts[short].tolist(), ends[short].tolist(), strict=True))
    return cut / fitting


def unused_share(dataset: TokenDataset) -> float:
    """The share of inputs whose target does not count."""
    ids = np.arange(dataset.samples)
    counted = sum(
        int(dataset.gather(part)[0]["loss_mask"].sum()) for part in np.array_split(ids, 1 + len(ids) // BATCH_SAMPLES)
    )
    return 1 - counted / (dataset.samples * SEQUENCE_TOKENS)


def seconds_to_pack(documents: int) -> float:
    """Seconds to pack one shard of so many documents."""
    lengths = np.random.RandomState(1).lognormal(LOCATION, SCALE, documents).astype(np.int64) + 2
    ends = np.cumsum(lengths)
    start = time.perf_counter()
    pack_shard(ends, SEQUENCE_TOKENS)
    return time.perf_counter() - start


def measure(rounds: int, characters: int, documents: int) -> dict[str, Any]:
    """All measurements, as they go into packing.json."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        directory = prepared_corpus(Path(folder), characters)
        datasets = {name: opened(directory, options) for name, options in CONTENDERS.items()}
        for number in range(-1, rounds):
            for name, dataset in datasets.items():
                spent = gather_all(dataset, number)
                if number >= 0:  # the first round checks every block and fills the page cache
                    seconds[name].append(spent / dataset.samples * 1e6)
        cut = {packing: share_cut(directory, best_fit=packing == "best_fit") for packing in ("concatenate", "best_fit")}
        unused = {name: unused_share(dataset) for name, dataset in datasets.items() if name != "concatenate"}
        samples = {name: dataset.samples for name, dataset in datasets.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(["benchmarks/packing.py", *sys.argv[1:]]),
        "device": device(),
        "versions": {"python": platform.python_version(), "numpy": version("numpy")},
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "samples": samples,
        "microseconds_per_sample": seconds,
        "share_of_documents_cut": cut,
        "share_of_inputs_without_target": unused,
        "documents_packed": documents,
        "seconds_to_pack": [seconds_to_pack(documents) for _ in range(3)],
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    cut, unused = results["share_of_documents_cut"], results["share_of_inputs_without_target"]
    lines = [
        "| samples | number | µs to gather one, median (least to most) | short documents cut | inputs without a target |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in results["microseconds_per_sample"].items():
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        share = cut["best_fit" if "best" in name else "concatenate"]
        without = f"{unused.get(name, 0.0):.2%}"
        lines.append(f"| {name} | {results['samples'][name]:,} | {spread} | {share:.1%} | {without} |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"# Packing\n\n`{results['command']}`, {results['date']}, {results['device']}, {versions}; {results['rounds']} "
        f"rounds, alternating; load average {results['load_average']:.1f}.\n\nSamples of {SEQUENCE_TOKENS} + 1 tokens "
        f"(bytes), gathered in batches of {BATCH_SAMPLES}, checked and hashed. A short document is one that fits into a "
        f"sample. Best fit is computed once per dataset and sequence length: {results['documents_packed']:,} documents take "
        f"{statistics.median(results['seconds_to_pack']):.2f} s.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--characters", type=int, default=12_000_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = measure(options.rounds, options.characters, options.documents)
    options.output.mkdir(exist_ok=True)
    (options.output / "packing.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "packing.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
