"""The results of a sweep as small charts for people: PNG bytes, the same for the same data.

Colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; lines
also differ in their markers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report import (
    Entry,
    Results,
    Row,
    settings_text,
    varied_settings,
    worlds_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vP*X"
LINES = len(COLORS)  # in one chart; more cannot be told apart
BARS = 24  # rows in one chart
AXES = 4  # settings that get a chart
INK, FAINT = "#1b1f24", "#6a737d"


def charts(found: Sequence[Row], entries: Sequence[Entry]) -> dict[str, Callable[[], bytes]]:
    """Those that the results have something for, by file name.

    Args:
        found: the rows of the table.
        entries: all trials behind it; of a search also those of points that the table leaves out.
    """
    makers: dict[str, Callable[[], bytes]] = {}
    if len(found) > 1:
        makers["accuracy.png"] = partial(_accuracy, found, entries)
    for key in [key for key in varied_settings(found, entries) if _is_number(entries, key)][:AXES]:
        makers[f"accuracy_by_{key}.png"] = partial(_by_setting, found, entries, key)
    results = Results(found, entries)
    if any(_has_rounds(results, row) for row in found):
        makers["pseudo_labels.png"] = partial(_pseudo_labels, found, results, entries)
    return makers


# ---------------------------------------------------------------- accuracy by method


def _accuracy(found: Sequence[Row], entries: Sequence[Entry]) -> bytes:
    """Mean and 95 % interval of each row, the best above; the columns of one world together."""
    worlds, varied = worlds_of(found), varied_settings(found, entries)
    shown: list[tuple[str, Row | None]] = []
    for world in worlds:
        of_world = sorted((r for r in found if r.world == world), key=lambda row: -row.mean)
        if len(worlds) > 1:
            shown.append((_world(world), None))
        shown += [(_label(row, varied), row) for row in of_world]
    left = len(shown) - BARS
    shown = shown[:BARS]
    figure, axes = _figure(7.0, 1.1 + 0.3 * len(shown))
    for place, (_, row) in enumerate(shown):
        if row is None:
            continue
        low, mean, high = (100 * value for value in (row.low, row.mean, row.high))
        axes.plot([low, high], [place, place], color=COLORS[0], linewidth=2)
        axes.plot([mean], [place], "o", color=COLORS[0], markersize=6)
        axes.annotate(f"{mean:.1f}", (high, place), (6, 0), **_BESIDE)
    axes.set_yticks(range(len(shown)), [label for label, _ in shown])
    for tick, (_, row) in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#e1e4e8")
    axes.set_xlabel(f"{_headline(found)}, mean and 95 % interval")
    if left > 0:
        axes.set_title(f"the first {BARS} of {BARS + left}", fontsize=9, color=FAINT)
    return _png(figure)


_BESIDE: dict[str, Any] = {
    "textcoords": "offset points",
    "va": "center",
    "fontsize": 8,
    "color": FAINT,
}


# ---------------------------------------------------------------- accuracy against a setting


def _by_setting(found: Sequence[Row], entries: Sequence[Entry], key: str) -> bytes:
    """A line for all rows that differ in this setting alone, with intervals; of a search, dots."""
    figure, axes = _figure(7.0, 4.0)
    several = len(worlds_of(found)) > 1
    if len({(entry.cell, entry.point) for entry in entries}) > len(found):
        names, values = _dots(axes, found, entries, key, several)
    else:
        names, values = _lines(axes, found, key, several)
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.grid(color="#e1e4e8")
    axes.set_xlabel(key)
    axes.set_ylabel(_headline(found))
    _legend(figure, axes, names)
    return _png(figure)


def _lines(axes: Axes, found: Sequence[Row], key: str, several: bool) -> tuple[int, list[float]]:
    """How many lines there are, and the values on the x axis."""
    groups: dict[str, list[Row]] = {}
    varied = varied_settings(found, ())
    for row in found:
        if key in row.settings:
            others = settings_text(row, [name for name in varied if name != key])
            named = [_world(row.world) if several else "", row.method, others]
            groups.setdefault(" ".join(filter(None, named)), []).append(row)
    for (name, group), look in zip(groups.items(), _looks(), strict=False):
        group = sorted(group, key=lambda row: float(row.settings[key]))
        x = [float(row.settings[key]) for row in group]
        mean, low, high = (
            100 * np.array([getattr(row, part) for row in group])
            for part in ("mean", "low", "high")
        )
        axes.plot(x, mean, label=name, markersize=5, **look)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return len(groups), sorted({float(row.settings[key]) for of in groups.values() for row in of})


def _dots(
    axes: Axes, found: Sequence[Row], entries: Sequence[Entry], key: str, several: bool
) -> tuple[int, list[float]]:
    """One for the mean of each point: hardly two of them share all other settings."""
    cells = {row.cell: row for row in found}
    points: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        if key in entry.settings and entry.cell in cells:
            points.setdefault((entry.cell, entry.point), []).append(entry)
    groups: dict[str, list[tuple[float, float]]] = {}
    for (cell, _), group in points.items():
        row = cells[cell]
        mean = float(np.mean([entry.metrics[f"test/{row.metric}"] for entry in group]))
        name = " ".join(filter(None, [_world(row.world) if several else "", row.method]))
        groups.setdefault(name, []).append((float(group[0].settings[key]), 100 * mean))
    for (name, dots), look in zip(groups.items(), _looks(), strict=False):
        axes.plot(*zip(*dots, strict=True), label=name, markersize=6, linestyle="none", **look)
    return len(groups), sorted({x for dots in groups.values() for x, _ in dots})


# ---------------------------------------------------------------- pseudo-labels over iterations


def _pseudo_labels(found: Sequence[Row], results: Results, entries: Sequence[Entry]) -> bytes:
    """How many pool images have a pseudo-label, and how many of these are right."""
    figure = _blank(7.0, 3.2)
    varied, several = varied_settings(found, entries), len(worlds_of(found)) > 1
    learning = [row for row in found if _has_rounds(results, row)]
    parts = (("pseudo/accuracy", "right, % of them"), ("pseudo/coverage", "labelled, % of pool"))
    panels = figure.subplots(1, 2)
    for axes, (metric, title) in zip(panels, parts, strict=True):
        for row, look in zip(learning, _looks(), strict=False):
            curves = results.curve(row, metric)
            if curves is None:
                continue
            x = np.arange(1, curves.shape[1] + 1)
            name = _label(row, varied) + (f", {_world(row.world)}" if several else "")
            axes.plot(x, 100 * curves.mean(axis=0), label=name, markersize=4, **look)
            if len(curves) > 1:
                bounds = 100 * curves.min(axis=0), 100 * curves.max(axis=0)
                axes.fill_between(x, *bounds, color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("iteration")
        axes.set_title(f"Pseudo-labels: {title}", fontsize=10)
        axes.grid(color="#e1e4e8")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain_frame(axes)
    _legend(figure, panels[0], len(learning))
    return _png(figure)


def _has_rounds(results: Results, row: Row) -> bool:
    curves = results.curve(row, "pseudo/accuracy")
    return curves is not None and curves.shape[1] > 1


# ---------------------------------------------------------------- words and frames


def _is_number(entries: Sequence[Entry], key: str) -> bool:
    values = [entry.settings[key] for entry in entries if key in entry.settings]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _looks() -> Iterator[dict[str, Any]]:
    for color, marker in zip(COLORS, MARKERS, strict=True):
        yield {"color": color, "marker": marker}


def _label(row: Row, varied: Sequence[str]) -> str:
    settings = settings_text(row, varied)
    return f"{row.method}  {settings}" if settings else row.method


def _world(world: tuple[str, str, str]) -> str:
    dataset, paradigm, modality = world
    return f"{dataset} {paradigm}/{modality}"


def _headline(found: Sequence[Row]) -> str:
    kinds = {row.metric for row in found}
    if kinds == {"harmonic_mean"}:
        return "harmonic mean, %"
    return "test accuracy, %" if len(kinds) == 1 else "test accuracy or harmonic mean, %"


def _blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # heavy, and without pyplot there is no global state

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _blank(width, height)
    axes = figure.add_subplot()
    _plain_frame(axes)
    return figure, axes


def _plain_frame(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)


def _legend(figure: Figure, axes: Axes, lines: int) -> None:
    """Below the chart, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    more = f"{lines - LINES} more are left out" if lines > LINES else None
    figure.legend(
        *(handles, labels),
        loc="outside lower center",
        ncols=max(1, min(4, 90 // (6 + max(map(len, labels), default=1)))),
        fontsize=8,
        frameon=False,
        title=more,
        title_fontsize=8,
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the name of the version, which would be the only thing to differ.
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
