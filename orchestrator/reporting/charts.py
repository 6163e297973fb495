"""Charts of results for reports and for notes in a tracker: intervals, curves, shares.

A report draws them at the width of a phone, as SVG, so that a page may set several beside each
other or one below another, and no label has to shrink; a note in a tracker wide, as PNG. The same
data give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.reporting._statistics import Array
from orchestrator.reporting.rows import (
    Results,
    Row,
    headline,
    named,
    rows,
    settings_text,
    world_text,
    worlds_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.7  # inches of 96 px
WIDE = 7.0  # the widest picture that MLflow shows in full
DPI = 100  # of a note's picture
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
INK, FAINT = "#1b1f24", "#6a737d"

LEAST_SPREAD = 5.0  # points between the ends of an axis of percent
MOST_CURVES = len(COLORS)  # of a chart; readers cannot distinguish more
MOST_DOTS = 24  # of a chart in a note; a report has more room
MOST_SETTINGS = 4  # that get a picture in a note

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
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
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


# ---------------------------------------------------------------- kinds of charts


def svg(figure: Figure) -> str:
    """The figure as text that a page can hold."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _style() -> Any:
    import matplotlib
    from cycler import cycler

    cycle = cycler(color=COLORS, marker=list(MARKERS), linestyle=DASHES)
    return matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycle})


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib.figure import Figure  # heavy, and without pyplot there is no global state

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


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
    factor = 100 if percent else 1
    with _drawing(width, 2.6 if width == WIDTH else 3.6) as (figure, axes):
        for one in series:
            x = np.asarray(one.x, dtype=float)
            [line] = axes.plot(x, factor * np.asarray(one.y), label=one.label)
            if not joined:
                line.set_linestyle("none")
            if one.low is not None and one.high is not None:
                low, high = (factor * np.asarray(side) for side in (one.low, one.high))
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for name, value in (level or {}).items():
            axes.axhline(factor * value, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), marker="")
            right = axes.get_yaxis_transform()
            style = {"ha": "right", "va": "bottom", "fontsize": 7, "color": FAINT}
            axes.text(1, factor * value, name, style, transform=right)
        ticks = sorted({float(x) for one in series for x in one.x})
        if joined and 1 < len(ticks) <= 7:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if percent:
            _spread(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if len(series) > 1 or series[0].label:
            longest = max(len(one.label) for one in series)
            columns = max(1, int(13 * width / (7 + longest)))
            columns = min(columns, len(series))
            figure.legend(loc="outside lower center", ncols=columns, handlelength=2.4)
    return figure


def _spread(axes: Axes) -> None:
    """What differs by next to nothing should look like it, and nothing is beyond 100 %."""
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, LEAST_SPREAD) / 2
    top = min(middle + half, 100 + half / 10)
    axes.set_ylim(min(middle - half, top - LEAST_SPREAD), top)


def dots(
    groups: Mapping[str, Sequence[Dot]],
    xlabel: str,
    *,
    zero: bool = False,
    most: int = 150,
    width: float = WIDTH,
) -> Figure:
    """Values in percent with their intervals, one a line under the heading of their group.

    Args:
        zero: with a line at 0 to compare with.
        most: lines, headings among them.
    """
    lines: list[str | Dot] = []
    for heading, group in groups.items():
        lines += [heading, *group]
    title = f"the first {most} of {len(lines)}" if len(lines) > most else ""
    lines = lines[:most]
    with _drawing(width, 0.75 + 0.21 * len(lines)) as (figure, axes):
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8, marker="")
        for at, one in enumerate(lines):
            if isinstance(one, str):
                continue
            color = COLORS[0] if not zero else COLORS[2] if one.low > 0 else COLORS[1]
            axes.errorbar(
                100 * one.value,
                at,
                xerr=[[100 * (one.value - one.low)], [100 * (one.high - one.value)]],
                fmt="D" if one.strong else "o",
                color=FAINT if zero and one.low <= 0 <= one.high else color,
                markersize=5.5 if one.strong else 4.5,
            )
        labels = [line if isinstance(line, str) else line.label for line in lines]
        axes.set_yticks(range(len(lines)), labels)
        for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel, loc="right")  # in the middle a long one leaves the picture
        axes.set_title(title)
    return figure


