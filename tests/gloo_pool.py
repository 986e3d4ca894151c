"""A pool of worker processes that join a fresh gloo world for every call.

`pool.run(function, world_size, *arguments)` calls `function(world, *arguments)` on every rank and returns the results in
rank order. The function must be importable by name; arguments and results travel by pickle between our own processes.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_TIMEOUT_SECONDS = 120.0


class GlooPool:
    """Processes are started when first needed and reused; one that died is replaced."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection] | None] = [None] * size

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as directory:
            store = os.path.join(directory, "store")
            connections = [self._worker(rank) for rank in range(world_size)]
            for rank, connection in enumerate(connections):
                connection.send((function, rank, world_size, store, arguments))
            answers = [self._receive(rank, connection) for rank, connection in enumerate(connections)]
        failures = [f"rank {rank}:\n{value}" for rank, (failed, value) in enumerate(answers) if failed]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker[1].close()
                worker[0].join(10)
                worker[0].kill()

    def _worker(self, rank: int) -> Connection:
        worker = self._workers[rank]
        if worker is None or not worker[0].is_alive():
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            worker = self._workers[rank] = (process, ours)
        return worker[1]

    def _receive(self, rank: int, connection: Connection) -> tuple[bool, Any]:
        if not connection.poll(_TIMEOUT_SECONDS):
            self._replace(rank)
            return True, f"no answer within {_TIMEOUT_SECONDS} s"
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(rank)
            return True, "the process ended"

    def _replace(self, rank: int) -> None:
        worker = self._workers[rank]
        assert worker is not None
        worker[0].kill()
        self._workers[rank] = None


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world_size, store, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, _call_in_world(function, rank, world_size, store, arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))


def _call_in_world(
    function: Callable[..., Any], rank: int, world_size: int, store: str, arguments: tuple[Any, ...]
) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from distrib.world import leave_world, single_process_world, world_of_group

    if world_size == 1:
        try:
            return function(single_process_world("cpu"), *arguments)
        finally:
            leave_world(single_process_world("cpu"))
    timeout = timedelta(seconds=_TIMEOUT_SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        world = world_of_group(rank, torch.device("cpu"), timeout)
        result = function(world, *arguments)
        leave_world(world)
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
