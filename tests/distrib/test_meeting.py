"""Workers that a launcher restarts in place meet each time, though the launcher's store still has what the dead ones said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("restarted_worker.py")
# Only ever reached where something hangs.
TIMEOUT_SECONDS = 400


@pytest.mark.long
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
@pytest.mark.parametrize(("rendezvous", "starts"), [("c10d", 20), ("static", 5)])
def test_many_starts_in_place(rendezvous: str, starts: int, tmp_path: Path) -> None:
    """With one store for all starts, as torchrun has it by default (c10d), or whatever is set (static, and Accelerate)."""
    where = (
        ["--standalone"] if rendezvous == "c10d" else ["--master-addr", "127.0.0.1", "--master-port", *free_ports(1)]
    )
    line = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", 2, "--max-restarts", starts - 1]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    with subprocess.Popen(
        [str(word) for word in [*line, SCRIPT, tmp_path, starts]],
        env={
            **environment,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as torchrun:
        try:
            _, err = torchrun.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            torchrun.terminate()  # its workers, in sessions of their own, go with it
    assert torchrun.returncode == 0, err
    assert "Traceback" not in err, err
    met = [f"[{start}, {start}]" for start in range(starts) if start % 3 != 2 or start == starts - 1]
    assert [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1)] == [met, met]
