"""What a report says of the health of a run: what its own lines tell, and nothing where all was well."""

from __future__ import annotations

from typing import Any

# The others are in `metrics.jsonl`.
_STEPS_SHOWN = 6


def health_facts(steps: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Label, value and a remark of each kind of trouble in the records of a run's steps."""
    kinds = (
        ("Skipped steps", "gradient not finite; ", [record["step"] for record in steps if record.get("skipped")]),
        ("Loss spikes", "", [record["step"] for record in steps if "loss_spike" in record]),
    )
    facts = [(label, str(len(found)), remark + _name(found)) for label, remark, found in kinds if found]
    for label, column in (("Slow ranks", "stragglers"), ("Ranks that differ", "differing_ranks")):
        found = [record for record in steps if column in record]
        if found:
            ranks = sorted({rank for record in found for rank in record[column]})
            facts.append((label, " ".join(map(str, ranks)), _name([record["step"] for record in found])))
    return facts


def _name(steps: list[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:_STEPS_SHOWN])
    more = f" and {len(steps) - _STEPS_SHOWN} more" if len(steps) > _STEPS_SHOWN else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"
