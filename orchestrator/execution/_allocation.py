"""Limits on the generators and trials that run at a time. Imports no Ray.

While trials run and images are still missing, some generators are *reserved*: trials leave their
resources free, and preparation uses no more than them. While no trial runs, preparation has the
whole cluster. The limits are computed anew before each start, so that machines that join or leave
are noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.keys import Process
from orchestrator.planning import Machine, ray_resources
from orchestrator.planning.resources import process_capacity, remaining_resources
from orchestrator.spec import ProcessResources, Resources

# One of this many generators is reserved beside trials. A simulation of 64 devices finds the same
# time for any share between a quarter and a sixteenth (benchmarks/README.md).
RESERVE_DIVISOR = 8
REFRESH_INTERVAL = 5.0  # seconds for which the list of machines is kept
# Seconds that trials wait for a pool to end, or to shrink to the reserve if it would take longer.
MAX_POOL_WAIT = 120.0


@dataclass
class PoolStatistics:
    """Statistics of a pool of generators or encoders; the start of its actors counts as idle."""

    actors: int
    gpu: bool
    process: Process = "generator"
    images: int = 0
    pairs: int = 0  # pairs of image and class whose denoising error was computed
    busy: float = 0.0  # seconds of drawing and encoding, summed; of an encoder with opening
    seconds: float = 0.0  # wall clock

    def __str__(self) -> str:
        """
        >>> print(PoolStatistics(actors=2, gpu=True, images=640, busy=150.0, seconds=80.0))
        640 images in 80 s, 8.0 a second; GPUs of 2 generators busy 94 % of the time
        >>> print(PoolStatistics(actors=1, gpu=False, pairs=800, busy=4.0, seconds=8.0))
        800 denoising errors in 8 s, 100.0 a second; 1 generator busy 50 % of the time
        >>> print(PoolStatistics(actors=2, gpu=False, images=80, pairs=800, busy=4.0, seconds=8.0))
        80 images and 800 denoising errors in 8 s; 2 generators busy 25 % of the time
        >>> print(PoolStatistics(2, gpu=True, process="encoder", images=9, busy=8.0, seconds=4.0))
        9 images in 4 s, 2.2 a second; 2 encoders busy 100 % of the time
        """
        counts = {"images": self.images, "denoising errors": self.pairs}
        work = " and ".join(f"{count:,} {noun}" for noun, count in counts.items() if count)
        work = f"{work or 'nothing'} in {self.seconds:.0f} s"
        if sum(map(bool, counts.values())) == 1:
            work += f", {sum(counts.values()) / max(self.seconds, 1e-9):.1f} a second"
        share = self.busy / (self.actors * self.seconds) if self.seconds else 0.0
        prefix = "GPUs of " if self.gpu and self.process == "generator" else ""
        plural = "s" if self.actors > 1 else ""
        return (
            f"{work}; {prefix}{self.actors} {self.process}{plural} busy {100 * share:.0f} % of "
            "the time"
        )


class Allocation:
    """Divides the cluster between trials and preparation during one run.

    Args:
        list_machines: returns the machines that the cluster has now.

    Attributes:
        preparing: artifacts are missing that may be made beside trials.
        pool_exceeds_reserve: a pool of generators is open that may use more than the reserve.
    """

    def __init__(
        self, resources: Resources, list_machines: Callable[[], Sequence[Machine]]
    ) -> None:
        self.preparing = self.pool_exceeds_reserve = False
        self._resources, self._list_machines = resources, list_machines
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

    def max_generators(self) -> int:
        """Generators that fit the whole cluster."""
        want = self._resources.generator
        fit = process_capacity(want, self.machines())
        return min(want.actors or fit, fit)

    def reserve(self) -> int:
        """Generators that work while trials run; 0 if the cluster is too small for both."""
        want = self._resources.generator
        fit = self.max_generators()
        reserve = max(1, fit // RESERVE_DIVISOR) if want.reserve is None else min(want.reserve, fit)
        while reserve and not process_capacity(
            self._resources.trial, remaining_resources(self.machines(), want, reserve)
        ):
            reserve -= 1
        return reserve

    def reserved(self, want: ProcessResources) -> int:
        """Generators, or encoders in their place, that may work while trials run."""
        generator = self._resources.generator
        per_generator = (
            1 if want == generator else process_capacity(want, [ray_resources(generator)])
        )
        return self.reserve() * per_generator

    def pool_size(self, want: ProcessResources) -> int:
        """Generators or encoders that may work now; 0 if they have to wait for the end of the
        trials."""
        if self.trials_running:
            return self.reserved(want)
        if want == self._resources.generator:
            return self.max_generators()
        return process_capacity(want, self.machines())

    def max_trials(self) -> int:
        """Trials that may run now; 0 while an open pool has to shrink first."""
        waited = time.monotonic() - (self._trials_since or 0.0)
        if self.pool_exceeds_reserve and waited < MAX_POOL_WAIT:
            return 0
        machines = self.machines()
        if self.preparing:
            machines = remaining_resources(machines, self._resources.generator, self.reserve())
        return max(1, process_capacity(self._resources.trial, machines))

    def max_tasks(self, want: ProcessResources) -> int:
        """Tasks that prepare features, labels or LoRA and may run now; at least one."""
        if self.trials_running and self.reserve():
            return max(1, self.reserved(want))
        return max(1, process_capacity(want, self.machines()))
