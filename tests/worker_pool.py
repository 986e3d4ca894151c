"""A pool of worker processes that join a fresh world for every call.

`pool.run(function, world_size, *arguments)` calls `function(world, *arguments)` on every rank and returns the results in
rank order. The function must be importable by name; arguments and results travel by pickle between our own processes.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Only ever reached where something hangs.
_TIMEOUT_SECONDS = 240.0


class WorkerPool:
    """Processes are started when first needed and reused; one that died is replaced, and its companions with it.

    Every world size has processes of its own: DeepSpeed numbers modules through the life of a process and compares the
    numbers between ranks, so the same processes must always work together. `device_kind`: cpu (gloo) or cuda (NCCL, a
    GPU per rank).
    """

    def __init__(self, device_kind: str = "cpu") -> None:
        self._context = multiprocessing.get_context("spawn")
        self._device_kind = device_kind
        self._workers: dict[int, list[tuple[Any, Connection]]] = {}
        # Gone only after the workers: what is left of an earlier world may reach for its file while they do something else.
        self._stores = tempfile.TemporaryDirectory()
        self._calls = itertools.count()

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        store = os.path.join(self._stores.name, f"store-{next(self._calls)}")
        connections = self._connect(world_size)
        for rank, connection in enumerate(connections):
            connection.send((function, rank, world_size, self._device_kind, store, arguments))
        answers = [self._receive(world_size, connection) for connection in connections]
        failures = [f"rank {rank}:\n{value}" for rank, (failed, value) in enumerate(answers) if failed]
        if failures:
            # A rank that failed alone has run less than the others, and some may still wait for it.
            self._end(world_size)
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        for world_size in list(self._workers):
            self._end(world_size)
        self._stores.cleanup()

    def _connect(self, world_size: int) -> list[Connection]:
        workers = self._workers.get(world_size, [])
        if not workers or not all(process.is_alive() for process, _ in workers):
            self._end(world_size)
            workers = self._workers[world_size] = [self._start() for _ in range(world_size)]
        return [connection for _, connection in workers]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _end(self, world_size: int) -> None:
        for process, connection in self._workers.pop(world_size, []):
            connection.close()
            process.kill()
            process.join()

    @staticmethod
    def _receive(world_size: int, connection: Connection) -> tuple[bool, Any]:
        if not connection.poll(_TIMEOUT_SECONDS):
            return True, f"no answer within {_TIMEOUT_SECONDS} s"
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            return True, "the process ended"


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world_size, device_kind, store, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, _call_in_world(function, rank, world_size, device_kind, store, arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
        # Engines are full of cycles, and Python looks for these the more seldom the more is imported. Until it finds them
        # their process groups live on, with threads that poll: a hundred worlds of them leave no time to work. What has
        # survived a call is libraries': frozen, it need not be searched again.
        gc.collect()
        gc.freeze()


def _call_in_world(
    function: Callable[..., Any], rank: int, world_size: int, device_kind: str, store: str, arguments: tuple[Any, ...]
) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from distrib.world import leave_world, single_process_world, world_of_group

    if world_size == 1:
        alone = single_process_world(device_kind)
        try:
            return function(alone, *arguments)
        finally:
            leave_world(alone)
    device = torch.device("cpu")
    if device_kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=_TIMEOUT_SECONDS / 2)
    backend = "gloo" if device_kind == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        world = world_of_group(rank, device, timeout)
        result = function(world, *arguments)
        leave_world(world)
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
