"""Batch scripts: the templates of `slurm/`, filled in as a person would fill them in. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
TEMPLATES = CHECKOUT / "slurm"
PACKAGES = ("launch", "distrib", "models", "data", "slurm")
"""The folders that are Lockstep."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")

Setting = str | Sequence[str]


def fill_in(
    template: str,
    directives: Mapping[str, str | None],
    settings: Mapping[str, Setting],
    more_directives: Sequence[str] = (),
) -> str:
    """The template with other values in its `#SBATCH --name=...` lines (None: the line does not count) and in its lines
    `name=...`, which are a word or a list of words; `more_directives` follow the template's own, as they are.

    Everything that is filled in must have its line in the template. Raises ValueError for what no line can hold.
    """
    _refuse_control_characters({**directives, **settings, "--sbatch": more_directives})
    lines = template.splitlines()
    for name, value in directives.items():
        place = _only(lines, rf"#+SBATCH --{re.escape(name)}(=.*)?")
        known = lines[place].lstrip("#")
        lines[place] = f"##{known}" if value is None else f"#SBATCH --{name}={shlex.quote(value)}"
    for name, setting in settings.items():
        place = _only(lines, rf"{re.escape(name)}=.*")
        words = (
            shlex.quote(setting) if isinstance(setting, str) else f"({' '.join(shlex.quote(word) for word in setting)})"
        )
        lines[place] = f"{name}={words}"
    last = max(place for place, line in enumerate(lines) if line.startswith(("#SBATCH", "##SBATCH")))
    lines[last + 1 : last + 1] = [f"#SBATCH {directive}" for directive in more_directives]
    return "\n".join(lines) + "\n"


def _refuse_control_characters(values: Mapping[str, str | Sequence[str] | None]) -> None:
    for name, value in values.items():
        for word in [value] if isinstance(value, str) else value or ():
            if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
                raise ValueError(f"{name}: {word!r} holds a control character, such as the end of a line; remove it")


def setting_of(template: str, name: str) -> str:
    """What a template's line `name=...` says, as it is written there."""
    lines = template.splitlines()
    return lines[_only(lines, rf"{re.escape(name)}=.*")].partition("=")[2]


def parse_time(text: str) -> int:
    """Seconds of a time limit as Slurm reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes or days-hours:minutes:seconds. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--time {text}: must be minutes, hours:minutes:seconds or days-hours, such as 12:00:00 or 2-0"
        )
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    if match["days"] is not None or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        total = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        minutes, seconds = [*parts, 0][:2]
        total = minutes * 60 + seconds
    if total < 60:
        raise ValueError(f"--time {text}: is {total} seconds; Slurm counts time limits in minutes, at least one")
    return total


def format_duration(seconds: float) -> str:
    """`2 d 3 h`, `12 h`, `1 h 5 min`, `12 min 30 s`: the two largest units."""
    rest = max(0, round(seconds))
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts) or "0 s"


def _only(lines: Sequence[str], pattern: str) -> int:
    """The place of the one line that matches wholly."""
    places = [place for place, line in enumerate(lines) if re.fullmatch(pattern, line)]
    assert len(places) == 1, f"{len(places)} lines match {pattern}"
    return places[0]
