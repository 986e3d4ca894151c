"""What a step of this project's loop costs above a bare PyTorch loop over the same model and the same batches.

    python benchmarks/step.py [--only tiny|base|supervision] [--processes 1|2] [--rounds N] [--quick] [--output DIRECTORY]

Every contender is a process of its own (or one per rank), all of them alive at once; a gate lets one contender at a time
run a short block of steps, A B C and then C B A. Differences and ratios are taken within a round, so that foreign load
which lasts longer than a round cancels out; their median over all rounds of several fresh starts is what counts, with
its bootstrap interval. Beside it stands the same number from each contender's fastest block, which ignores bursts of
load. Tables about supervision compare blocks of the same processes, with heartbeats and without, in seconds that the cores
worked for them, and are written to a file of their own. That the contenders did the same work shows in the probe loss: the
loss on a fixed batch after the same steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe_machine, measured
from benchmarks.step_contenders import (
    BARE,
    FULL,
    MEANING,
    PLAIN,
    SUPERVISED,
    UNWATCHED,
    Job,
    Table,
    data_section,
    run_contender,
)
from data.config import DataConfig
from data.prepare import prepare
from launch.hangs import HangWatch, Limits
from launch.heartbeats import Board
from launch.worker_group import LOOK_SECONDS

TIMEOUT_SECONDS = 300.0


def _gpt(layers: int, width: int, heads: int, vocabulary_size: int) -> dict[str, Any]:
    return {
        "kind": "transformer", "layers": layers, "width": width, "heads": heads, "vocabulary_size": vocabulary_size,
        "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True, "tied_embeddings": False,
    }  # fmt: skip


TINY, BASE = _gpt(2, 64, 4, 512), _gpt(6, 384, 6, 8192)
TABLES = (
    Table(
        "tiny", 1, 1, TINY, 32, 8, (BARE, PLAIN, UNWATCHED, FULL), 4, 6, 100, 100, most_over_ms={PLAIN: 0.3, FULL: 1.0}
    ),
    Table("tiny", 2, 1, TINY, 32, 8, (BARE, PLAIN, UNWATCHED, FULL), 4, 6, 100, 100),
    Table("base", 1, 2, BASE, 256, 8, (BARE, FULL), 2, 40, 1, 2, most_ratio={FULL: 1.03}),
    Table("base", 2, 1, BASE, 256, 8, (BARE, FULL), 2, 20, 1, 2, most_ratio={FULL: 1.03}),
)
# Many short blocks: what is looked for is a tenth of what a block's time varies by.
SUPERVISION_TABLES = tuple(
    Table(
        "tiny", processes, 1, TINY, 32, 8, (FULL, SUPERVISED), 4, 150, 10, 100,
        most_ratio={SUPERVISED: 1.01}, against=FULL,
    )
    for processes in (1, 2)
)  # fmt: skip


class Contender:
    """The processes of one contender, as the gate sees them."""

    def __init__(self, table: Table, name: str, dataset: Path, directory: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._over = threading.Event()
        self._board = Board(table.processes) if name == SUPERVISED else None
        self._connections: list[Connection] = []
        self._processes = []
        # Rank 0 gets the socket: nobody else can take the port while the processes import torch.
        with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as meeting:
            for rank in range(table.processes):
                ours, theirs = context.Pipe()
                board = None if self._board is None else self._board.descriptor
                port, listening = int(meeting.getsockname()[1]), meeting if rank == 0 else None
                job = Job(table, name, rank, port, listening, dataset, directory / name, board)
                process = context.Process(target=run_contender, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
        if self._board is not None:
            threading.Thread(target=self._watch, args=(self._board, table.processes), daemon=True).start()

    def wait_until_ready(self) -> None:
        self._receive()

    def run_block(self, steps: int, *, heartbeats: bool = False) -> float:
        """Seconds a step, of the slowest rank."""
        for connection in self._connections:
            connection.send(steps)
            connection.send(heartbeats)
        return max(self._receive()) / steps

    def finish(self) -> tuple[float, float, float]:
        """The probe loss, the milliseconds of a step that watching its health took the slowest rank, and the peak resident
        memory of the largest in MB."""
        for connection in self._connections:
            connection.send(0)
        losses, watching, memory = zip(*self._receive(), strict=True)
        for process in self._processes:
            process.join()
        return losses[0], max(watching), max(memory)

    def kill(self) -> None:
        self._over.set()
        for process in self._processes:
            process.kill()

    def _watch(self, board: Board, processes: int) -> None:
        """What the supervisor does meanwhile. Contenders wait at the gate for as long as it takes: nobody is hung."""
        watch = HangWatch(board, Limits(floor_seconds=1e9, unknown_seconds=1e9, data_is_near=True, compiles=False))
        while not self._over.wait(LOOK_SECONDS):
            watch.look(LOOK_SECONDS, range(processes))
        board.close()

    def _receive(self) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"contender {self.name}, rank {rank}: no answer within {TIMEOUT_SECONDS} s")
            answers.append(connection.recv())
        return answers


class Switched:
    """One of two contenders that are the same processes: with heartbeats, or without."""

    def __init__(self, shared: Contender, name: str) -> None:
        self.name, self._shared = name, shared
        self.kill = shared.kill

    @classmethod
    def pair(cls, shared: Contender) -> list[Switched]:
        pair = [cls(shared, name) for name in (FULL, SUPERVISED)]
        ready, finish = functools.cache(shared.wait_until_ready), functools.cache(shared.finish)
        for one in pair:
            one.wait_until_ready, one.finish = ready, finish
        return pair

    wait_until_ready: Callable[[], None]
    finish: Callable[[], tuple[float, float, float]]

    def run_block(self, steps: int) -> float:
        return self._shared.run_block(steps, heartbeats=self.name == SUPERVISED)


def measure(table: Table, dataset: Path, directory: Path) -> dict[str, Any]:
    """Seconds a step of every contender and round, over all starts, with probe losses and memory."""
    seconds: dict[str, list[float]] = {name: [] for name in table.contenders}
    probes: dict[str, float] = {}
    watching: dict[str, float] = {}
    memory: dict[str, float] = {}
    os.environ["OMP_NUM_THREADS"] = str(table.threads)  # read by the contenders when they import torch
    for start in range(table.starts):
        place = directory / f"{table.size}-{table.processes}-{start}"
        contenders: Sequence[Contender | Switched]
        if table.switched:
            contenders = Switched.pair(Contender(table, SUPERVISED, dataset, place))
        else:
            contenders = [Contender(table, name, dataset, place) for name in table.contenders]
        try:
            for contender in contenders:
                contender.wait_until_ready()
            for contender in contenders:
                contender.run_block(table.warmup_steps)
            for number in range(table.rounds):
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    seconds[contender.name].append(contender.run_block(table.block_steps))
            for contender in contenders:
                probes[contender.name], watching[contender.name], memory[contender.name] = contender.finish()
        finally:
            for contender in contenders:
                contender.kill()
        _check_same_work(table, probes)
    watched = UNWATCHED in seconds
    return {
        "title": table.title,
        "watching_ms": watching[FULL],
        "full_over_unwatched": _spread(np.array(seconds[FULL]) / np.array(seconds[UNWATCHED])) if watched else None,
        "settings": dataclasses.asdict(table),
        "contenders": {name: _summary(table, name, seconds, probes[name], memory[name]) for name in table.contenders},
    }


def _check_same_work(table: Table, probes: dict[str, float]) -> None:
    for name, loss in probes.items():
        other = probes[table.against]
        if not abs(loss - other) <= 1e-5 * other:
            raise AssertionError(f"{table.title}: {name} did other work: probe loss {loss}, {table.against} {other}")


def _summary(
    table: Table, name: str, seconds: dict[str, list[float]], probe_loss: float, memory: float
) -> dict[str, Any]:
    own, bare = np.array(seconds[name]), np.array(seconds[table.against])
    over_ms, ratio = 1e3 * (own - bare), own / bare
    summary: dict[str, Any] = {
        "seconds_per_step": seconds[name],
        "median_ms": 1e3 * statistics.median(seconds[name]),
        "over_ms": _spread(over_ms) | {"best_block": 1e3 * float(own.min() - bare.min())},
        "ratio": _spread(ratio) | {"best_block": float(own.min() / bare.min())},
        "peak_memory_mb": memory,
        "probe_loss": probe_loss,
    }
    for kind, limit in (("over_ms", table.most_over_ms.get(name)), ("ratio", table.most_ratio.get(name))):
        if limit is not None:
            summary["target"] = {"of": kind, "most": limit, "verdict": _verdict(limit, *summary[kind]["interval_95"])}
    return summary


def _verdict(most: float, low: float, high: float) -> str:
    """A median counts only with its interval: on a loaded machine most of them decide nothing."""
    if high <= most:
        return "met"
    return "missed" if low > most else "undecided"


def _spread(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Median over the paired rounds, extremes, and the 95 % percentile-bootstrap interval of the median."""
    samples = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), (0.025, 0.975))
    return {
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "interval_95": [float(low), float(high)],
    }


