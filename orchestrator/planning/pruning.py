"""Which points of a round go no further. Knows numbers only.

Points are compared at one iteration, by the objective that the search is after, and only once all
of a round have come to it: so what is pruned does not hang on which trial was the first to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import median

from orchestrator.spec.sweep import Pruning

DEFAULT = 0  # the number of the default point, which is never pruned


def pruned(
    pruning: Pruning, values: Mapping[int, float], earlier: Iterable[float] = ()
) -> tuple[int, ...]:
    """Points that stop here, in the order of their numbers.

    Args:
        values: of the round's points at this rung, by number. One that failed has none.
        earlier: values that points of earlier rounds had at this rung.

    >>> halving = Pruning(rule="halving", rungs=(2,), keep=0.5)
    >>> pruned(halving, {4: 0.1, 5: 0.3, 6: 0.3, 7: 0.3})
    (4, 7)
    >>> pruned(Pruning(rule="median", rungs=(2,)), {4: 0.1, 5: 0.3}, earlier=[0.2, 0.25])
    (4,)
    """
    stays = {DEFAULT} | set(RULES[pruning.rule](pruning, values, list(earlier)))
    return tuple(sorted(number for number in values if number not in stays))


def _best(pruning: Pruning, values: Mapping[int, float], earlier: list[float]) -> list[int]:
    """Successive halving: the best share of the round; of equal ones the earlier point."""
    ranked = sorted(values, key=lambda number: (-values[number], number))
    return ranked[: math.ceil(pruning.keep * len(ranked))]


def _not_below_median(
    pruning: Pruning, values: Mapping[int, float], earlier: list[float]
) -> list[int]:
    """Those that are no worse than the median of all points that came so far."""
    if not values:
        return []
    middle = median([*values.values(), *earlier])
    return [number for number, value in values.items() if value >= middle]


RULES: dict[str, Callable[[Pruning, Mapping[int, float], list[float]], list[int]]] = {
    "halving": _best,
    "median": _not_below_median,
}
