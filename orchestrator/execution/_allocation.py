"""Limits on the generators and trials that run at a time. Imports no Ray.

While trials run and images are still missing, some generators are *reserved*: trials leave their
resources free, and preparation uses no more than them. While no trial runs, preparation has the
whole cluster. The limits are computed anew before each start, so that machines that join or leave
are noticed.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.formatting import plural
from orchestrator.keys import Process
from orchestrator.planning import Machine, ray_resources
from orchestrator.planning.resources import process_capacity, remaining_resources
from orchestrator.spec import Resources

# One of this many generators is reserved beside trials. A simulation of 64 devices finds the same
# time for any share between a quarter and a sixteenth (benchmarks/README.md).
RESERVE_DIVISOR = 8
REFRESH_INTERVAL = 5.0  # seconds for which the list of machines is kept
# Seconds that trials wait for a pool to end, or to shrink to the reserve if it would take longer.
MAX_POOL_WAIT = 120.0


@dataclass
class PoolStatistics:
    """Statistics of a pool of generators or encoders; the start of a process counts as idle."""

    process: Process
    gpu: bool = False
    actors: int = 0  # processes at a time, at most
    images: int = 0
    pairs: int = 0  # pairs of image and class whose denoising error was computed
    busy: float = 0.0  # seconds of drawing and encoding, summed; of an encoder with opening
    held: float = 0.0  # seconds that the processes lived, summed
    seconds: float = 0.0  # wall clock

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add a shard."""
        self.images += facts.get("drawn", 0) + facts.get("encoded", 0)
        self.pairs += facts.get("pairs", 0)
        self.busy += facts.get("on_device", 0.0)

    def __str__(self) -> str:
        """
        >>> print(PoolStatistics("generator", True, 2, images=640, busy=150, held=160, seconds=80))
        640 images in 80 s, 8.0 a second; GPUs of 2 generators busy 94 % of the time
        >>> print(PoolStatistics("generator", False, 1, 80, 800, busy=4, held=8, seconds=8))
        80 images and 800 denoising errors in 8 s; 1 process busy 50 % of the time
        """
        counts = {"images": self.images, "denoising errors": self.pairs}
        work = " and ".join(f"{count:,} {noun}" for noun, count in counts.items() if count)
        work = f"{work} in {self.seconds:.0f} s"
        if sum(map(bool, counts.values())) == 1:
            work += f", {sum(counts.values()) / max(self.seconds, 1e-9):.1f} a second"
        makers = plural(self.actors, self.process if self.gpu else "process")
        if self.gpu and self.process == "generator":
            makers = f"GPUs of {makers}"
        share = 100 * self.busy / max(self.held, 1e-9)
        return f"{work}; {makers} busy {share:.0f} % of the time"


class Allocation:
    """Divides the cluster between trials and preparation during one run.

    Args:
        list_machines: returns the machines that the cluster has now.

    Attributes:
        preparing: artifacts are missing that may be made beside trials.
        pools: processes that prepare now, by kind.
    """

    def __init__(
        self, resources: Resources, list_machines: Callable[[], Sequence[Machine]]
    ) -> None:
        self.resources, self._list_machines = resources, list_machines
        self.preparing = False
        self.pools: Counter[Process] = Counter()
        self._trials_since: float | None = None
        self._machines: tuple[float, Sequence[Machine]] = (0.0, ())

    @property
    def trials_running(self) -> bool:
        """Whether trials run."""
        return self._trials_since is not None

    @trials_running.setter
    def trials_running(self, now: bool) -> None:
        self._trials_since = time.monotonic() if now else None

    def machines(self) -> Sequence[Machine]:
        listed_at, machines = self._machines
        if not machines or time.monotonic() - listed_at > REFRESH_INTERVAL:
            machines = self._list_machines()
            self._machines = (time.monotonic(), machines)
        return machines

    def reserve(self) -> int:
        """Generators that work while trials run; 0 if the cluster is too small for both."""
        want = self.resources.generator
        fit = self.fitting("generator")
        reserve = max(1, fit // RESERVE_DIVISOR) if want.reserve is None else min(want.reserve, fit)
        while reserve and not process_capacity(
            self.resources.trial, remaining_resources(self.machines(), want, reserve)
        ):
            reserve -= 1
        return reserve

    def capacity(self, process: Process) -> int:
        """Processes of a kind that may prepare now, if all are of this kind.

        While trials run, these are the reserved generators, or encoders in their place.
        """
        if not self.trials_running:
            return self.fitting(process)
        generator = ray_resources(self.resources.generator)
        in_place = process_capacity(self.resources.process_resources(process), [generator])
        return self.reserve() * (1 if process == "generator" else in_place)

    def fitting(self, process: Process) -> int:
        """Processes of a kind that fit the whole cluster."""
        fit = process_capacity(self.resources.process_resources(process), self.machines())
        return min(self.resources.generator.actors or fit, fit) if process == "generator" else fit

    def room(self, process: Process, is_task: bool = False) -> int:
        """Further processes of a kind that may start now.

        One for a task, that is an artifact without shards, may always start: on a small cluster it
        takes a device when a trial ends, and does not keep it for long.
        """
        free = math.floor((1 - self._used()) * self.capacity(process) + 1e-6)
        return max(free, int(is_task and not self.pools.total()))

    def _used(self) -> float:
        """The part of what preparation may use now that its processes use; above 1: more."""
        return sum(count / max(self.capacity(each), 1) for each, count in self.pools.items())

    def max_trials(self) -> int:
        """Trials that may run now: those that fit beside the reserve, or for a while beside a pool
        that has to shrink first."""
        machines = self.machines()
        waited = time.monotonic() - (self._trials_since or 0.0)
        if self._used() > 1 and waited < MAX_POOL_WAIT:
            for process, count in self.pools.items():
                want = self.resources.process_resources(process)
                machines = remaining_resources(machines, want, count)
            return process_capacity(self.resources.trial, machines)
        if self.preparing:
            machines = remaining_resources(machines, self.resources.generator, self.reserve())
        return max(1, process_capacity(self.resources.trial, machines))
