"""How long `lockstep train` takes to its first step, beside a bare script that imports, builds and runs the same model.

    python benchmarks/startup.py [--recipe NAME] [--rounds N] [--output DIRECTORY]

Four things are timed, one after the other in turn, on data that is already prepared: `lockstep --help`; a bare script for
one worker and for two of them on gloo, which imports torch, NumPy and Arrow, builds the recipe's model and optimizer, and
trains one batch of the recipe's size; `lockstep train` until the line of its first step is in `metrics.jsonl`; and, in a
run that goes on, the time from a worker's death by SIGKILL to the next attempt's first line, of which the restore is
what that attempt says it took.

Times are from the start of the process (or the kill) as another process sees them; medians of the rounds count.
"""

from __future__ import annotations
