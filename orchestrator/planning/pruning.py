"""Pruning: which points of a round stop at a rung."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

from orchestrator.components import PRUNING_RULES
from orchestrator.spec.sweep import Pruning

DEFAULT = 0  # number of the default point, which is never pruned


def points_to_prune(
    pruning: Pruning, values: Mapping[int, float], earlier: Iterable[float] = ()
) -> tuple[int, ...]:
    """Select the points that stop at a rung, in the order of their numbers.

    Args:
        values: objectives of the round's points at this rung, by number, without failed points.
        earlier: objectives that points of earlier rounds had at this rung.

    >>> halves = Pruning(rule="halving", rungs=(2,), keep=0.5)
    >>> points_to_prune(halves, {4: 0.1, 5: 0.3, 6: 0.3, 7: 0.3})
    (4, 7)
    >>> points_to_prune(Pruning(rule="median", rungs=(2,)), {4: 0.1, 5: 0.3}, earlier=[0.2, 0.25])
    (4,)
    """
    rule = PRUNING_RULES.load(pruning.rule)
    continuing = {DEFAULT, *rule(pruning, values, list(earlier))}
    return tuple(sorted(number for number in values if number not in continuing))


def halving(pruning: Pruning, values: Mapping[int, float], earlier: list[float]) -> list[int]:
    """Successive halving: the best fraction of the round; ties go to the earlier point."""
    ranked = sorted(values, key=lambda number: (-values[number], number))
    return ranked[: math.ceil(pruning.keep * len(ranked))]


def not_below_median(
    pruning: Pruning, values: Mapping[int, float], earlier: list[float]
) -> list[int]:
    """Points that are at least as good as the median of this and all earlier rounds."""
    if not values:
        return []
    middle = median([*values.values(), *earlier])
    return [number for number, value in values.items() if value >= middle]
