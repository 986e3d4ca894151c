"""What the report page says of where a run's time went. Imports no torch."""

from __future__ import annotations

from typing import Any

from launch.goodput import MEANING, ROWS, Account, format_share, table_of


def describe_time(account: Account | None) -> dict[str, Any] | None:
    """The kinds of time that a bar of the whole run is made of, and a table of its attempts; None where nothing is known."""
    if account is None or account.total <= 0:
        return None
    shown = [row for row, seconds in account.seconds.items() if seconds > 0]
    return {
        "kinds": [(row, ROWS[row], MEANING[row], account.seconds[row] / account.total) for row in shown],
        "attempts": table_of(account, shown),
        "shares": [format_share(account.seconds[row], account.total) for row in shown],
        "notes": account.notes,
        "lost_steps": sum(attempt.lost_steps for attempt in account.attempts),
    }
