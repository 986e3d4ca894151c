"""What can go wrong, where, and how a run must end all the same: a case for every seed, the same one every time."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["identical", "skipped", "78, then identical"]
"""identical: after restarts the weights, the optimizer and every line of every step are those of the undisturbed run, and
the audit proves the samples. skipped: the step is, is told, and nothing else is. 78: so the run ends, all that it has
published verifies; and once what was broken is mended, the same command ends as identical."""

STEPS = 12
SAVE_EVERY_STEPS = 3
WORLD_SIZE = 2
# Smaller than any file of tensors, larger than what else is written: a save fails in the middle of writing.
LARGEST_LOG_BYTES = 16 << 10
_FIRST_STEP_WITH_TWO_SAVED = 3 * SAVE_EVERY_STEPS

Action = tuple[str, dict[str, Any]]
"""A function of injector.py and its arguments."""
_KILL: Action = ("send", {"number": int(signal.SIGKILL)})


@dataclass(frozen=True)
class Happening:
    """What a worker does to itself, its launcher or its files when it enters a phase."""

    phase: str
    step: int | None
    """So many steps are committed; of a save: the one that is saved. None: any."""
    rank: int | None
    """None: every rank does it."""
    actions: list[Action]
    delay_seconds: float = 0.0
    """From the begin of the phase."""


@dataclass(frozen=True)
class Case:
    """A run's happenings, each after the one before it."""

    fault: str
    happenings: tuple[Happening, ...]
    outcome: Outcome
    small_disk: Literal["run", "checkpoints"] | None = None
    """What lies on a small disk of its own, which can be filled: the whole run directory, or the checkpoints in it."""
    remote: bool = False
    """The dataset is served over HTTP and cached."""
    hung_tracker: bool = False
    """Weights & Biases accepts connections and never answers."""
    main: int = 0
    """Which of the happenings the case is about."""


# Where each phase is entered in an undisturbed run: the numbers of committed steps, and the ranks.
TRAINING = ("data", "forward", "backward", "reduce", "step")
SAVING = ("save.write", "save.manifest", "save.rename")
PHASES = (*TRAINING, *SAVING, "load", "report", "save", "evaluate", "start", "end")
ENDING_BY_SIGNAL: dict[str, Action] = {
    "SIGKILL of a rank": _KILL,
    "SIGTERM to a rank": ("send", {"number": int(signal.SIGTERM)}),
    "USR1 to a rank": ("send", {"number": int(signal.SIGUSR1)}),
    "SIGKILL of the launcher": ("kill_launcher", {}),
    "SIGKILL of launcher and ranks": ("kill_all", {}),
    "SIGSTOP of a rank, then SIGCONT": ("send", {"number": int(signal.SIGSTOP)}),
}
ASKING_TO_STOP = ("SIGTERM to a rank", "USR1 to a rank")
WITH_TIMES = ("SIGKILL of a rank", "SIGKILL of the launcher", "SIGKILL of launcher and ranks")
"""Those that may also come in the middle of a phase."""
FAULTS = (
    *ENDING_BY_SIGNAL,
    "no room for a checkpoint, for a while",
    "files limited in size, for a while",
    "no room for a checkpoint",
    "no room at all",
    "flipped bit in the newest checkpoint",
    "flipped bit in a local shard",
    "flipped bit in the cache of a remote dataset",
    "deleted shard",
    "read-only disk",
    "clock that jumps",
    "NaN",
    "hung tracker",
    "SIGSTOP of a rank",
)
# It waits for a limit of half a minute each time.
NOT_DRAWN = ("hung tracker",)


def run_place(directory: Path) -> Path:
    return directory / "run"


def checkpoints_place(directory: Path) -> Path:
    return run_place(directory) / "checkpoints"


def dataset_place(directory: Path) -> Path:
    return directory / "dataset"


def cache_place(directory: Path) -> Path:
    return directory / "cache"


def case_of_seed(seed: int, directory: Path) -> Case:
    """The fault, phase, step and rank that a seed stands for, in a directory that is not there yet."""
    choose = random.Random(f"chaos {seed}")
    drawn = [name for name in FAULTS if name not in NOT_DRAWN]
    fault = drawn[seed % len(drawn)]
    return make_case(fault, choose, directory)


