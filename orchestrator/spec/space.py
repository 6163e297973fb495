"""The points of a cell's search space. This module is independent of Optuna."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from air_core.settings import TrialSettings
from air_core.settings.flat import trial_keys
from orchestrator.keys import digest
from orchestrator.spec.cells import MAX_POINTS, Cell, computation_of
from orchestrator.spec.sweep import Search


@dataclass(frozen=True)
class Point:
    """One setting of a cell: the searched values; all other settings are the cell's."""

    number: int
    params: Mapping[str, Any]


def point_count(cell: Cell, search: Search | None) -> int:
    """Number of points of a cell, over all runs of the sweep."""
    if search is None or not cell.space:
        return 1
    return min(search.points, len(grid_points(cell)) or search.points)


def study_name(cell: Cell, search: Search) -> str:
    """Name of a cell's study; another space or other settings give another name."""
    space = [[d.key, d.values, d.min, d.max, d.log] for d in cell.space]
    identity = [space, search.sampler, search.seed, search.objective]
    return f"{cell.id}/{digest([identity, cell.flat])[:8]}"


def default_params(cell: Cell) -> dict[str, Any]:
    """The cell's own settings as a point of its space.

    A number outside the space is replaced by the nearest one inside. The result is empty if another
    setting is not among the values of its dimension.
    """
    params: dict[str, Any] = {}
    for dimension in cell.space:
        key, flat = dimension.key, cell.flat  # a plugin that is not in use may have declared it
        value = flat[key] if key in flat else trial_keys()[key].default
        options: tuple[Any, ...] = dimension.values or (dimension.min, dimension.max)
        if dimension.values is None or value not in options:
            if not all(map(_is_number, (value, *options))):
                return {}
            low, high = min(options), max(options)
            inside = min(max(value, low), high)
            value = (
                inside if dimension.values is None else min(options, key=lambda v: abs(v - value))
            )
        params[key] = value
    return params


def first_point_text(cell: Cell) -> str:
    """What point 0 of a cell is."""
    params = default_params(cell)
    if params.items() <= cell.flat.items():
        return "default setting" if params else "first point"
    return "setting nearest to the default"


def grid_points(cell: Cell) -> list[dict[str, Any]]:
    """Every combination of values, the default first; of those that compute the same, the first.

    Empty if a dimension has a range or there are more than `MAX_POINTS` combinations.
    """
    if math.prod(len(d.values or ()) for d in cell.space) > MAX_POINTS:
        return []
    keys = [dimension.key for dimension in cell.space]
    combinations = itertools.product(*[d.values or () for d in cell.space])
    points = [dict(zip(keys, values, strict=True)) for values in combinations]
    default = default_params(cell)
    points.sort(key=lambda params: params != default)
    distinct: dict[TrialSettings, dict[str, Any]] = {}
    for params in points:
        distinct.setdefault(computation_of({**cell.flat, **params}), params)
    return list(distinct.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
