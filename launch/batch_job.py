"""The batch job that an attempt runs in: when it was submitted, might have begun, and began. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

_ASK_SECONDS = 10.0


def batch_job() -> dict[str, str | float | None] | None:
    """SLURM's job of this process: `id`, and `submitted`, `eligible` and `began` in seconds since 1970, each None where SLURM
    does not tell it. None outside a job.

    A job that is requeued is submitted anew: its times are those of its last start.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    lines = _show(job).splitlines()
    # An array is shown whole where the job has the array's number.
    text = next((line for line in lines if line.startswith(f"JobId={job} ")), "")
    began = os.environ.get("SLURM_JOB_START_TIME")
    return {
        "id": job,
        "submitted": _time(text, "SubmitTime"),
        "eligible": _time(text, "EligibleTime"),
        "began": _time(text, "StartTime") if began is None else float(began),
    }


def _show(job: str) -> str:
    """What the controller says of a job, with times in seconds; nothing where there is no controller to ask."""
    if shutil.which("scontrol") is None:
        return ""
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job],
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return ""
    return shown.stdout


def _time(text: str, name: str) -> float | None:
    found = re.search(rf"\b{name}=(\d+)\b", text)
    return None if found is None else float(found[1])