def make_case(fault: str, choose: random.Random, directory: Path, phase: str | None = None) -> Case:
    """A case of a fault, in the given phase where there is one; what is left open is drawn."""
    if fault in ENDING_BY_SIGNAL:
        return _signalled(fault, choose, phase)
    match fault:
        case "no room for a checkpoint, for a while":
            disk, step = checkpoints_place(directory), _save_step(choose)
            filled = Happening(phase or choose.choice(SAVING), step, 0, [_fill(disk)])
            freed = Happening("save.write", step + SAVE_EVERY_STEPS, 0, [("make_room", {"folder": str(disk)})])
            return Case(fault, (filled, freed), "identical", small_disk="checkpoints")
        case "files limited in size, for a while":
            step, rank = _save_step(choose), choose.randrange(WORLD_SIZE)
            limited = Happening("save.write", step, rank, [("limit_files", {"largest_bytes": LARGEST_LOG_BYTES})])
            freed = Happening("save.write", step + SAVE_EVERY_STEPS, rank, [("limit_files", {"largest_bytes": None})])
            return Case(fault, (limited, freed), "identical")
        case "no room for a checkpoint" | "no room at all":
            small: Literal["run", "checkpoints"] = "checkpoints" if fault == "no room for a checkpoint" else "run"
            # Before the last save, which rank 0 begins.
            where = _place(choose, phase or choose.choice([*TRAINING, "save.write"]))
            where = (*where[:2], 0) if where[0] == "save.write" else where
            disk = {"run": run_place(directory), "checkpoints": checkpoints_place(directory)}[small]
            actions = [*_saves_over(where, directory), _fill(disk)]
            return Case(fault, (_at(where, actions),), "78, then identical", small_disk=small)
        case "flipped bit in the newest checkpoint":
            flip = _flip(choose, checkpoints_place(directory) / "step-*[0-9]" / "*", of="one of the newest")
            where = _place(choose, phase, first_step=_FIRST_STEP_WITH_TWO_SAVED)
            return Case(fault, (_at(where, [*_saves_over(where, directory), flip, _KILL]),), "identical")
        case "flipped bit in a local shard":
            # Before the last save: there is something left to read.
            where = _place(choose, phase, last_step=STEPS - SAVE_EVERY_STEPS)
            actions = [_flip(choose, dataset_place(directory) / "train-*.bin"), _KILL]
            return Case(fault, (_at(where, actions),), "78, then identical")
        case "flipped bit in the cache of a remote dataset":
            # After the first step, which had to wait for what it reads; and of each file: which of them are here by now, and
            # will be read again, is a matter of how fast they came.
            where = _place(choose, phase, first_step=1, last_step=STEPS - SAVE_EVERY_STEPS)
            actions = [_flip(choose, cache_place(directory) / "files" / "*", of="each"), _KILL]
            return Case(fault, (_at(where, actions),), "identical", remote=True)
        case "deleted shard":
            where = _place(choose, phase, last_step=STEPS - SAVE_EVERY_STEPS)
            delete = ("delete", {"pattern": str(dataset_place(directory) / "train-*.bin")})
            return Case(fault, (_at(where, [delete, _KILL]),), "78, then identical")
        case "read-only disk":
            # Before the first save: it can be made so only while nobody has a file of it open for writing.
            where = _place(choose, phase or choose.choice(TRAINING), last_step=SAVE_EVERY_STEPS - 1)
            disk = checkpoints_place(directory)
            alone = _at(where, [("make_read_only", {"folder": str(disk)})])
            return Case(fault, (alone,), "78, then identical", small_disk="checkpoints")
        case "clock that jumps":
            where = _place(choose, phase, first_step=_FIRST_STEP_WITH_TWO_SAVED)
            turn = ("turn_back_clock", {"folder": str(checkpoints_place(directory))})
            # Some steps are done by the new clock before the run has to look for its newest checkpoint.
            turned = Happening("data", SAVE_EVERY_STEPS, None, [("turn_back_clock", {"folder": None})])
            return Case(fault, (turned, _at(where, [*_saves_over(where, directory), turn, _KILL])), "identical", main=1)
        case "NaN":
            phase = phase or choose.choice(("forward", "backward", "reduce"))
            # After the sum over the ranks it is the same on all of them; before, one is enough.
            rank = None if phase == "reduce" else choose.randrange(WORLD_SIZE)
            return Case(fault, (Happening(phase, choose.randrange(STEPS), rank, [("poison", {})]),), "skipped")
        case "SIGSTOP of a rank":
            stop: Action = ("send", {"number": int(signal.SIGSTOP)})
            # After what a limit can be learned from: a first save may take as long as anything that is done for the first time.
            where = _place(choose, phase, first_step=SAVE_EVERY_STEPS + 1)
            return Case(fault, (_at(where, [stop]),), "identical")
        case "hung tracker":
            return Case(fault, (_at(_place(choose, phase), [_KILL]),), "identical", hung_tracker=True)
    raise ValueError(f"no fault {fault!r}; there are {', '.join(FAULTS)}")


