"""Pruning rules: which points of a round stop at a rung. Works on numbers only.

A rung is an iteration at which points are compared by the objective of the search. The comparison
waits until all points of the round have reached the rung, so the pruned points do not depend on the
order in which trials end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import median

from orchestrator.spec.sweep import Pruning

DEFAULT = 0  # number of the default point, which is never pruned


def points_to_prune(
    pruning: Pruning, values: Mapping[int, float], earlier: Iterable[float] = ()
) -> tuple[int, ...]:
    """Select the points that stop at a rung, in the order of their numbers.

    Args:
        values: objectives of the round's points at this rung, by number, without failed points.
        earlier: objectives that points of earlier rounds had at this rung.

    >>> halving = Pruning(rule="halving", rungs=(2,), keep=0.5)
    >>> points_to_prune(halving, {4: 0.1, 5: 0.3, 6: 0.3, 7: 0.3})
    (4, 7)
    >>> points_to_prune(Pruning(rule="median", rungs=(2,)), {4: 0.1, 5: 0.3}, earlier=[0.2, 0.25])
    (4,)
    """
    continuing = {DEFAULT} | set(RULES[pruning.rule](pruning, values, list(earlier)))
    return tuple(sorted(number for number in values if number not in continuing))


def _best(pruning: Pruning, values: Mapping[int, float], earlier: list[float]) -> list[int]:
    """Successive halving: the best fraction of the round; ties go to the earlier point."""
    ranked = sorted(values, key=lambda number: (-values[number], number))
    return ranked[: math.ceil(pruning.keep * len(ranked))]


def _not_below_median(
    pruning: Pruning, values: Mapping[int, float], earlier: list[float]
) -> list[int]:
    """Points that are at least as good as the median of this and all earlier rounds."""
    if not values:
        return []
    middle = median([*values.values(), *earlier])
    return [number for number, value in values.items() if value >= middle]


RULES: dict[str, Callable[[Pruning, Mapping[int, float], list[float]], list[int]]] = {
    "halving": _best,
    "median": _not_below_median,
}
