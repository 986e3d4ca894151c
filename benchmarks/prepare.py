"""`lockstep prepare` against the tokenizers' library alone, on the same text and cores.

    python benchmarks/prepare.py

Writes benchmarks/results/prepare.json and prepare.md. The contenders alternate, each in processes of its own. The text is
the standard library of Python, its documents repeated; both use one tokenizer, trained on it before.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.machine import device
from data.config import DataConfig, parse_given
from data.source_reading import Document, read_unit
from data.sources import open_source
from data.store import LocalStore, read_manifest
from data.units import input_of, plan_units
from data.vocabulary import prepare_tokenizer

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
TOKENIZER = "bpe:16384"
BATCH_DOCUMENTS = 1000


def documents() -> list[str]:
    """The documents of the standard library."""
    sources = [open_source(parse_given("stdlib"))]
    found = [document for unit in plan_units(sources) for document in read_unit(input_of(unit, sources, None))]
    return [document.text for document in found if isinstance(document, Document) and document.text]


def write_corpus(path: Path, megabytes: int) -> dict[str, int]:
    """JSONL of so much text; its documents and bytes of text."""
    texts = documents()
    count = size_bytes = 0
    with path.open("w") as lines:
        while size_bytes < megabytes * 1e6:
            text = texts[count % len(texts)]
            lines.write(json.dumps({"text": text}) + "\n")
            count += 1
            size_bytes += len(text.encode())
    return {"documents": count, "text_bytes": size_bytes}


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        yield texts[start : start + BATCH_DOCUMENTS]


def alone(corpus: Path, tokenizer: Path, call: str) -> None:
    """Print the seconds that the library takes for texts that lie in memory, and how many tokens it made."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    texts = [json.loads(line)["text"] for line in corpus.open()]
    encode = getattr(backend, call)
    start, cpu = time.perf_counter(), time.process_time()
    tokens = 0
    for batch in _batches(texts):
        for encoding in encode(batch, add_special_tokens=False):
            tokens += len(encoding)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}))


def run_alone(corpus: Path, tokenizer: Path, call: str) -> dict[str, Any]:
    """Measure the library in a process of its own, over all cores."""
    command = [sys.executable, __file__, "--alone", call, str(corpus), str(tokenizer)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def run_prepare(corpus: Path, tokenizer: Path, directory: Path) -> dict[str, Any]:
    """Measure the whole of `lockstep prepare`, from the start of Python to its end."""
    command = [sys.executable, "-m", "launch.cli", "prepare", f"jsonl:{corpus}#text", "--out", str(directory)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--tokenizer", str(tokenizer)], check=True, capture_output=True, env=environment())
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    splits = read_manifest(LocalStore(directory)).splits.values()
    # Without the token that ends each document, which the library alone does not make.
    tokens = sum((split.tokens or 0) - split.documents for split in splits)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}


def environment() -> dict[str, str]:
    """The caller's, with this checkout to import from, and no limit on threads."""
    limits = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in limits} | {"PYTHONPATH": str(ROOT)}


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(megabytes: int, rounds: int) -> dict[str, Any]:
    """All measurements, as they go into prepare.json."""
    seconds: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "prepare": []}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        tokenizer = (root / prepare_tokenizer([DataConfig(source="train=stdlib", tokenizer=TOKENIZER)])).resolve()
        corpus = root / "corpus.jsonl"
        counts = write_corpus(corpus, megabytes)
        for number in range(rounds):
            measured = {
                "encode_batch": run_alone(corpus, tokenizer, "encode_batch"),
                "prepare": run_prepare(corpus, tokenizer, root / f"prepared-{number}"),
                "encode_batch_fast": run_alone(corpus, tokenizer, "encode_batch_fast"),
            }
            assert len({one["tokens"] for one in measured.values()}) == 1, measured
            for name, one in measured.items():
                seconds[name].append(one["seconds"])
                cpu_seconds[name].append(one["cpu_seconds"])
        os.chdir("/")
    text_bytes = counts["text_bytes"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(["benchmarks/prepare.py", *sys.argv[1:]]),
        "device": device(),
        "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        "rounds": rounds,
        "tokenizer": TOKENIZER,
        **counts,
        "tokens": measured["prepare"]["tokens"],
        "seconds": seconds,
        "cpu_seconds": {name: spread(values) for name, values in cpu_seconds.items()},
        "megabytes_per_second": {
            name: spread([text_bytes / 1e6 / value for value in values]) for name, values in seconds.items()
        },
        "ratio": {
            name: spread([alone / own for alone, own in zip(seconds[name], seconds["prepare"], strict=True)])
            for name in ("encode_batch", "encode_batch_fast")
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        ("`encode_batch` alone, MB/s", results["megabytes_per_second"]["encode_batch"]),
        ("`encode_batch_fast` alone, MB/s", results["megabytes_per_second"]["encode_batch_fast"]),
        ("`lockstep prepare`, whole process, MB/s", results["megabytes_per_second"]["prepare"]),
        ("**prepare / `encode_batch`, per round** (goal: at least 0.85)", results["ratio"]["encode_batch"]),
        ("prepare / `encode_batch_fast`, per round", results["ratio"]["encode_batch_fast"]),
        ("`encode_batch` alone, CPU seconds", results["cpu_seconds"]["encode_batch"]),
        ("`encode_batch_fast` alone, CPU seconds", results["cpu_seconds"]["encode_batch_fast"]),
        ("`lockstep prepare`, all its processes, CPU seconds", results["cpu_seconds"]["prepare"]),
    ]
    lines = ["| what | median | min | max |", "|---|---:|---:|---:|"]
    for label, values in rows:
        lines.append(f"| {label} | " + " | ".join(f"{values[name]:.2f}" for name in ("median", "min", "max")) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"""# Preparation against the tokenizers' library alone

`{results["command"]}`, {results["date"]}, {results["device"]}, {versions}; {results["rounds"]} rounds, alternating.

{results["documents"]:,} documents, {results["text_bytes"] / 1e6:.0f} MB of Python's standard library, repeated;
{results["tokens"]:,} tokens of a tokenizer of the kind {results["tokenizer"]}, trained before. The library alone encodes
texts that lie in memory, {BATCH_DOCUMENTS:,} at a time, with threads of its own on all cores; its start and the reading are
not counted. `lockstep prepare` is timed from the start of Python to its end: it reads JSONL, divides, encodes in one
process for each core, writes shards, hashes and syncs them.

"""
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--alone", nargs=3, metavar=("CALL", "CORPUS", "TOKENIZER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        call, corpus, tokenizer = arguments.alone
        alone(Path(corpus), Path(tokenizer), call)
        return
    output = arguments.output.resolve()
    results = measure(arguments.megabytes, arguments.rounds)
    output.mkdir(parents=True, exist_ok=True)
    (output / "prepare.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "prepare.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
