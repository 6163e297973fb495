"""The points of a cell's search space. This module is independent of Optuna."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from air_core.specs.flat import trial_keys
from orchestrator.keys import digest
from orchestrator.spec._expressions import compile_when, names_of, numbers_of
from orchestrator.spec.sweep import Cell, Dimension, Search

MAX_TESTED = 1_000  # points at which a condition is tested


@dataclass(frozen=True)
class Point:
    """One setting of a cell: the searched values; all other settings are the cell's."""

    number: int
    params: Mapping[str, Any]
    round_is_over: bool = False  # its round is over, so pruning no longer compares it


def point_count(cell: Cell, search: Search | None) -> int:
    """Number of points of a cell, over all runs of the sweep."""
    if search is None or not cell.space:
        return 1
    if search.sampler == "grid":
        return min(search.points, len(grid_points(cell)))
    return search.points


def study_name(cell: Cell, search: Search) -> str:
    """Name of a cell's study; another space, other settings or other pruning give another name."""
    space = [[d.key, d.values, d.min, d.max, d.log, d.when] for d in cell.space]
    identity = [space, search.sampler, search.seed, search.objective]
    if search.pruning is not None:  # without pruning the name equals that of older versions
        identity.append(list(astuple(search.pruning)))
    return f"{cell.id}/{digest([identity, cell.flat])[:8]}"


def default_params(cell: Cell) -> dict[str, Any]:
    """The cell's own settings as a point of its space.

    A number outside the space is replaced by the nearest one inside. The result is empty if another
    setting is not among the values of its dimension.
    """
    params: dict[str, Any] = {}
    for dimension in cell.space:
        if not is_active(dimension, cell.flat | params):
            continue
        value = cell.flat.get(dimension.key, trial_keys()[dimension.key].default)
        nearest = _nearest(value, dimension)
        if not nearest:
            return {}
        params[dimension.key] = nearest[0]
    return params


def grid_points(cell: Cell) -> list[dict[str, Any]]:
    """Every combination of values whose conditions hold, the default first."""
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    for combination in itertools.product(*[d.values or () for d in cell.space]):
        params: dict[str, Any] = {}
        for dimension, value in zip(cell.space, combination, strict=True):
            if is_active(dimension, cell.flat | params):
                params[dimension.key] = value
        points.setdefault(tuple(params.items()), params)
    first = default_params(cell)
    return sorted(points.values(), key=lambda params: params != first)


def is_active(dimension: Dimension, flat: Mapping[str, Any]) -> bool:
    """Whether the condition of a dimension holds."""
    return dimension.when is None or compile_when(dimension.when)(dict(flat))


def can_hold(when: str, cell: Cell) -> bool:
    """Whether a condition holds at a point of a cell's space.

    Tests every value of a list; of a range, its ends, the numbers that the condition compares and
    numbers between these. The result is True if more than `MAX_TESTED` points are to be tested.
    """
    searched = [dimension for dimension in cell.space if dimension.key in names_of(when)]
    numbers = {*numbers_of(when)}
    for d in searched:
        numbers |= {*filter(_is_number, d.values or (d.min, d.max))}
    tested = [_tested_values(d, sorted(numbers), cell.flat) for d in searched]
    if math.prod(map(len, tested)) > MAX_TESTED:
        return True
    holds = compile_when(when)
    keys = [dimension.key for dimension in searched]
    points = itertools.product(*tested)
    return any(holds(cell.flat | dict(zip(keys, point, strict=True))) for point in points)


def _tested_values(
    dimension: Dimension, numbers: list[Any], flat: Mapping[str, Any]
) -> Sequence[Any]:
    inactive = [flat.get(dimension.key)] if dimension.when else []
    if dimension.values is not None:
        return [*dimension.values, *inactive]
    assert dimension.min is not None
    assert dimension.max is not None
    between = [(low + high) / 2 for low, high in itertools.pairwise(numbers)]
    inside = {n for n in (*numbers, *between) if dimension.min <= n <= dimension.max}
    if isinstance(dimension.min, int):
        inside = {n for number in inside for n in (math.floor(number), math.ceil(number))}
    return [*inside, *inactive]


def contains_value(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension contains this value."""
    if dimension.values is not None:  # compare types too, since True == 1
        return any(type(v) is type(value) and v == value for v in dimension.values)
    assert dimension.min is not None
    assert dimension.max is not None
    return _is_number(value) and bool(dimension.min <= value <= dimension.max)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(value: Any, dimension: Dimension) -> list[Any]:
    """A list of the value or the nearest number in the dimension; empty if neither exists."""
    is_number = _is_number(value)
    if dimension.values is None:
        assert dimension.min is not None
        assert dimension.max is not None
        return [min(max(value, dimension.min), dimension.max)] if is_number else []
    if value in dimension.values:
        return [value]
    if is_number and all(isinstance(v, int | float) for v in dimension.values):
        return [min(dimension.values, key=lambda v: abs(v - value))]
    return []
