"""The points that a cell's space holds. Knows no sampler and imports nothing heavy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from air_core.flat import trial_keys
from orchestrator.keys import digest
from orchestrator.spec._expressions import compile_when
from orchestrator.spec.sweep import Cell, Dimension, Search


@dataclass(frozen=True)
class Point:
    """One setting of a cell: what the search chose, beside the cell's own settings."""

    number: int
    params: Mapping[str, Any]
    told: bool = False  # its round is over: it is not compared any more


def point_count(cell: Cell, search: Search | None) -> int:
    """Points of a cell, over all resumes."""
    if search is None or not cell.space:
        return 1
    if search.sampler == "grid":
        return min(search.points, len(grid_points(cell)))
    return search.points


def study_name(cell: Cell, search: Search) -> str:
    """Another space, other settings beside it, or another way of pruning is another study."""
    space = [[d.key, d.values, d.min, d.max, d.log, d.when] for d in cell.space]
    asked = [space, search.sampler, search.seed, search.objective]
    if search.pruning is not None:  # a search without it keeps the name that it always had
        asked.append(list(astuple(search.pruning)))
    return f"{cell.id}/{digest([asked, cell.flat])[:8]}"


def default_params(cell: Cell) -> dict[str, Any]:
    """The cell's own settings as a point of its space; a number outside of it moves to the
    nearest one inside. Empty where a word is not among the values."""
    params: dict[str, Any] = {}
    for dimension in cell.space:
        if not applies(dimension, cell.flat | params):
            continue
        value = cell.flat.get(dimension.key, trial_keys()[dimension.key].default)
        inside = _nearest(value, dimension)
        if not inside:
            return {}
        params[dimension.key] = inside[0]
    return params


def grid_points(cell: Cell) -> list[dict[str, Any]]:
    """Every combination of values whose conditions hold, the default first."""
    found: list[dict[str, Any]] = []
    for combination in itertools.product(*[d.values or () for d in cell.space]):
        params: dict[str, Any] = {}
        for dimension, value in zip(cell.space, combination, strict=True):
            if applies(dimension, cell.flat | params):
                params[dimension.key] = value
        if params not in found:
            found.append(params)
    first = default_params(cell)
    return sorted(found, key=lambda params: params != first)


def applies(dimension: Dimension, flat: Mapping[str, Any]) -> bool:
    """Does the condition of a dimension hold?"""
    return dimension.when is None or compile_when(dimension.when)(dict(flat))


def holds(dimension: Dimension, value: Any) -> bool:
    """Is this value one of the dimension's?"""
    if dimension.values is not None:  # to Python, true is 1
        return any(type(one) is type(value) and one == value for one in dimension.values)
    assert dimension.min is not None
    assert dimension.max is not None
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    return numbers and bool(dimension.min <= value <= dimension.max)


def _nearest(value: Any, dimension: Dimension) -> list[Any]:
    """The value, or the nearest number that the dimension holds; empty if there is none."""
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    if dimension.values is None:
        assert dimension.min is not None
        assert dimension.max is not None
        return [min(max(value, dimension.min), dimension.max)] if numbers else []
    if value in dimension.values:
        return [value]
    if numbers and all(isinstance(one, int | float) for one in dimension.values):
        return [min(dimension.values, key=lambda one: abs(one - value))]
    return []
