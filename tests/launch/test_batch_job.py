"""What is known of the job that an attempt runs in: from what Slurm 22.05 printed for an array."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.batch_job import batch_job

SHOWN = """\
JobId=8 ArrayJobId=7 ArrayTaskId=1 JobName=job.sh JobState=RUNNING Restarts=1 RunTime=00:00:00 TimeLimit=00:10:00 \
SubmitTime=1795387322 EligibleTime=1795387323 AccrueTime=1795387328 StartTime=1795387324 EndTime=1795387924 SuspendTime=None
JobId=7 ArrayJobId=7 ArrayTaskId=2 JobName=job.sh JobState=RUNNING Restarts=0 RunTime=00:00:00 TimeLimit=00:10:00 \
SubmitTime=1795387316 EligibleTime=Unknown AccrueTime=Unknown StartTime=1795387330 EndTime=1795387930 SuspendTime=None
"""


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `scontrol --oneliner show job ID`, where it is asked for times in seconds."""
    (tmp_path / "shown").write_text(SHOWN)
    command = tmp_path / "scontrol"
    command.write_text(
        f'#!/bin/sh\n[ "$*" = "--oneliner show job $SLURM_JOB_ID" ] && [ "$SLURM_TIME_FORMAT" = %s ] && cat {tmp_path}/shown'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("launch.batch_job._ASK_SECONDS", 200.0)  # a busy machine may take its time


@pytest.mark.usefixtures("controller")
def test_a_job_of_an_array_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_START_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert batch_job() == {"id": "8", "submitted": 1795387322, "eligible": 1795387323, "began": 1795387324}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert batch_job() == {"id": "7", "submitted": 1795387316, "eligible": None, "began": 1795387330}


@pytest.mark.usefixtures("controller")
def test_the_jobs_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1795387325")
    told = batch_job()
    assert told is not None
    assert told["began"] == 1795387325


def test_without_a_controller_to_ask_only_the_variables_are_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1795387325")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert batch_job() == {"id": "8", "submitted": None, "eligible": None, "began": 1795387325}
    monkeypatch.delenv("SLURM_JOB_ID")
    assert batch_job() is None
