"""A worker that meets the others, tells it in a file, and is killed: `restarted_worker.py DIRECTORY STARTS`, under torchrun.

In its last start it leaves in good order. Which worker is killed, and whether before or after it has met the others, changes from
start to start.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from distrib.config import ParallelConfig
from distrib.launchers import read_launch
from distrib.world import join_world, leave_world


def main() -> None:
    directory, starts = Path(sys.argv[1]), int(sys.argv[2])
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    launch = read_launch()
    victim, early = start % launch.size, start % 3 == 2
    last = start == starts - 1
    if launch.rank == victim and early and not last:
        os.kill(os.getpid(), signal.SIGKILL)
    world = join_world(launch, "cpu", ParallelConfig(timeout_seconds=60))
    assert world.gather_objects(os.getppid()) == [os.getppid()] * launch.size
    starts_of_all = world.gather_objects(start)
    with (directory / f"rank-{launch.rank}").open("a") as told:
        told.write(f"{starts_of_all}\n")
    world.gather_objects("told")  # the launcher ends the others once one of them is killed
    if last:
        leave_world(world)
    elif launch.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        signal.pause()


main()
