"""How many generators and trials may run at a time. Knows no Ray.

While trials run and something is left to prepare, a *reserve* of some generators is kept from them,
and what is prepared keeps to it. While no trial runs, whatever is prepared has the whole cluster.
Both are asked for before each start, so that a machine that comes or goes is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.planning import Machine, ray_resources
from orchestrator.planning.resources import room, without
from orchestrator.spec import ProcessResources, Resources

if TYPE_CHECKING:
    from orchestrator.execution._progress import Watcher
    from orchestrator.stages.context import WorkerContext

# Generators that stay beside trials are one of so many. A simulation of 64 devices finds the same
# time for any share between a quarter and a sixteenth (docs/benchmarks.md).
SHARE = 8
LOOK_EVERY = 5.0  # seconds between two looks at the machines
NARROWING = 120.0  # seconds that trials wait for generators to give room: a block's time is less


@dataclass
class Pool:
    """What a pool of generators did until it was closed; its actors' start counts as idle."""

    actors: int
    gpu: bool
    images: int = 0
    busy: float = 0.0  # seconds in which they drew or encoded, all actors together
    seconds: float = 0.0  # by the clock

    def __str__(self) -> str:
        """
        >>> print(Pool(actors=2, gpu=True, images=640, busy=150.0, seconds=80.0))
        640 images in 80 s, 8.0 a second; GPUs of 2 generators busy 94 % of it
        """
        share = self.busy / (self.actors * self.seconds) if self.seconds else 0.0
        whose = "GPUs of " if self.gpu else ""
        return (
            f"{self.images} images in {self.seconds:.0f} s, "
            f"{self.images / max(self.seconds, 1e-9):.1f} a second; {whose}{self.actors} "
            f"generator{'s' if self.actors > 1 else ''} busy {share:.0%} of it".replace("%", " %")
        )


class Allocation:
    """One for each run of the driver.

    Args:
        machines: gives those of the cluster, now.

    Attributes:
        preparing: something is left to prepare that may run beside trials.
        wide: a pool of generators is open that may use more than the reserve.
    """

    def __init__(self, resources: Resources, machines: Callable[[], Sequence[Machine]]) -> None:
        self.preparing = self.wide = False
        self._resources, self._look = resources, machines
        self._tuning_since: float | None = None
        self._machines: tuple[float, Sequence[Machine]] = (0.0, ())

    @property
    def tuning(self) -> bool:
        """Do trials run?"""
        return self._tuning_since is not None

    @tuning.setter
    def tuning(self, now: bool) -> None:
        self._tuning_since = time.monotonic() if now else None

    def machines(self) -> Sequence[Machine]:
        seen, machines = self._machines
        if not machines or time.monotonic() - seen > LOOK_EVERY:
            machines = self._look()
            self._machines = (time.monotonic(), machines)
        return machines

    def generators(self) -> int:
        """That fit the whole cluster."""
        want = self._resources.generator
        fit = room(want, self.machines())
        return min(want.actors or fit, fit)

    def reserve(self) -> int:
        """Generators that work while trials run; 0: the cluster is too small for both."""
        want = self._resources.generator
        fit = self.generators()
        most = max(1, fit // SHARE) if want.reserve is None else min(want.reserve, fit)
        while most and not room(self._resources.trial, without(self.machines(), want, most)):
            most -= 1
        return most

    def pool(self) -> int:
        """Generators that may work now; 0: none before the trials are over."""
        return self.reserve() if self.tuning else self.generators()

    def trials(self) -> int:
        """Trials that may run now; 0: generators have to give room first."""
        waited = time.monotonic() - (self._tuning_since or 0.0)
        if self.wide and waited < NARROWING:
            return 0
        machines = self.machines()
        if self.preparing:
            machines = without(machines, self._resources.generator, self.reserve())
        return max(1, room(self._resources.trial, machines))

    def tasks(self, want: ProcessResources) -> int:
        """Tasks that prepare something else than images and may run now, at least one."""
        reserve = self.reserve() if self.tuning else 0
        if reserve:
            return max(1, reserve * room(want, [ray_resources(self._resources.generator)]))
        return max(1, room(want, self.machines()))


@dataclass(frozen=True)
class Context:
    """What all that is prepared in a run shares.

    Attributes:
        watcher: told of each artifact and shard as it is done (seconds; facts).
        board: takes notes of how far long work is, see `progress`.
    """

    worker: WorkerContext
    resources: Resources
    watcher: Watcher
    allocation: Allocation
    board: Any
