"""How often a run reads its samples, and the limit that a recipe may set to that."""

from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction

from data.plan import Plan
from data.samples import Dataset


def refuse_too_many_epochs(
    plan: Plan, datasets: Mapping[str, Dataset], limits: Mapping[str, float | None], stop_position: int
) -> None:
    """ValueError where a run up to `stop_position` would read a stream more often than its limit, saying from where on."""
    for stream in plan.segments[-1].streams:
        limit, number = limits[stream.name], plan.number_of(stream)
        if limit is None:
            continue
        most = int(
            Fraction(str(limit)) * datasets[stream.name].samples
        )  # 0.29 as it was written, and not as it is stored
        consumed = plan.consumed(stop_position)[number]
        if consumed > most:
            first = bisect_left(
                range(stop_position + 1), most + 1, key=lambda position: plan.consumed(position)[number]
            )
            key = f"data.streams.{stream.name}.max_epochs" if stream.name else "data.max_epochs"
            raise ValueError(
                f"{key} {limit:g}: the run reads {consumed / datasets[stream.name].samples:.2f} epochs, and passes the "
                f"limit at sample {first:,} of {stop_position:,}; shorten run.steps, raise the limit or add data"
            )