def as_markdown(machine: dict[str, Any], tables: list[dict[str, Any]], seconds: float) -> str:
    """The results for people. Tables of one call are compared with one contender."""
    against = tables[0]["settings"]["against"]
    shown = {name for table in tables for name in table["contenders"]}
    lines = [
        "# The step: this loop against a bare PyTorch loop"
        if against == BARE
        else "# The step: what supervision costs",
        "",
        f"{measured(machine)} It took {seconds:.0f} s.",
        "",
        *(f"* `{name}`: {meaning}" for name, meaning in MEANING.items() if name in shown),
        "",
        f"Differences and ratios are those of step times within a round, to `{against}`: median [95 % bootstrap interval of the "
        "median] (least to most). *best* compares the fastest blocks. A target is met or missed where the whole interval is "
        "on one side of it. Equal probe losses: the contenders did the same work.",
    ]
    for table in tables:
        settings = table["settings"]
        lines += [
            "",
            f"## {table['title']}",
            "",
            f"{settings['starts']} starts x {settings['rounds']} rounds x {settings['block_steps']} steps",
            "",
            f"| contender | ms a step | ms over {against} | best | ratio to {against} | best | target "
            "| peak RSS MB | probe loss |",
            "|---|---:|---|---:|---|---:|---|---:|---:|",
            *(_row(name, summary) for name, summary in table["contenders"].items()),
        ]
        if (watching := table["full_over_unwatched"]) is not None:
            low, high = watching["interval_95"]
            own = table["watching_ms"]
            share = own / table["contenders"][BARE]["median_ms"]
            lines += [
                "",
                f"`full` over `unwatched`: {watching['median']:.3f} [{low:.3f}, {high:.3f}]. What watches takes {own:.3f} "
                f"ms of the process's own time a step (foreign load does not enter it), {share:.2%} of a step of `bare`.",
            ]
    return "\n".join(lines) + "\n"


