"""Ports for servers that are told theirs and open it only some seconds later."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that Linux gives out by itself and those at which steps of Slurm meet: nobody comes to have one by chance meanwhile.
_RANGE = range(10_000, 15_000)


def free_ports(count: int) -> list[int]:
    """So many different ports that nobody has."""
    found: list[int] = []
    # Not the generator that tests seed: two that run at once would choose alike.
    for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
        if len(found) == count:
            return found
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
    raise AssertionError("no free ports")