def heat(
    counts: Array,
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
    with _drawing(width, width if roomy else 3.4 if few else 3.2) as (figure, axes):
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
        axes.grid(visible=False)
        if len(names) <= (110 if roomy else 25):
            labels = [short(name, 24 if roomy else 12) for name in names]
            turned: dict[str, Any] = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(len(names)), labels, **turned)
            axes.set_yticks(range(len(names)), labels)
            axes.tick_params(labelsize=7 if few else 5.5)
        if few:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = "black" if shares[row, column] > 0.55 else "white"
                    style = {"ha": "center", "va": "center", "fontsize": 6, "color": color}
                    axes.text(column, row, f"{count}", style)
        axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def short(text: str, most: int = 34) -> str:
    """
    >>> short("accuracy", 6)
    'accur…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------- of results


def accuracy(results: Results, *, most: int = 150, width: float = WIDTH) -> Figure:
    """Each row with its interval, the best above; the rows of one world together."""
    groups: dict[str, list[Dot]] = {}
    for row in sorted(results.rows, key=lambda row: -row.mean):
        of_world = groups.setdefault(world_text(row.world), [])
        label = short(named(row, results.varied), 34 if width == WIDTH else 60)
        strong = not of_world
        of_world.append(Dot(label=label, value=row.mean, low=row.low, high=row.high, strong=strong))
    groups = {world_text(world): groups[world_text(world)] for world in results.worlds}
    return dots(groups, f"{headline(results.rows)}, mean and 95 % interval", most=most, width=width)


def differences(results: Results) -> Figure:
    """Each comparison with its interval and a line at 0; those with the control stand out."""
    groups: dict[str, list[Dot]] = {}
    for one in results.comparisons:
        settings = settings_text(one.row, results.varied)
        label = " \N{MINUS SIGN} ".join(one.methods) + (f", {settings}" if settings else "")
        found = one.difference
        groups.setdefault(world_text(one.row.world), []).append(
            Dot(
                label=short(label),
                value=found.mean,
                low=found.low,
                high=found.high,
                strong=one.role == "control",
            )
        )
    return dots(groups, "difference, points", zero=True)


def by_setting(
    results: Results, points: Sequence[Row], key: str, *, width: float = WIDTH
) -> list[Figure]:
    """Accuracy against a setting, in as many charts as it takes.

    A line for all rows that differ in this setting alone, over the band of their intervals, and a
    dashed one for each method without it; of a search a dot for the mean of each point, by cell,
    since hardly two points share all else.

    Args:
        points: one row a point, also of a search.
    """
    searched = len(points) > len(results.rows)
    several = len(worlds_of(points)) > 1
    varied = [name for name in results.varied if name != key]
    lines: dict[str, list[Row]] = {}
    for row in points:
        if key in row.settings:
            world = f", {world_text(row.world)}" if several else ""
            lines.setdefault(row.cell if searched else named(row, varied) + world, []).append(row)
    series = []
    for label, of_line in lines.items():
        if searched or len(of_line) > 1:
            line = sorted(of_line, key=lambda row: float(row.settings[key]))
            series.append(
                Series(
                    label=short(label, 40),
                    x=[float(row.settings[key]) for row in line],
                    y=[row.mean for row in line],
                    low=None if searched else [row.low for row in line],
                    high=None if searched else [row.high for row in line],
                )
            )
    fixed = {row.method: row.mean for row in results.rows if key not in row.settings}
    parts = [series[i : i + MOST_CURVES] for i in range(0, len(series), MOST_CURVES)]
    return [
        curves(
            part,
            key,
            headline(results.rows),
            title=f"{number} of {len(parts)}" if len(parts) > 1 else "",
            level=fixed if len(results.worlds) == 1 else {},
            joined=not searched,
            width=width,
        )
        for number, part in enumerate(parts, 1)
    ]


def numeric_settings(rows: Sequence[Row]) -> list[str]:
    """Settings with at least two numbers as values, and nothing else."""
    values: dict[str, set[object]] = {}
    for row in rows:
        for key, value in row.settings.items():
            values.setdefault(key, set()).add(value)
    return [
        key
        for key, found in values.items()
        if len(found) > 1
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)
    ]


def over_iterations(
    labelled: Sequence[tuple[str, Row]], results: Results, metric: str
) -> list[Series]:
    """A metric of rows over iterations, with the band from the lowest to the highest run."""
    found = [(label, results.curve(row, metric)) for label, row in labelled]
    return [
        Series(
            label=short(label, 60),
            x=range(1, runs.shape[1] + 1),
            y=runs.mean(axis=0).tolist(),
            low=runs.min(axis=0).tolist(),
            high=runs.max(axis=0).tolist(),
        )
        for label, runs in found
        if runs is not None and runs.shape[1] > 1
    ]


def confusion(labels: Array, predictions: Array, classes: int) -> Array:
    """(C, C) test images by true (rows) and predicted class."""
    pairs = labels.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def confusion_picture(labels: Array, predictions: Array, names: Sequence[str]) -> bytes:
    """Test images of one trial, for a tracker; larger for more classes."""
    counts = confusion(labels, predictions, len(names))
    return png(heat(counts, names, width=min(12.0, 2.4 + 0.42 * len(names))))


def pictures(results: Results) -> dict[str, bytes]:
    """Those of a note that the results have something for, by file name."""
    found: dict[str, Figure] = {}
    if len(results.rows) > 1:
        found["accuracy.png"] = accuracy(results, most=MOST_DOTS, width=WIDE)
    points = rows(results.entries, None)
    for key in numeric_settings(points)[:MOST_SETTINGS]:
        if parts := by_setting(results, points, key, width=WIDE):
            found[f"accuracy_by_{key}.png"] = parts[0]
    varied = results.varied
    labelled = [(f"{named(row, varied)}, {world_text(row.world)}", row) for row in results.rows]
    if learned := over_iterations(labelled, results, "pseudo/accuracy"):
        title = f"the first {MOST_CURVES} of {len(learned)}" if len(learned) > MOST_CURVES else ""
        words = ("iteration", "pseudo-labels that are right, %")
        shown = learned[:MOST_CURVES]
        found["pseudo_labels.png"] = curves(shown, *words, title=title, width=WIDE)
    return {name: png(figure) for name, figure in found.items()}