def _signalled(fault: str, choose: random.Random, phase: str | None) -> Case:
    phase = phase or choose.choice(PHASES)
    action = ENDING_BY_SIGNAL[fault]
    delay = choose.choice([0.0, choose.uniform(0.0, 0.02)]) if fault in WITH_TIMES else 0.0
    if phase in ("load", "start"):
        # There must be something to load: the run is killed once before.
        before = _at(_place(choose, choose.choice(TRAINING), first_step=SAVE_EVERY_STEPS + 1), [_KILL])
        main = Happening(phase, None, choose.randrange(WORLD_SIZE), [action], delay)
        return Case(fault, (before, main), "identical", main=1)
    return Case(fault, (_at(_place(choose, phase), [action], delay),), "identical")


def comes_too_late(request: Happening) -> bool:
    """Whether a request to stop may come to nothing: the step that runs when it comes tells the others of it, this is read
    while the next one runs, and after the last step there is nothing to stop. Beside a save training goes on to the next."""
    if request.step is None:
        return False
    return request.step >= STEPS - (SAVE_EVERY_STEPS if request.phase in SAVING else 2)


def _place(
    choose: random.Random, phase: str | None, first_step: int = 0, last_step: int = STEPS
) -> tuple[str, int, int]:
    """A phase, how many steps are committed when it is entered, and a rank that enters it."""
    phase = phase or choose.choice([*TRAINING, *SAVING])
    rank = choose.randrange(WORLD_SIZE)
    if phase in TRAINING:
        return phase, choose.randrange(first_step, min(STEPS, last_step)), rank
    if phase == "report":
        # One step late, and both of the last two before a save: none while the step after a save is run.
        steps = [step for step in range(first_step, last_step) if step % SAVE_EVERY_STEPS]
        return phase, choose.choice(steps), rank
    if phase in (*SAVING, "save"):
        saved = [step for step in range(SAVE_EVERY_STEPS, last_step + 1, SAVE_EVERY_STEPS) if step >= first_step]
        return phase, choose.choice(saved), 0 if phase in ("save.manifest", "save.rename") else rank
    assert phase in ("evaluate", "end"), phase
    return phase, choose.choice([0, STEPS] if phase == "evaluate" and not first_step else [STEPS]), rank


def _at(place: tuple[str, int, int], actions: list[Action], delay_seconds: float = 0.0) -> Happening:
    return Happening(*place, actions, delay_seconds)


def _saves_over(where: tuple[str, int, int], directory: Path) -> list[Action]:
    """Waits until the saves before a phase of a step are over: what one that goes on beside it publishes and deletes would
    come before a fault or after it."""
    phase, step, _ = where
    if phase not in TRAINING:
        return []
    saved = range(SAVE_EVERY_STEPS, step + 1, SAVE_EVERY_STEPS)[-2:]
    names = [f"step-{saved_step:08d}" for saved_step in saved]
    return [("await_saves", {"folder": str(checkpoints_place(directory)), "names": names})]


def _save_step(choose: random.Random) -> int:
    """A save after which there is another one, which makes good what this one could not: it begins once this one is over."""
    return choose.randrange(SAVE_EVERY_STEPS, STEPS, SAVE_EVERY_STEPS)


def _fill(disk: Path) -> Action:
    return "fill_disk", {"folder": str(disk)}


def _flip(choose: random.Random, pattern: Path, of: str = "one") -> Action:
    return "flip_bit", {"pattern": str(pattern), "seed": choose.randrange(1 << 30), "of": of}