def _row(name: str, summary: dict[str, Any]) -> str:
    cells = [f"`{name}`", f"{summary['median_ms']:.2f}"]
    for kind, form in (("over_ms", "{:+.2f}"), ("ratio", "{:.3f}")):
        spread = summary[kind]
        low, high, least, most = (form.format(x) for x in (*spread["interval_95"], spread["min"], spread["max"]))
        cells += [
            f"{form.format(spread['median'])} [{low}, {high}] ({least} to {most})",
            form.format(spread["best_block"]),
        ]
    target = summary.get("target")
    unit = {"over_ms": " ms over", "ratio": " ratio"}
    cells.append(f"at most {target['most']}{unit[target['of']]}: {target['verdict']}" if target else "none")
    cells += [f"{summary['peak_memory_mb']:.0f}", f"{summary['probe_loss']:.6f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures, prints the tables and writes `step.json` and `step.md`, or those of supervision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tiny", "base", "supervision"), help="one model size, or supervision")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="one number of processes")
    parser.add_argument("--rounds", type=int, help="rounds per start")
    parser.add_argument("--quick", action="store_true", help="one start of two short rounds: to try, not to conclude")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    name = "step-supervision" if options.only == "supervision" else "step"
    chosen = SUPERVISION_TABLES if options.only == "supervision" else [
        table for table in TABLES if options.only in (None, table.size)
    ]  # fmt: skip
    tables = [table for table in chosen if options.processes in (None, table.processes)]
    if options.quick:
        tables = [
            dataclasses.replace(t, starts=1, rounds=2, block_steps=min(t.block_steps, 10), warmup_steps=1)
            for t in tables
        ]
    if options.rounds is not None:
        tables = [dataclasses.replace(t, rounds=options.rounds) for t in tables]

    machine, begun = describe_machine(), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        dataset = Path(directory) / "stdlib"
        prepare(DataConfig(**data_section(dataset)))
        results = []
        for table in tables:
            results.append(measure(table, dataset, Path(directory) / "runs"))
            print(f"{table.title}: done after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    text = as_markdown(machine, results, time.perf_counter() - begun)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps({"machine": machine, "tables": results}, indent=1) + "\n")
    (options.output / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
