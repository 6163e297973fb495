"""Tells a user why nothing happens: on a cluster that others use too, what a sweep asks for may be
taken. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from orchestrator.planning import ray_resources
from orchestrator.spec import Resources

QUIET = 60.0  # seconds without news before the first message; each later one after twice as long


class Stall:
    """Says that nothing has happened for a while, and what is free meanwhile.

    Args:
        free: what is free and what there is of each kind, all machines together.
        say: where to say it.
    """

    def __init__(
        self,
        resources: Resources,
        free: Callable[[], Mapping[str, tuple[float, float]]],
        say: Callable[[str], None],
    ) -> None:
        self._resources, self._free, self._say = resources, free, say
        self.news()

    def news(self) -> None:
        """Something has happened."""
        self._last, self._next = time.monotonic(), QUIET

    def check(self) -> None:
        """Call it every now and then."""
        quiet = time.monotonic() - self._last
        if quiet < self._next:
            return
        self._next = 2 * quiet
        why = wanting(self._resources, self._free())
        if why:  # else something long goes on, and shows its own progress
            self._say(f"no news for {quiet:.0f} s: {why}")


def wanting(resources: Resources, free: Mapping[str, tuple[float, float]]) -> str:
    """What there is too little of for a trial or a generator to start; empty: there is enough.

    >>> wanting(Resources(), {"CPU": (0.0, 2.0)})
    'a trial asks for 1 CPU and 0 of 2 are free; `ray status` says who holds them'
    """
    for name, want in (("trial", resources.trial), ("generator", resources.generator)):
        for kind, amount in ray_resources(want).items():
            left, total = free.get(kind, (0.0, 0.0))
            if left < amount:
                return (
                    f"a {name} asks for {amount:g} {kind} and {left:g} of {total:g} are free; "
                    "`ray status` says who holds them"
                )
    return ""
