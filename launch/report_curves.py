"""The report's curves: inline SVG by matplotlib, small whatever the run's length, coloured by the page's style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

# More than these a screen cannot show: a longer curve is drawn as the mean of each bucket within its extremes.
BUCKETS = 400
# Above this ratio of the largest to the smallest value a linear axis shows only the largest ones.
_LOG_RATIO = 50.0
# matplotlib wants colours that it knows. These stand for the style sheet's, which differ in light and in dark.
_INK, _GRID, _CARD, _SERIES = "#010203", "#010204", "#010205", "#0102"
SERIES_COLOURS = 8


@dataclass(frozen=True)
class Curve:
    """values: (steps,), NaN where there is none. points: single measurements, marked as such. colour: the run's number."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    colour: int
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """restarts: per run's colour, the steps from which an attempt went on. first_step, last_step: the axis's ends."""

    title: str
    curves: list[Curve]
    restarts: dict[int, list[int]]
    first_step: int
    last_step: int
    from_zero: bool = False
    log_allowed: bool = False
    format_value: Callable[[float], str] = lambda value: f"{value:.3g}"


def decimate(
    steps: NDArray[np.int64], values: NDArray[np.float64], buckets: int = BUCKETS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Step, mean, smallest and largest value of each bucket of equally many finite measurements.

    A curve of at most `buckets` measurements comes back as it is. Shapes: (steps,) in, (at most buckets,) out.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= buckets:
        return steps.astype(np.float64), values, values, values
    starts = np.linspace(0, len(values), buckets, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, len(values)))
    return (
        np.add.reduceat(steps.astype(np.float64), starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def draw(chart: Chart) -> str | None:
    """The chart as an `<svg>` element without text but its axes' numbers; None where no curve has a finite value.

    The same chart gives the same bytes.
    """
    if not any(np.isfinite(curve.values).any() for curve in chart.curves):
        return None
    settings = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 10.0, "path.simplify": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve in chart.curves:
            _draw_curve(axes, curve)
        for colour, steps in chart.restarts.items():
            for step in steps:
                axes.axvline(step, color=_series(colour), linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.7)
        _dress(axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(file.getvalue(), chart.title)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    steps, mean, low, high = decimate(curve.steps, curve.values)
    colour = _series(curve.colour)
    if curve.points:
        (line,) = axes.plot(steps, mean, color=colour, linewidth=0.9, linestyle=(0, (4, 1.5)), zorder=4)
        line.set(marker="o", markersize=3.6, markeredgewidth=1.1, markerfacecolor=_CARD)
        return
    if low is not mean:
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, mean, color=colour, linewidth=1.4, marker=marker, markersize=3.2, solid_joinstyle="round")


def _dress(axes: Axes, chart: Chart) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, which="both")
    room = max(1.0, 0.02 * (chart.last_step - chart.first_step))
    axes.set_xlim(chart.first_step - room, chart.last_step + room)
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in chart.curves])
    if chart.log_allowed and values.min() > 0 and values.max() / values.min() > _LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if chart.from_zero:
            axes.set_ylim(0, max(float(values.max()) * 1.08, 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.format_value(value)))


def _series(colour: int) -> str:
    return f"{_SERIES}{16 + colour % SERIES_COLOURS:02x}"


def _for_the_page(svg: str, title: str) -> str:
    """The `<svg>` element alone, as wide as its place, with colours and fonts of the page and no id that another has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, count=1, flags=re.DOTALL)  # it would hold for the whole page
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and every figure names them alike
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace(_INK, "var(--soft)").replace(_GRID, "var(--line)").replace(_CARD, "var(--card)")
    return re.sub(_SERIES + r"(1[0-7])", lambda match: f"var(--series-{int(match[1], 16) - 16})", svg)


def short(value: float) -> str:
    """A number in few characters: 12500 as 12.5k."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def scientific(value: float) -> str:
    """A number as small as learning rates are: 0.00025 as 2.5e-4."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def column(records: Sequence[dict[str, object]], name: str) -> NDArray[np.float64]:
    """A column of records as numbers, NaN where it is missing, null or no number. Shape: (records,)."""
    return np.array(
        [float(v) if isinstance(v := record.get(name), int | float) else math.nan for record in records],
        dtype=np.float64,
    )
