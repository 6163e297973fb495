"""The results of a sweep as charts: what a report and a tracker's note both show.

A report draws them narrow, as SVG (`sections.py`); a note in a tracker wide, as PNG (`pictures`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from orchestrator import charts
from orchestrator.charts import WIDTH, Dot, Series
from orchestrator.report import (
    Comparison,
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 7.0  # inches of 96 px: the widest picture that MLflow shows in full
DPI = 100
MOST_DOTS = 24  # of a chart in a note; a report has more room
MOST_CURVES = len(charts.COLORS)  # of a chart; readers cannot distinguish more
MOST_SETTINGS = 4  # that get a picture in a note


# ---------------------------------------------------------------- rows and differences


def accuracy(
    found: Sequence[Row], entries: Sequence[Entry], *, most: int = 150, width: float = WIDTH
) -> Figure:
    """Each row with its interval, the best above; the rows of one world together."""
    varied = varied_settings(found, entries)
    dots = {}
    for world in worlds_of(found):
        of_world = sorted((row for row in found if row.world == world), key=lambda row: -row.mean)
        dots[world_text(world)] = [
            Dot(
                label=short(named(row, varied), 34 if width == WIDTH else 60),
                value=row.mean,
                low=row.low,
                high=row.high,
                strong=row is of_world[0],
            )
            for row in of_world
        ]
    return _dots(dots, f"{headline(found)}, mean and 95 % interval", most, width)


def differences(found: Sequence[Comparison], keys: Sequence[str], *, most: int = 150) -> Figure:
    """Each comparison with its interval and a line at 0; those with the control stand out."""
    dots: dict[str, list[Dot]] = {}
    for one in found:
        settings = settings_text(one.row, keys)
        dots.setdefault(world_text(one.row.world), []).append(
            Dot(
                label=short(f"{one.a} \N{MINUS SIGN} {one.b}" + f", {settings}" * bool(settings)),
                value=one.difference.mean,
                low=one.difference.low,
                high=one.difference.high,
                strong=one.role == "control",
            )
        )
    return _dots(dots, "difference, points", most, WIDTH, zero=True)


def _dots(
    by_world: dict[str, list[Dot]], xlabel: str, most: int, width: float, *, zero: bool = False
) -> Figure:
    """Dots under the heading of their world; a heading has no value."""
    shown: list[Dot] = []
    for world, dots in by_world.items():
        shown += [Dot(label=world, value=math.nan, low=math.nan, high=math.nan), *dots]
    title = f"the first {most} of {len(shown)}" if len(shown) > most else ""
    return charts.dots(shown[:most], xlabel, title=title, zero=zero, width=width)


# ---------------------------------------------------------------- accuracy by setting


def by_setting(
    found: Sequence[Row], points: Sequence[Row], entries: Sequence[Entry], key: str
) -> list[list[Series]]:
    """Accuracy against a setting, for as many charts as it takes.

    A line for all rows that differ in this setting alone, over the band of their intervals; of a
    search a dot for the mean of each point, by cell, since hardly two points share all else.

    Args:
        found: the rows of the table.
        points: one row a point, also of a search.
    """
    searched = len(points) > len(found)
    several = len(worlds_of(points)) > 1
    varied = [name for name in varied_settings(found, entries) if name != key]
    lines: dict[str, list[Row]] = {}
    for row in points:
        if key in row.settings:
            world = f", {world_text(row.world)}" if several else ""
            lines.setdefault(row.cell if searched else named(row, varied) + world, []).append(row)
    series = [
        _series(label, sorted(of, key=lambda row: float(row.settings[key])), key, band=not searched)
        for label, of in lines.items()
        if searched or len(of) > 1
    ]
    return [series[i : i + MOST_CURVES] for i in range(0, len(series), MOST_CURVES)]


def _series(label: str, line: Sequence[Row], key: str, *, band: bool) -> Series:
    return Series(
        label=short(label, 40),
        x=[float(row.settings[key]) for row in line],
        y=[row.mean for row in line],
        low=[row.low for row in line] if band else None,
        high=[row.high for row in line] if band else None,
    )


def setting_chart(
    series: Sequence[Series], found: Sequence[Row], key: str, title: str = "", width: float = WIDTH
) -> Figure:
    """One chart of `by_setting`, with a dashed line for each method without this setting."""
    fixed = {row.method: row.mean for row in found if key not in row.settings}
    return charts.curves(
        series,
        key,
        headline(found),
        title=title,
        level=fixed if len(worlds_of(found)) == 1 else {},
        joined=series[0].low is not None,
        width=width,
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


# ---------------------------------------------------------------- iterations and classes


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


# ---------------------------------------------------------------- pictures of a note


def pictures(found: Sequence[Row], entries: Sequence[Entry]) -> dict[str, Callable[[], bytes]]:
    """Those that the results have something for, by file name: PNG, the same for the same data.

    Args:
        found: the rows of the table.
        entries: all trials behind it; of a search also those of points that the table leaves out.
    """
    makers: dict[str, Callable[[], Figure]] = {}
    if len(found) > 1:
        makers["accuracy.png"] = partial(accuracy, found, entries, most=MOST_DOTS, width=WIDE)
    points = rows(entries, None)
    for key in numeric_settings(points)[:MOST_SETTINGS]:
        parts = by_setting(found, points, entries, key)
        if parts:
            title = f"the first of {len(parts)} charts" if len(parts) > 1 else ""
            draw = partial(setting_chart, parts[0], found, key, title, WIDE)
            makers[f"accuracy_by_{key}.png"] = draw
    varied = varied_settings(found, entries)
    labelled = [(f"{named(row, varied)}, {world_text(row.world)}", row) for row in found]
    learned = over_iterations(labelled, Results(found, entries), "pseudo/accuracy")
    if learned:
        makers["pseudo_labels.png"] = partial(
            charts.curves,
            learned[:MOST_CURVES],
            "iteration",
            "pseudo-labels that are right, %",
            title=f"the first {MOST_CURVES} of {len(learned)}" * (len(learned) > MOST_CURVES),
            width=WIDE,
        )
    return {name: partial(_png, draw) for name, draw in makers.items()}


def _png(draw: Callable[[], Figure]) -> bytes:
    return charts.png(draw(), DPI)


def short(text: str, most: int = 34) -> str:
    """
    >>> short("accuracy", 6)
    'accur…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"
