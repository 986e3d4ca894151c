"""The table of who takes part: short in large runs, and what differs stands alone."""

from __future__ import annotations

import pytest

from launch.exit_codes import RunEnded
from launch.roll_call import Present, refuse_shared_gpus, roll


def gpus(hosts: int, each: int, model: str = "H200") -> list[Present]:
    return [
        Present(f"n{host:03}", f"cuda:{gpu}", model, "srun", gpu=f"GPU-{gpu}")
        for host in range(hosts)
        for gpu in range(each)
    ]


def test_one_process() -> None:
    assert roll([Present("laptop", "cpu", "", "python -m launch.train")], None).splitlines() == [
        "rank  host    device  launcher",
        "0     laptop  cpu     python -m launch.train",
    ]


def test_a_host_has_a_line() -> None:
    assert roll(gpus(2, 8), "n000:15003").splitlines() == [
        "met at n000:15003",
        "rank  host  device                       launcher",
        "0-7   n000  8 x H200 (cuda:0 to cuda:7)  srun",
        "8-15  n001  8 x H200 (cuda:0 to cuda:7)  srun",
    ]
    bound = [Present("n0", "cuda:0", "H200", "srun", gpu=str(gpu)) for gpu in range(4)]
    assert roll(bound, "n0:1").splitlines()[2].split(maxsplit=2) == ["0-3", "n0", "4 x H200 (cuda:0)  srun"]


def test_hosts_that_are_alike_share_a_line_in_a_large_run() -> None:
    everyone = gpus(128, 8)
    assert roll(everyone, "n000:15003").splitlines()[2:] == [
        "0-1023  n000 to n127 (128 hosts)  8 x H200 (cuda:0 to cuda:7)  srun",
    ]
    everyone[100] = Present("n012", "cuda:4", "A100", "torchrun", gpu="GPU-4")
    lines = roll(everyone, "n000:15003").splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["0-95", "n000"], ["96-103", "n012"], ["104-1023", "n013"]]
    assert "4 x H200 (cuda:0 to cuda:3), A100 (cuda:4), 3 x H200" in lines[1]
    assert lines[1].endswith("srun, torchrun")


def test_two_workers_on_one_gpu_are_refused() -> None:
    refuse_shared_gpus(gpus(2, 2))
    refuse_shared_gpus([Present("n0", "cpu", "", "srun")] * 2)
    with pytest.raises(RunEnded, match="ranks 1 and 4 share cuda:1 of n000") as refusal:
        refuse_shared_gpus([*gpus(2, 2), gpus(1, 2)[1]])
    assert refusal.value.told_by_all
    assert refusal.value.exit_code == 2
