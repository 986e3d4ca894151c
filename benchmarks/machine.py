"""What a benchmark's numbers were measured on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def device() -> str:
    """The processor's name and the number of cores this process may use."""
    return f"{_cpu()}, {_cores()} cores"


def describe_machine() -> dict[str, Any]:
    """The machine, what runs on it, and the command that measures."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
        "device": "cpu",
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "numpy")},
    }


def measured(machine: dict[str, Any]) -> str:
    """A sentence about what `describe_machine` has told."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured {machine['date']} by `{machine['command']}` on {machine['device']}: {machine['cpu']}, {machine['cores']} "
        f"cores, {machine['memory_gib']} GiB, {machine['system']}; {versions}; load average before it "
        f"{machine['load_average_before']}."
    )


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
