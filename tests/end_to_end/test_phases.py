"""The phases of a real run, as an observer in each worker hears of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distrib import phases
from tests.end_to_end.runs import LOCKSTEP, command, environment

# Python runs a module of this name in every process at its start: an observer without a hook of our own.
SITE = """
import atexit, json, os, sys

def hear(moments=[]):
    from distrib.phases import observe
    observe(moments.append)
    path = os.path.join(os.environ["HEARD"], "rank-" + os.environ["RANK"] + ".json")
    atexit.register(lambda: json.dump([list(moment) for moment in moments], open(path, "w")))

if "RANK" in os.environ:
    hear()
"""
STEP = ["data", "forward", "backward", "forward", "backward", "forward", "backward", "reduce", "step"]


@pytest.mark.parametrize("beside", [True, False], ids=["saves_beside", "saves_itself"])
def test_a_run_says_what_it_does(recipe: Path, tmp_path: Path, beside: bool) -> None:
    site, heard = tmp_path / "site", tmp_path / "heard"
    site.mkdir()
    heard.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = command(
        LOCKSTEP, "train", recipe, "--workers", 2, "run.steps=3", "checkpoint.every_steps=2", "run.directory=run",
        f"checkpoint.asynchronous={str(beside).lower()}",
        cwd=tmp_path, env=environment(PYTHONPATH=path, HEARD=str(heard)),
    )  # fmt: skip
    told.succeeded()
    for rank in range(2):
        moments = [phases.Moment(*moment) for moment in json.loads((heard / f"rank-{rank}.json").read_text())]
        saves = ["save.write", "save.manifest", "save.rename"] if rank == 0 else ["save.write"]
        wanted = [
            ("load", 0), ("start", 0), ("start", 0), ("evaluate", 0),
            *((phase, 0) for phase in STEP),
            *((phase, 1) for phase in STEP), ("report", 1), ("report", 1), ("save", 2),
            *(() if beside else ((phase, 2) for phase in [*saves, "save"])),
            *((phase, 2) for phase in STEP),
            ("data", 3), ("report", 3), ("save", 3),
            *(() if beside else ((phase, 3) for phase in [*saves, "save"])),
            ("evaluate", 3), ("save", 3), ("end", 3),
        ]  # fmt: skip
        assert [(moment.phase, moment.step) for moment in moments if not moment.saving] == wanted
        saving = [(moment.phase, moment.step) for moment in moments if moment.saving]
        assert saving == [(phase, step) for step in (2, 3) for phase in [*saves, "idle"]] * beside


def test_what_is_held_is_not_left_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[phases.Moment] = []
    monkeypatch.setattr(phases, "_observers", [heard.append])
    monkeypatch.setattr(phases, "_now", {False: phases.Moment("start", 7, False)})
    with phases.hold("start"):
        phases.enter("forward", 8)
    phases.enter("data")
    assert heard == [("start", 7, False), ("data", 7, False)]
    assert phases.now() == heard[-1]
