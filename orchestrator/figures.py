"""The results of a sweep as charts: what a report and a tracker's note both show.

A report draws them narrow, as SVG, many of them (`sections.py`); a note in a tracker draws a few,
wide, as PNG (`pictures`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator import charts
from orchestrator.report import (
    Entry,
    Results,
    Row,
    headline,
    named,
    rows,
    settings_text,
    varied_settings,
    world_text,
    worlds_of,
)

WIDE = 7.0  # inches of 96 px: as wide as MLflow shows a picture whole
DPI = 100
MOST_DOTS = 24  # in one chart
MOST_CURVES = len(charts.COLORS)  # more cannot be told apart
MOST_SETTINGS = 4  # that get a picture


# ---------------------------------------------------------------- results as marks and lines


def dot(row: Row, label: str, strong: bool = False) -> charts.Dot:
    """A row's mean with its interval."""
    return charts.Dot(label=label, value=row.mean, low=row.low, high=row.high, strong=strong)


def responses(rows: Sequence[Row], entries: Sequence[Entry], key: str) -> list[charts.Series]:
    """A line for all rows that differ in this setting alone, over the band of their intervals."""
    groups: dict[str, list[Row]] = {}
    several = len(worlds_of(rows)) > 1
    varied = [name for name in varied_settings(rows, entries) if name != key]
    methods = {row.method for row in rows if key in row.settings}
    for row in rows:
        if key in row.settings:
            named = [
                world_text(row.world) if several else "",
                row.method if len(methods) > 1 else "",
            ]
            label = " ".join(filter(None, [*named, settings_text(row, varied)]))
            groups.setdefault(label, []).append(row)
    return [
        _response(label, sorted(line, key=lambda row: float(row.settings[key])), key)
        for label, line in groups.items()
        if len(line) > 1
    ]


def _response(label: str, line: Sequence[Row], key: str) -> charts.Series:
    return charts.Series(
        label=short(label, 40),
        x=[float(row.settings[key]) for row in line],
        y=[row.mean for row in line],
        low=[row.low for row in line],
        high=[row.high for row in line],
    )


def clouds(points: Sequence[Row], key: str) -> list[charts.Series]:
    """A dot for the mean of each point of a search, by cell: hardly two share all else."""
    by_cell: dict[str, list[Row]] = {}
    for row in points:
        if key in row.settings:
            by_cell.setdefault(row.cell, []).append(row)
    return [
        charts.Series(
            label=short(cell, 40),
            x=[float(row.settings[key]) for row in of],
            y=[row.mean for row in of],
        )
        for cell, of in by_cell.items()
    ]


def over_iterations(results: Results, row: Row, metric: str, label: str) -> charts.Series | None:
    """A metric over iterations, with the band from the lowest to the highest run."""
    runs = results.curve(row, metric)
    if runs is None or runs.shape[1] < 2:
        return None
    return charts.Series(
        label=label,
        x=range(1, runs.shape[1] + 1),
        y=runs.mean(axis=0).tolist(),
        low=runs.min(axis=0).tolist(),
        high=runs.max(axis=0).tolist(),
    )


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


# ---------------------------------------------------------------- pictures of a note


def pictures(found: Sequence[Row], entries: Sequence[Entry]) -> dict[str, Callable[[], bytes]]:
    """Those that the results have something for, by file name: PNG, the same for the same data.

    Args:
        found: the rows of the table.
        entries: all trials behind it; of a search also those of points that the table leaves out.
    """
    makers: dict[str, Callable[[], bytes]] = {}
    if len(found) > 1:
        makers["accuracy.png"] = partial(_accuracy, found, entries)
    points = rows(entries, None)
    searched = len(points) > len(found)
    for key in numeric_settings(points)[:MOST_SETTINGS]:
        series = clouds(points, key) if searched else responses(found, entries, key)
        if series:
            name = f"accuracy_by_{key}.png"
            makers[name] = partial(_by_setting, series, key, headline(found), searched)
    learned = list(_learned(found, entries))
    if learned:
        makers["pseudo_labels.png"] = partial(_pseudo_labels, learned)
    return makers


def confusion(
    labels: npt.NDArray[np.integer[Any]],
    predictions: npt.NDArray[np.integer[Any]],
    names: Sequence[str],
) -> bytes:
    """Test images of one trial by true and predicted class.

    Args:
        labels: (T,) true classes.
        predictions: (T,) predicted classes.
        names: C class names.
    """
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return charts.png(charts.heat(counts, names, width=min(12.0, 2.4 + 0.42 * len(names))), DPI)


def _accuracy(found: Sequence[Row], entries: Sequence[Entry]) -> bytes:
    """Each row, the best above; the rows of one world together."""
    worlds, varied = worlds_of(found), varied_settings(found, entries)
    shown: list[charts.Dot] = []
    for world in worlds:
        of_world = sorted((r for r in found if r.world == world), key=lambda row: -row.mean)
        if len(worlds) > 1:
            nothing = math.nan
            shown.append(
                charts.Dot(label=world_text(world), value=nothing, low=nothing, high=nothing)
            )
        shown += [dot(row, short(named(row, varied), 60)) for row in of_world]
    left = len(shown) - MOST_DOTS
    figure = charts.dots(
        shown[:MOST_DOTS],
        f"{headline(found)}, mean and 95 % interval",
        title=f"the first {MOST_DOTS} of {len(shown)}" if left > 0 else "",
        width=WIDE,
    )
    return charts.png(figure, DPI)


def _by_setting(series: Sequence[charts.Series], key: str, ylabel: str, searched: bool) -> bytes:
    title = _cut(series)
    shown = series[:MOST_CURVES]
    figure = charts.curves(shown, key, ylabel, title=title, joined=not searched, width=WIDE)
    return charts.png(figure, DPI)


def _pseudo_labels(series: Sequence[charts.Series]) -> bytes:
    figure = charts.curves(
        series[:MOST_CURVES],
        "iteration",
        "pseudo-labels that are right, %",
        title=_cut(series),
        width=WIDE,
    )
    return charts.png(figure, DPI)


def _cut(series: Sequence[charts.Series]) -> str:
    if len(series) <= MOST_CURVES:
        return ""
    return f"the first {MOST_CURVES} of {len(series)}"


def _learned(found: Sequence[Row], entries: Sequence[Entry]) -> Iterator[charts.Series]:
    results, varied = Results(found, entries), varied_settings(found, entries)
    several = len(worlds_of(found)) > 1
    for row in found:
        label = named(row, varied) + (f", {world_text(row.world)}" if several else "")
        series = over_iterations(results, row, "pseudo/accuracy", short(label, 60))
        if series is not None:
            yield series


def short(text: str, most: int = 34) -> str:
    """
    >>> short("accuracy", 6)
    'accur…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"
