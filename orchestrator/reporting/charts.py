"""Charts of results for the HTML report.

They are SVG with the width of a phone, so that the page can arrange them side by side or one below
the other and hardly scales their labels. The same data give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.formatting import format_percent
from orchestrator.reporting._statistics import Array, Interval, Verdict
from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.rows import (
    Row,
    Task,
    is_bound,
    metric_text,
    row_text,
    settings_text,
    task_text,
    tasks_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.4  # in inches of 96 px
LINE = 0.21  # height of a line of `dots`
STYLE = Path(__file__).with_name("templates") / "charts.mplstyle"
BLUE, ORANGE, GREEN, INK, FAINT = "#0072b2", "#d55e00", "#009e73", "#1b1f24", "#6a737d"
VERDICT_COLORS: dict[Verdict | None, str] = {None: BLUE, "higher": GREEN, "lower": ORANGE}
VERDICT_COLORS |= {"not significant": FAINT, "not tested": FAINT}

MIN_SPAN = 5.0  # smallest range of an axis in percent, in points
MAX_CURVES = 7  # per chart: one per colour of the style
MAX_HEADING = 40  # characters
MAX_LINES = 150  # of a chart of dots, with its headings

# The curves of pseudo-labels: label of the axis, title.
PSEUDO = {
    "pseudo/accuracy": ("accuracy, %", "accuracy of the pseudo-labels"),
    "pseudo/coverage": ("coverage, %", "share of the pool with a pseudo-label"),
}

# More values on the line of a row.
FUSED, BEST, CHANCE = "fused classifier", "best classifier", "chance"
POINTS: dict[str, dict[str, Any]] = {
    FUSED: {"marker": "o", "color": BLUE, "markerfacecolor": "white", "markersize": 4.5},
    BEST: {"marker": "*", "color": ORANGE, "markersize": 10},
    CHANCE: {"marker": "|", "color": FAINT, "markersize": 72 * LINE},
}


# Label and X values of a curve; (3, X) values: the curve, lower and upper edge of its band.
Series = tuple[str, Sequence[float], Array]


class Dot(NamedTuple):
    """A value with its interval."""

    label: str
    interval: Interval
    verdict: Verdict | None = None  # of a difference; without a test it has no interval
    others: Mapping[str, float | None] = MappingProxyType({})  # more values; see `POINTS`


# ---------------------------------------------------------------- kinds of charts


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(fname=STYLE)


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib.figure import Figure  # slow to import; unlike pyplot it has no global state

    with _style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def curves(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    level: Mapping[str, float] = MappingProxyType({}),
    chance: Mapping[str, float] = MappingProxyType({}),
) -> Figure:
    """A line in percent per series of fractions, over its band, for the first `MAX_CURVES`.

    Args:
        level: horizontal reference lines, by name.
        chance: more lines, named in the title. The axis does not extend to them, since it would
            then show no differences between the curves.
    """
    if len(series) > MAX_CURVES:
        title = ", ".join(filter(None, [title, f"the first {MAX_CURVES} of {len(series)}"]))
        series = series[:MAX_CURVES]
    with _drawing(2.6) as (figure, axes):
        labels, xs, _ = zip(*series, strict=True)
        for label, x, values in series:
            y, low, high = 100 * values
            [line] = axes.plot(x, y, label=label)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        line_style: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": (0, (2, 2))}
        small: dict[str, Any] = {"fontsize": 7, "color": FAINT}
        for name, value in level.items():
            axes.axhline(100 * value, marker="", **line_style)
            end = {**small, "ha": "right", "va": "bottom"}
            axes.text(1, 100 * value, name, end, transform=axes.get_yaxis_transform())
        ticks = sorted({*map(float, chain.from_iterable(xs))})
        if 1 < len(ticks) <= 7:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        _limit_axis(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set_title(", ".join(chance), small, loc="right")
        for value in chance.values():
            axes.axhline(100 * value, marker="", **line_style)
        columns = min(max(1, int(13 * WIDTH / (7 + max(map(len, labels))))), len(series))
        figure.legend(loc="outside lower center", ncols=columns, handlelength=2.4)
    return figure


def _limit_axis(axes: Axes) -> None:
    """Show at least `MIN_SPAN` points, so that small differences look small, and end at 100 %."""
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, MIN_SPAN) / 2
    top = min(middle + half, 100 + half / 10)
    axes.set_ylim(min(middle - half, top - MIN_SPAN), top)


def dots(groups: Mapping[str, Sequence[Dot]], xlabel: str, *, value: str = "") -> Figure:
    """Values in percent with their intervals, one per line under the heading of their group.

    Args:
        value: name of the values in the legend. Empty: differences, with a line at 0, no legend.
    """
    # Headings and dots.
    lines: list[Any] = [line for heading, group in groups.items() for line in (heading, *group)]
    title = f"the first {MAX_LINES} of {len(lines)}" if len(lines) > MAX_LINES else ""
    lines = lines[:MAX_LINES]
    legend = 0.4 if value else 0.0
    with _drawing(0.75 + legend + LINE * len(lines)) as (figure, axes):
        if not value:
            axes.axvline(0, color=INK, linewidth=0.8, marker="")
        for index, dot in enumerate(lines):
            if isinstance(dot, str):
                continue
            middle = dot.interval.mean
            sides = [[100 * (middle - dot.interval.low)], [100 * (dot.interval.high - middle)]]
            axes.errorbar(
                100 * middle,
                index,
                xerr=None if dot.verdict == "not tested" else sides,
                fmt="o",
                color=VERDICT_COLORS[dot.verdict],
                markersize=4.5,
                label=value or None,
            )
            for name, other in dot.others.items():
                if other is not None:
                    axes.plot(100 * other, index, label=name, linestyle="none", **POINTS[name])
        labels = [line if isinstance(line, str) else line.label for line in lines]
        axes.set_yticks(range(len(lines)), labels)
        for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel, loc="right")  # a long centred label would leave the picture
        axes.set_title(title)
        if value:
            handles, names = axes.get_legend_handles_labels()
            by_name = dict(zip(names, handles, strict=True))
            shown = {name: by_name[name] for name in (value, *POINTS) if name in by_name}
            place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "labelspacing": 1}
            figure.legend([*shown.values()], [*shown], **place)
    return figure


def heatmap(counts: Array, names: Sequence[str], title: str) -> Figure:
    """A confusion matrix, shaded by share of the true class.

    Args:
        counts: (C, C) images by true class (rows) and predicted class (columns). Matrices of few
            classes show the counts.
        names: C class names.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 12
    with _drawing(3.9) as (figure, axes):
        axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
        axes.grid(visible=False)
        if len(names) <= 25:
            labels = [shorten(name, 12) for name in names]
            rotated: dict[str, Any] = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(len(names)), labels, **rotated)
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


