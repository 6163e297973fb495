"""Who has which part of the cluster: generators, trials, or both side by side. Knows no Ray.

While trials run, a *reserve* of some generators' size stays with those who prepare what the next
cells read, and trials have the rest. While none run, whoever prepares has everything; when nothing
is left to prepare, trials have. Both are asked again and again, so that a machine that comes or
goes is noticed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.fit import Machine, asked_of, room, without
from orchestrator.sweep import GeneratorResources, Resources, Want

# Generators that stay beside trials are one of so many. A simulation of 64 devices finds the same
# time for any share between a quarter and a sixteenth (docs/scale.md).
SHARE = 8
LOOK_EVERY = 5.0  # seconds between two looks at the machines
TAKING_UP = 3.0  # seconds that the driver has to begin trials
NARROWING = 120.0  # seconds that trials wait for generators to give room: a block's time is less


class Ground(Protocol):
    """The cluster, as far as it has to be known here."""

    def machines(self) -> Sequence[Machine]: ...

    def hold(self, want: GeneratorResources, count: int) -> Any:
        """Keep so many places free for who is given this; None: there was no room for them."""

    def release(self, held: Any) -> None: ...

    def ask_for(self, wants: Sequence[Want]) -> None:
        """Tell an autoscaler, if there is one, that there should be room for these."""


@dataclass(frozen=True)
class Part:
    """What somebody who prepares may use for now."""

    count: int  # of them side by side
    held: Any  # the reserve to work in; None: anywhere
    reserved: bool


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


class Shares:
    """One for each run of the driver; both sides may ask from threads of their own."""

    def __init__(self, resources: Resources, ground: Ground) -> None:
        self._resources, self._ground = resources, ground
        self._changed = threading.Condition()
        self._tuning, self._since = False, 0.0  # do trials run, and since when
        self._wide = 0  # parts in use that are larger than the reserve
        self._used = 0  # parts in use that lie in the reserve
        self._held: Any = None
        self._machines: tuple[float, Sequence[Machine]] = (0.0, ())
        self._preparing = False

    @property
    def preparing(self) -> bool:
        """Is there anything left to prepare beside trials?"""
        return self._preparing

    @preparing.setter
    def preparing(self, now: bool) -> None:
        with self._changed:
            self._preparing = now
            self._tidy()

    def reserve(self) -> int:
        """Generators that work while trials run; 0: the cluster is too small for both."""
        want = self._resources.generator
        fit = self.generators()
        most = max(1, fit // SHARE) if want.reserve is None else min(want.reserve, fit)
        while most and not room(self._resources.trial, without(self.machines(), want, most)):
            most -= 1
        return most

    def machines(self) -> Sequence[Machine]:
        seen, machines = self._machines
        if not machines or time.monotonic() - seen > LOOK_EVERY:
            machines = self._ground.machines()
            self._machines = (time.monotonic(), machines)
        return machines

    def generators(self) -> int:
        """That fit the whole cluster."""
        want = self._resources.generator
        fit = room(want, self.machines())
        return min(want.actors or fit, fit)

    def ask_for_more(self) -> None:
        """One of each kind that a sweep starts; an autoscaler sees by itself what waits then."""
        resources = self._resources
        generators = [resources.generator] * (resources.generator.actors or 1)
        self._ground.ask_for([resources.trial, resources.encoding, *generators])

    # The side of trials.

    def trials(self) -> int:
        """How many run at a time, now; 0: generators have to give room first."""
        with self._changed:
            waited = time.monotonic() - self._since
            if self._wide and waited < NARROWING:
                return 0
        machines = self.machines()
        if self.preparing:
            machines = without(machines, self._resources.generator, self.reserve())
        return max(1, room(self._resources.trial, machines))

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Trials run meanwhile."""
        with self._changed:
            self._tuning, self._since = True, time.monotonic()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._tuning = False
                self._tidy()
                self._changed.notify_all()

    # The side of those who prepare.

    @contextmanager
    def drawing(self) -> Iterator[Part]:
        """A pool of generators. Waits while there is no room; see `moved`."""
        part = self._pool()
        try:
            yield part
        finally:
            with self._changed:
                if part.reserved:
                    self._used -= 1
                else:
                    self._wide -= 1
                self._tidy()
                self._changed.notify_all()

    def _pool(self) -> Part:
        with self._changed:
            self._changed.wait_for(lambda: not self._tuning or self.reserve() > 0)
            if not self._tuning:
                self._wide += 1
                return Part(self.generators(), None, reserved=False)
            count = self.reserve()
            self._used += 1
        return Part(count, self._hold(count), reserved=True)

    def moved(self, part: Part) -> int | None:
        """How many generators may work now that trials came or went; None: none did."""
        with self._changed:
            if self._tuning == part.reserved:
                return None
            return self.reserve() if self._tuning else self.generators()

    def give_way(self) -> None:
        """Something is ready for trials: let them begin before the next pool is opened."""
        with self._changed:
            self._changed.wait_for(lambda: self._tuning, TAKING_UP)

    def places(self, want: Want) -> int:
        """How many of those who prepare something else fit, now."""
        with self._changed:
            if not self._tuning or not self.reserve():
                return max(1, room(want, self.machines()))
            bundle = asked_of(self._resources.generator)
            return max(1, self.reserve() * room(want, [bundle]))

    @contextmanager
    def beside(self) -> Iterator[Any]:
        """Where one piece of work that is not drawn belongs: the reserve, or None for anywhere."""
        with self._changed:
            reserved = self._tuning and self.reserve() > 0
            self._used += reserved
            count = self.reserve()
        try:
            yield self._hold(count) if reserved else None
        finally:
            with self._changed:
                self._used -= reserved
                self._tidy()

    def _hold(self, count: int) -> Any:
        if self._held is None:
            self._held = self._ground.hold(self._resources.generator, count)
        return self._held

    def _tidy(self) -> None:
        """Give the reserve back where nobody works in it and nobody has to be kept out of it.

        Trials that cannot start ask for nothing: where machines were lost, the reserve may be the
        last place that there is, and they wait for it.
        """
        kept = self._tuning and self._preparing and self.reserve() > 0
        if self._held is not None and not self._used and not kept:
            self._ground.release(self._held)
            self._held = None
