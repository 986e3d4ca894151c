"""Where the workers of a run meet: the store through which their process groups find each other."""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from distrib.launchers import Launch
from distrib.ports import holder_of_port

# How long a worker waits before it looks whether there is a newer round than the one it has read.
_LOOK_AGAIN = timedelta(seconds=0.25)


def meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store of this start of the run: rank 0's, or one that the launcher keeps (torchrun and `accelerate launch`).

    Raises ConnectionError, in one line, where the port is taken, the address is unknown, or the others do not come.
    """
    assert launch.address is not None
    _refuse_unknown_address(launch)
    begun = time.monotonic()
    try:
        store = _open_store(launch, timeout)
        store.set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
            store = dist.PrefixStore(_agree_on_round(store, launch, begun + timeout.total_seconds()), store)
    except dist.DistError as error:
        raise ConnectionError(f"{explain(launch, error)}") from None
    return store


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    assert launch.address is not None
    assert launch.port is not None
    if launch.listening is not None:
        return dist.TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=launch.listening,
        )
    host = f"[{launch.address}]" if ":" in launch.address else launch.address
    store, _, _ = next(dist.rendezvous(f"tcp://{host}:{launch.port}", launch.rank, launch.size, timeout=timeout))
    return store


def explain(launch: Launch, error: Exception) -> str:
    """Why the workers could not meet, in one line."""
    reason = str(error).splitlines()[0]
    if launch.rank == 0 and "EADDRINUSE" in reason:
        holder = holder_of_port(launch.port or 0) or "nobody any more"
        return (
            f"port {launch.port}, at which the workers were to meet on {launch.address}, is in use by {holder}; "
            "end that process, or choose another MASTER_PORT"
        )
    return f"rank {launch.rank} of {launch.size} could not meet the others at {launch.meeting_point}: {reason}"


def _agree_on_round(store: dist.Store, launch: Launch, deadline: float) -> str:
    """A name for this start of the workers, the same on all of them and new at every start.

    A launcher that restarts workers in place may keep its store, and with it the addresses of processes that are gone: a
    worker that read one of these would wait for a dead peer. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun gives
    every start a store of its own; with --master-port, and under `accelerate launch`, it keeps one all the same.
    So rank 0 names the round. What another rank reads may be an older name: it takes one only once rank 0 has
    answered a word that this process made up.
    """
    mine = uuid.uuid4().hex
    if launch.rank == 0:
        store.set("lockstep/round", mine)
        for rank in range(1, launch.size):
            word = store.get(f"lockstep/{mine}/here/{rank}").decode()
            store.set(f"lockstep/{mine}/welcome/{word}", "")
        return f"lockstep/{mine}"
    while True:
        name = store.get("lockstep/round").decode()
        store.set(f"lockstep/{name}/here/{launch.rank}", mine)
        try:
            store.wait([f"lockstep/{name}/welcome/{mine}"], _LOOK_AGAIN)
            return f"lockstep/{name}"
        except dist.DistStoreError:
            if time.monotonic() > deadline:
                raise


def _refuse_unknown_address(launch: Launch) -> None:
    """An address that is not known here would otherwise be asked for again until the timeout."""
    try:
        socket.getaddrinfo(launch.address, launch.port)
    except socket.gaierror as error:
        raise ConnectionError(
            f"rank {launch.rank} of {launch.size} does not know {launch.address}, where the workers were to meet: "
            f"{error.strerror}; set MASTER_ADDR to an address of rank 0's host"
        ) from None