def shorten(text: str, most: int = 40) -> str:
    """
    >>> shorten("accuracy", 6)
    'accur…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------- charts of results


def accuracy(results: Results) -> Figure:
    """Each row with its interval, by task from the highest mean, with chance and best classifier.

    Bounds, which are no methods, follow in a group of their own.
    """
    groups: dict[str, list[Dot]] = {}
    order = results.tasks.index
    for row in sorted(results.tested, key=lambda r: (order(r.task), is_bound(r.method), -r.mean)):
        best = results.best_of(row)
        others = {
            FUSED: row.average("test/accuracy_fused"),
            BEST: best.test.mean if best and best.test else None,
            CHANCE: results.chance(row),
        }
        label = shorten(row_text(row, results.varied_settings))
        heading = "bounds, " * is_bound(row.method) + _heading(row.task)
        groups.setdefault(heading, []).append(Dot(label, row, others=others))
    metric = metric_text(results.rows)
    return dots(groups, metric, value=metric.replace("%", "95 %"))


def _heading(task: Task) -> str:
    """The end of a task's text; the start of a long one is the path of a folder."""
    text = task_text(task)
    return text if len(text) <= MAX_HEADING else "…" + text[1 - MAX_HEADING :]


def differences(results: Results) -> Figure:
    """Each comparison, with its interval if tested."""
    groups: dict[str, list[Dot]] = {}
    for comparison in results.all_comparisons:
        role, row = comparison.role, comparison.row
        settings = settings_text(row, [k for k in results.varied_settings if k != role])
        label = comparison.name.replace(" - ", " \N{MINUS SIGN} ")
        label = label.replace(role, role.rpartition(".")[2]) + (f", {settings}" * bool(settings))
        dot = Dot(shorten(label), comparison.difference, comparison.verdict)
        groups.setdefault(_heading(row.task), []).append(dot)
    return dots(groups, "difference, points")


