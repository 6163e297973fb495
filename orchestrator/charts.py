"""Charts of results, as SVG or PNG: accuracy with intervals, curves, shares, costs.

Drawn at the width of a phone, so that a page may set several beside each other or one below
another, and no label has to shrink. The same data give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.7  # inches of 96 px
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
LEAST_SPREAD = 5.0  # points between the ends of an axis of percent
INK, FAINT = "#1b1f24", "#6a737d"

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "airsweep",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; fractions are shown in percent."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # of the band
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its interval."""

    label: str
    value: float
    low: float
    high: float
    strong: bool = False  # stands out from the rest


def svg(figure: Figure) -> str:
    """The figure as text that a page can hold."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure, dpi: int = 144) -> bytes:
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def curves(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    level: Mapping[str, float] | None = None,
    percent: bool = True,
    joined: bool = True,
    width: float = WIDTH,
) -> Figure:
    """One line a series, over a band where it has one.

    Args:
        level: horizontal lines to compare with, by name.
        joined: by a line; else dots.
    """
    figure, axes = _figure(width, 2.6 if width == WIDTH else 3.6)
    with _style():
        factor = 100 if percent else 1
        for number, one in enumerate(series):
            color = COLORS[number % len(COLORS)]
            x = np.asarray(one.x, dtype=float)
            axes.plot(
                x,
                factor * np.asarray(one.y),
                color=color,
                linestyle=DASHES[number % len(DASHES)] if joined else "none",
                marker=MARKS[number % len(MARKS)],
                markersize=3.5,
                linewidth=1.4,
                label=one.label,
            )
            if one.low is not None and one.high is not None:
                low, high = (factor * np.asarray(side) for side in (one.low, one.high))
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for name, value in (level or {}).items():
            axes.axhline(factor * value, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                name,
                (1, factor * value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color=FAINT,
            )
        ticks = sorted({float(x) for one in series for x in one.x})
        if 1 < len(ticks) <= 7:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if percent:
            _spread(axes)
        _named(axes, xlabel, ylabel, title)
        if len(series) > 1 or series[0].label:
            _legend(figure, axes, width)
    return figure


def _spread(axes: Axes) -> None:
    """What differs by next to nothing should look like it, and nothing is beyond 100 %."""
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, LEAST_SPREAD) / 2
    top = min(middle + half, 100 + half / 10)
    axes.set_ylim(min(middle - half, top - LEAST_SPREAD), top)


def dots(
    values: Sequence[Dot],
    xlabel: str,
    *,
    title: str = "",
    zero: bool = False,
    percent: bool = True,
    width: float = WIDTH,
) -> Figure:
    """Values with their intervals, one a line; with `zero` a line at 0 to compare with.

    A value that is nan is a heading.
    """
    figure, axes = _figure(width, 0.75 + 0.21 * len(values))
    with _style():
        factor = 100 if percent else 1
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8)
        for line, one in enumerate(values):
            color = COLORS[0] if not zero else COLORS[2] if one.low > 0 else COLORS[1]
            color = FAINT if zero and one.low <= 0 <= one.high else color
            axes.plot(
                [factor * one.low, factor * one.high], [line, line], color=color, linewidth=1.6
            )
            axes.plot(
                [factor * one.value],
                [line],
                "D" if one.strong else "o",
                color=color,
                markersize=5.5 if one.strong else 4.5,
            )
        axes.set_yticks(range(len(values)), [one.label for one in values])
        for tick, one in zip(axes.get_yticklabels(), values, strict=True):
            tick.set_fontweight("bold" if math.isnan(one.value) else "normal")
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _named(axes, xlabel, "", title)
    return figure


def heat(
    counts: npt.NDArray[np.integer[Any]],
    names: Sequence[str],
    *,
    title: str = "",
    width: float = WIDTH,
) -> Figure:
    """A confusion matrix, shaded by share of the true class.

    Args:
        counts: (C, C) images of each true class (rows) that were taken for each class (columns).
            They are written into the fields where there is room.
        names: C class names.
    """
    roomy = width > WIDTH
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= (30 if roomy else 12)
    figure, axes = _figure(width, width if roomy else 3.4 if few else 3.2)
    with _style():
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
        axes.grid(visible=False)
        if len(names) <= (110 if roomy else 25):
            places, most = range(len(names)), 24 if roomy else 12
            short = [name if len(name) <= most else name[: most - 1] + "…" for name in names]
            axes.set_xticks(places, short, rotation=55, ha="right", rotation_mode="anchor")
            axes.set_yticks(places, short)
            axes.tick_params(labelsize=7 if few else 5.5)
        if few:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = "black" if shares[row, column] > 0.55 else "white"
                    text = f"{count}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
        _named(axes, "predicted", "true", title)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # heavy, and without pyplot there is no global state

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _named(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title)


def _legend(figure: Figure, axes: Axes, width: float) -> None:
    """Below the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, int(13 * width / (7 + max(map(len, labels)))))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        handlelength=2.4,
    )
