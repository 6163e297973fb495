"""Nothing happens, and nobody says why: on a cluster that others use too, what is asked for may be
taken. Knows no Ray.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from orchestrator.fit import asked_of
from orchestrator.sweep import Resources

QUIET = 60.0  # seconds without news, before the first word; each later word after twice as long


class Stall:
    """Says on a thread that nothing has happened for a while, and what is free meanwhile.

    Args:
        free: what is free and what there is of each kind, all machines together.
        say: where to say it.
    """

    def __init__(
        self,
        resources: Resources,
        free: Callable[[], Mapping[str, tuple[float, float]]],
        say: Callable[[str], None],
        every: float = QUIET / 4,
    ) -> None:
        self._resources, self._free, self._say, self._every = resources, free, say, every
        self._last, self._next = time.monotonic(), QUIET
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def news(self) -> None:
        """Something has happened."""
        self._last, self._next = time.monotonic(), QUIET

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            quiet = time.monotonic() - self._last
            if quiet < self._next:
                continue
            why = wanting(self._resources, self._free())
            if why:  # else something long goes on, and says so itself
                self._next = 2 * quiet
                self._say(f"no news for {quiet:.0f} s: {why}")


def wanting(resources: Resources, free: Mapping[str, tuple[float, float]]) -> str:
    """What there is too little of for a trial or a generator to start; empty: there is enough.

    >>> wanting(Resources(), {"CPU": (0.0, 2.0)})
    'a trial asks for 1 CPU and 0 of 2 are free; `ray status` says who holds them'
    """
    for name, want in (("trial", resources.trial), ("generator", resources.generator)):
        for kind, amount in asked_of(want).items():
            left, total = free.get(kind, (0.0, 0.0))
            if left < amount:
                return (
                    f"a {name} asks for {amount:g} {kind} and {left:g} of {total:g} are free; "
                    "`ray status` says who holds them"
                )
    return ""
