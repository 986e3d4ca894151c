"""Reading the variables of an environment, with errors that name them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def whole_number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    """A variable's value, at least 0; `default` where it is not set. Raises ValueError."""
    if name not in environment and default is not None:
        return default
    text = environment[name]
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name}={text!r} is not a whole number from 0 up")
    return int(text)


def refuse_half_set(environment: Mapping[str, str], names: Sequence[str], way_out: str) -> None:
    """Raises ValueError where some of `names`, which belong together, are set and others are not."""
    present = [name for name in names if name in environment]
    missing = [name for name in names if name not in environment]
    if present and missing:
        raise ValueError(
            f"launcher variables are half set: {', '.join(present)} without {', '.join(missing)}; {way_out}"
        )
