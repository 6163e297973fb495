"""Reports that no process of a sweep works because other programs hold the resources it needs.

Does not depend on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from orchestrator.planning import ray_resources
from orchestrator.planning.resources import format_amount
from orchestrator.spec import Resources

# Seconds without progress before the first message. Each later message comes after twice as long.
FIRST_WARNING = 60.0


class StallMonitor:
    """Warns if no process of the sweep works for a while because no resources are free.

    Args:
        free: returns (free, total) for each kind of resource, over all machines.
        waits: returns whether a process waits for resources.
        warn: receives the message.
    """

    def __init__(
        self,
        resources: Resources,
        free: Callable[[], Mapping[str, tuple[float, float]]],
        waits: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> None:
        self._resources, self._free, self._waits, self._warn = resources, free, waits, warn
        self.reset()

    def reset(self) -> None:
        """Record that the sweep made progress, or that a process of it works."""
        self._last, self._next = time.monotonic(), FIRST_WARNING

    def check(self) -> None:
        """Warn if it is time to. Call it regularly."""
        quiet = time.monotonic() - self._last
        if quiet < self._next:
            return
        self._next = 2 * quiet
        if not self._waits():  # a process of the sweep starts, which may take minutes
            return
        reason = shortage(self._resources, self._free())
        if reason:
            self._warn(f"no process of this sweep has worked for {quiet:.0f} s: {reason}")


def shortage(resources: Resources, free: Mapping[str, tuple[float, float]]) -> str:
    """The resource that a trial or a generator lacks to start; empty if there are enough.

    >>> shortage(Resources(), {"CPU": (0.0, 2.0)})
    'a trial needs 1 CPU, but 0 of 2 are free; `ray status` shows what is in use'
    """
    for name, want in (("trial", resources.trial), ("generator", resources.generator)):
        for kind, amount in ray_resources(want).items():
            left, total = free.get(kind, (0.0, 0.0))
            if left < amount:
                return (
                    f"a {name} needs {format_amount(kind, amount)} {kind}, but "
                    f"{format_amount(kind, left)} of {format_amount(kind, total)} are free; "
                    "`ray status` shows what is in use"
                )
    return ""
