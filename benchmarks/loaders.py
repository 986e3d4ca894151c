"""This project's stream against the loaders that others use, each as its own documentation recommends.

    python benchmarks/loaders.py --cache DIRECTORY [--kinds tokens images] [--only NAME ...] [--quick] [--output DIRECTORY]

Makes all it needs below the cache directory the first time (two environments, a corpus of 67 M tokens out of Debian's
kernel source, 5,000 JPEGs, each in every format), measures, and writes loaders.json and loaders.md.

Every contender is a process of its own, all of one table alive at once; a gate lets one at a time read for a short block,
A B C and then C B A. Ratios are taken within a round, so that foreign load which lasts longer than a round cancels out.
What cannot be installed or fails is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.loader_environments import batches_of, make_environment, make_format, make_images, make_tokens
from benchmarks.loader_report import as_markdown, losses
from benchmarks.machine import describe_machine

SCRIPT = Path(__file__).with_name("loader_contenders.py")
TIMEOUT_SECONDS = 180.0


class Entry(NamedTuple):
    """A contender: its environment (empty: this one), the format it reads, and what of."""

    environment: str = ""
    format: str = ""
    kinds: tuple[str, ...] = ("tokens", "images")


ENTRIES = {
    "bare": Entry(kinds=("tokens",)),
    "lockstep": Entry(),
    "torch": Entry(),
    "torch_batched": Entry(kinds=("tokens",)),
    "torchdata": Entry("peers"),
    "mds": Entry("mds", "mds"),
    "litdata": Entry("peers", "litdata"),
    "webdataset": Entry("peers", "webdataset"),
    "hf_map": Entry("peers", "hf"),
    "hf_stream": Entry("peers", "parquet"),
    "grain": Entry("peers", kinds=("tokens",)),
    "grain_arrayrecord": Entry("peers", "arrayrecord"),
}


class Failure(Exception):
    """A contender cannot go on; the message is its row."""


class Contender:
    """One contender's process, as the gate sees it."""

    def __init__(self, name: str, kind: str, workers: int, python: Path, root: Path) -> None:
        self.name = name
        job = {"name": name, "kind": kind, "workers": workers, "directory": str(root)}
        self._log = (root / f"{name}-{kind}-{workers}.log").open("w")
        begun = time.perf_counter()
        homes = {"HF_HOME": str(root / "hf-home"), "LITDATA_CACHE_DIR": str(root / "litdata-cache")}
        environment = os.environ | homes | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, SCRIPT, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        try:
            self.begin = self._answer()
        except Failure:
            self.end()
            raise
        self.begin["start_seconds"] = time.perf_counter() - begun

    def ask(self, what: str, amount: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, "amount": amount}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failure("the process is gone") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], TIMEOUT_SECONDS)[0]:
            raise Failure(f"no answer within {TIMEOUT_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"the process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def memory(self) -> dict[str, float]:
        """Proportional set size in MB: of all its processes, and of its largest worker."""
        sizes = {pid: _pss_megabytes(pid) for pid in _tree(self._process.pid)}
        workers = [size for pid, size in sizes.items() if pid != self._process.pid]
        return {"tree_mb": sum(sizes.values()), "worker_mb": max(workers, default=0.0)}

    def end(self) -> None:
        """Let the process tidy up what would outlive it, then kill it and all that it started."""
        tree = _tree(self._process.pid)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._log.write("killed\n")
        for pid in reversed(tree):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self._process.wait()
        self._log.close()


def _tree(pid: int) -> list[int]:
    """The process and its descendants."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
    children: list[int] = []
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended; the others have not
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(descendant for child in children for descendant in _tree(child))]


def _pss_megabytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def prepare_contenders(
    names: list[str], kind: str, root: Path, cache: Path
) -> tuple[dict[str, Path], dict[str, str], dict[str, float]]:
    """Interpreters of those that can run, why the others cannot, and the seconds that writing each format took."""
    pythons: dict[str, Path] = {}
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name in names:
        entry = ENTRIES[name]
        try:
            python = make_environment(entry.environment, cache) if entry.environment else Path(sys.executable)
            if entry.format:
                begun = time.perf_counter()
                make_format(entry.format, kind, root, python)
                seconds[entry.format] = time.perf_counter() - begun
            pythons[name] = python
        except RuntimeError as error:
            failures[name] = str(error)
    return pythons, failures, seconds


def measure(
    kind: str, workers: int, names: list[str], pythons: dict[str, Path], root: Path, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """One table: what each contender did."""
    rows: dict[str, dict[str, Any]] = {name: {"samples_per_second": []} for name in names}
    alive: dict[str, Contender] = {}

    def give_up(name: str, failure: Failure) -> None:
        rows[name]["failure"] = str(failure)
        if name in alive:
            alive.pop(name).end()

    try:
        for name in names:
            try:
                alive[name] = Contender(name, kind, workers, pythons[name], root)
                rows[name] |= alive[name].begin
            except Failure as failure:
                give_up(name, failure)
        for number in range(options.rounds):
            for name in list(alive) if number % 2 == 0 else list(reversed(alive)):
                try:
                    rows[name]["samples_per_second"].append(
                        alive[name].ask("run", options.block_seconds)["samples_per_second"]
                    )
                except Failure as failure:
                    give_up(name, failure)
        for name in list(alive):
            rows[name] |= alive[name].memory()
        for name in list(alive):
            try:
                half = batches_of(kind, options.blocks, options.images) // 2
                rows[name] |= alive[name].ask("resume", half)
            except Failure as failure:  # what it measured until now holds
                rows[name]["resume_failure"] = str(failure)
    finally:
        for contender in alive.values():
            contender.end()
    return rows


def versions(pythons: set[Path]) -> dict[str, list[str]]:
    """What is installed in each environment, of what matters here."""
    code = (
        "from importlib.metadata import distributions as d; "
        "w='torch numpy pillow pyarrow datasets torchdata webdataset grain array_record litdata mosaicml-streaming'.split(); "
        "print(*sorted({f'{x.name}=={x.version}' for x in d() if x.name in w or x.name.replace('-','_') in w}))"
    )
    found = {
        python: subprocess.run([python, "-c", code], capture_output=True, text=True, check=True) for python in pythons
    }
    return {
        "this project's" if str(python) == sys.executable else python.parents[1].name: done.stdout.split()
        for python, done in sorted(found.items())
    }


def parse_options() -> argparse.Namespace:
    """The command line, `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="environments and corpora, kept from run to run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--kinds", nargs="+", choices=("tokens", "images"), default=["tokens", "images"])
    parser.add_argument("--only", nargs="+", choices=tuple(ENTRIES), default=list(ENTRIES), metavar="NAME")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--corpus", choices=("linux", "stdlib"), default="linux", help="where the text comes from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-seconds", type=float, default=1.0)
    parser.add_argument("--blocks", type=int, default=65_536, help="samples of 1,025 tokens")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--quick", action="store_true", help="small corpora, two short rounds: to try, not to conclude")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.block_seconds, options.blocks, options.images = 2, 0.05, 4096, 200
        options.corpus = "stdlib"
    return options


def main() -> None:
    """Prepares, measures, writes `loaders.json` and `loaders.md`."""
    options = parse_options()
    cache = options.cache.resolve()
    machine, begun = describe_machine(), time.perf_counter()
    tables, used = [], {Path(sys.executable)}
    for kind in options.kinds:
        amount = options.blocks if kind == "tokens" else options.images
        root = cache / f"{kind}-{options.corpus}-{amount}"
        if kind == "tokens":
            make_tokens(root, options.corpus, options.blocks)
        else:
            make_images(root, options.images)
        chosen = [name for name in options.only if kind in ENTRIES[name].kinds]
        pythons, failures, seconds = prepare_contenders(chosen, kind, root, cache)
        used |= {*pythons.values()}
        for workers in options.workers:
            names = list(pythons)
            rows = measure(kind, workers, names, pythons, root, options)
            rows |= {name: {"failure": text, "samples_per_second": []} for name, text in failures.items()}
            tables.append({"kind": kind, "workers": workers, "rows": rows, "format_seconds": seconds})
            print(f"{kind}, {workers} workers: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    settings = {"rounds": options.rounds, "block_seconds": options.block_seconds, "corpus": options.corpus}
    results = {
        "machine": machine,
        "versions": versions(used),
        "settings": settings | {"blocks": options.blocks, "images": options.images},
        "seconds": time.perf_counter() - begun,
        "tables": tables,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "loaders.json").write_text(json.dumps(results, indent=1) + "\n")
    text = as_markdown(results)
    (options.output / "loaders.md").write_text(text)
    print(text)
    for loss in losses(results):
        if loss.why is None:
            print(f"not explained yet: {loss.text}", file=sys.stderr)


if __name__ == "__main__":
    main()