def by_setting(results: Results, key: str) -> Figure | None:
    """Accuracy against a setting; None if no rows differ in it alone.

    A line for rows that differ in this setting only, over the band of their intervals, and a dashed
    line for each method without the setting.
    """
    lines: dict[str, list[Row]] = {}
    for row in results.tested:
        if key in row.settings:
            lines.setdefault(_label(results, results.tested, row, key), []).append(row)
    series = []
    for label, line in lines.items():
        if len(line) > 1:
            line.sort(key=lambda row: float(row.settings[key]))
            values = np.array([(row.mean, row.low, row.high) for row in line]).T
            series.append((shorten(label), [float(r.settings[key]) for r in line], values))
    single = len(results.tasks) == 1
    fixed = {row.method: row.mean for row in results.rows if single and key not in row.settings}
    if not series:
        return None
    chance = _chance(results, results.tested)
    return curves(series, key, metric_text(results.rows), level=fixed, chance=chance)


def _label(results: Results, rows: Sequence[Row], row: Row, *left_out: str) -> str:
    """Method and settings of one of the rows of a chart; with its task if they are of several."""
    text = row_text(row, [key for key in results.varied_settings if key not in left_out])
    return f"{text}, {task_text(row.task)}" if len(tasks_of(rows)) > 1 else text


def _chance(results: Results, rows: Sequence[Row]) -> dict[str, float]:
    """The accuracy of guessing for the datasets of the rows, by its label in a chart."""
    levels = dict.fromkeys(map(results.chance, rows))
    return {f"chance {format_percent(level)}": level for level in levels if level is not None}


def numeric_settings(results: Results) -> list[str]:
    """Settings of the grid with at least two values, all of them numbers."""
    values: dict[str, set[Any]] = {}
    for row in results.tested:
        for key in row.settings.keys() - row.first.searched:
            values.setdefault(key, set()).add(row.settings[key])
    return [
        key
        for key in results.varied_settings
        if len(values.get(key, ())) > 1 and {*map(type, values[key])} <= {int, float}
    ]


def pseudo_labels(results: Results, rows: Sequence[Row], metric: str) -> Figure | None:
    """A metric of `PSEUDO` by iteration, for the first rows that have it; None if none has.

    Lines are means over runs; bands span the lowest and the highest run.
    """
    series = [
        (
            shorten(_label(results, rows, row), 60),
            range(1, runs.shape[1] + 1),
            np.stack([runs.mean(axis=0), runs.min(axis=0), runs.max(axis=0)]),
        )
        for row in rows
        if (runs := row.curve(metric)) is not None and runs.shape[1] > 1
    ]
    ylabel, title = PSEUDO[metric]
    # Pseudo-labels can be of other classes than the test: of the unseen ones, of another dataset.
    same = [row for row in rows if row.paradigm != "trzsl" and " -> " not in row.dataset]
    chance = _chance(results, same) if metric == "pseudo/accuracy" else {}
    if not series:
        return None
    return curves(series, "iteration", ylabel, title=title, chance=chance)


def confusion(labels: Array, predictions: Array, classes: int) -> Array:
    """(C, C) test images by true class (rows) and predicted class (columns)."""
    pairs = labels.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
