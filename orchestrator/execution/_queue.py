"""The queue of missing artifacts and shards: which one is made next, and what a failure means.
Imports no Ray.

Work begins in the order of the queue, as soon as its inputs exist and the allocation has room for a
process. A pool of generators or encoders grows by a stream while each of its actors has more work
than its start takes, and shrinks when trials need its resources: a stream that gets no further row
ends after those that it has.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.execution._allocation import MAX_POOL_WAIT, Allocation, PoolStatistics
from orchestrator.failures import CLASSES, Failure, failure_of
from orchestrator.keys import Process, RowSpec, artifact_key
from orchestrator.planning import Requirement
from orchestrator.planning.estimate import estimate, stage_work
from orchestrator.planning.requirements import independent_of

if TYPE_CHECKING:
    from orchestrator.execution._state import RunState
    from orchestrator.execution._stream import Stream, Workers

Shard = tuple[int, int]  # class or draw, block; (0, 0) stands for an artifact without shards
# Seconds that a process takes to start, at least: it imports torch and diffusers.
PROCESS_START = 10.0
MADE = ("drawn", "pairs", "encoded")  # facts of a shard: the numbers of what a process has made
# An actor gets its next shard before it has ended the present one if these take fewer seconds.
SHORT = 2.0
# Seconds for which ended streams keep Ray running. On a lost machine actors do not end.
MAX_END = 10.0


class Row(NamedTuple):
    """A row of a stream: a shard, shards of a block of which later ones need earlier ones, or an
    artifact without shards."""

    key: str  # digest of the key of the artifact, or of the row of the store
    indices: tuple[int, ...]  # classes or draws; (0,) if there are no shards
    block: int


class Made(NamedTuple):
    """What became of an artifact or a shard."""

    seconds: float
    facts: dict[str, Any]
    failure: Failure | None = None


@dataclass(eq=False)
class Part:
    """What is left of a requirement."""

    requirement: Requirement
    kind: Process  # of its pool
    needs: Sequence[Part]  # that have to end before
    todo: list[Shard]  # that no process makes; the next one is last
    pace: float  # seconds of a shard, as estimated; inf: unknown
    ended: bool = False
    running: int = 0  # rows of streams
    made: int = 0  # shards that processes of this run have made
    seconds: float = 0.0  # that these took
    errors: list[Failure] = field(default_factory=list)  # of shards
    tries: Counter[str] = field(default_factory=Counter)  # that failed, by class of the failure

    @property
    def is_row(self) -> bool:
        return bool(self.requirement.rows)

    @property
    def is_long(self) -> bool:
        """Whether it is one artifact that takes longer than the start of a process."""
        return not self.is_row and self.pace > PROCESS_START

    def can_begin(self) -> bool:
        return bool(self.todo) and all(part.ended for part in self.needs)

    def seconds_left(self) -> float:
        """Seconds that one process would take for the shards that none makes."""
        pace = self.seconds / self.made if self.made else self.pace
        return len(self.todo) * pace if self.todo else 0.0

    def take(self) -> list[Shard]:
        """The next shards for one process: one, or those of a block where later ones need earlier
        ones."""
        shards, spec = [self.todo.pop()], self.requirement.spec
        if isinstance(spec, RowSpec) and spec.needs_earlier:
            while self.todo and self.todo[-1][1] == shards[0][1]:
                shards.append(self.todo.pop())
        return shards


@dataclass(eq=False)
class Actors:
    """The actors of a stream."""

    stream: Stream
    size: int
    started: float
    rows: dict[Row, Part] = field(default_factory=dict)  # released, and not returned
    last: float = inf  # seconds of the last row

    def has_room(self) -> bool:
        # The second row of an actor would wait for the first, which may be a LoRA.
        is_short = self.last < SHORT and all(part.is_row for part in self.rows.values())
        return len(self.rows) < self.size * (2 if is_short else 1)

    @property
    def long(self) -> int:
        """Actors that make an artifact which takes longer than the start of a process."""
        return sum(part.is_long for part in self.rows.values())


@dataclass(eq=False)
class Pool:
    """The streams of a kind of process."""

    statistics: PoolStatistics
    streams: list[Actors] = field(default_factory=list)
    began: float = 0.0
    loading: float = 0.0  # seconds that a process loads models, at most

    @property
    def kind(self) -> Process:
        return self.statistics.process

    @property
    def size(self) -> int:
        """Actors of all streams."""
        return sum(actors.size for actors in self.streams)

    @property
    def long(self) -> int:
        return sum(actors.long for actors in self.streams)


class WorkQueue:
    """Makes requirements. `take` and `begin` must be called regularly; neither waits.

    Failures are retried as their class allows. The listener receives each shard and artifact, and
    each final failure; what depends on a failed artifact is left out.

    Args:
        requirements: in the order in which they are needed, each after its inputs.
    """

    def __init__(
        self,
        requirements: Iterable[Requirement],
        workers: Workers,
        allocation: Allocation,
        listener: RunState,
    ) -> None:
        self.workers, self.allocation, self.listener = workers, allocation, listener
        self.store = workers.worker.store
        self.pools: dict[Process, Pool] = {}
        for kind in ("encoder", "generator"):
            gpu = bool(allocation.resources.process_resources(kind).gpu)
            self.pools[kind] = Pool(PoolStatistics(kind, gpu))
        self.ending: list[tuple[Stream, float]] = []  # with the time of their end
        self.parts: dict[str, Part] = {}  # that have not ended, by the digest of their key
        self.store.refresh_listings()
        for requirement in requirements:
            if not requirement.is_complete(self.store):
                self.parts[_digest(requirement)] = self._part(requirement)
        self.specs = {digest: part.requirement.spec for digest, part in self.parts.items()}

    def _part(self, requirement: Requirement) -> Part:
        spec, todo = requirement.spec, [(0, 0)]
        inputs = {artifact_key(needed.spec).digest for needed in spec.inputs(requirement.classes)}
        needs = [
            part
            for digest, part in self.parts.items()
            # Rows of features share their images, which are drawn for the first of these rows; and
            # images that only a picture shows come last.
            if digest in inputs
            or part.requirement.key == requirement.key
            or (requirement.compared_with and not part.requirement.compared_with)
        ]
        if requirement.rows:
            # A shard whose process died with an earlier driver or its Ray did not kill it.
            self.store.row(requirement.rows[0]).reset_crashes()
            todo = requirement.missing(self.store)[::-1]
        work = [stage_work(spec, len(todo))]
        expected = estimate(work, self.store, self.allocation.resources)
        kind = self.allocation.resources.pool_of(spec.maker.process)
        return Part(requirement, kind, needs, todo, expected.work_seconds / len(todo))

    def lacks(self, requirement: Requirement) -> bool:
        """Whether a requirement has not ended."""
        return _digest(requirement) in self.parts

    @property
    def is_over(self) -> bool:
        now = time.monotonic()
        ending = (each.is_alive() and now - at < MAX_END for each, at in self.ending)
        return not (self.parts or any(ending))

    # ---------------------------------------------------------------- results

    def take(self) -> bool:
        """Process the rows that have come back; returns whether a requirement has ended."""
        before = len(self.parts)
        for pool in self.pools.values():
            for actors in [*pool.streams]:
                for row, made in actors.stream.returned():
                    self._on_row(pool, actors, row, made)
                if (problem := actors.stream.problem) is not None:
                    self._on_death(pool, actors, problem)
        return len(self.parts) < before

    def _on_row(self, pool: Pool, actors: Actors, row: Row, results: Sequence[Made]) -> None:
        part = actors.rows.pop(row)
        part.running -= 1
        actors.last = sum(made.seconds for made in results)
        for index, made in zip(row.indices, results, strict=True):
            if made.failure is not None:
                self._on_error(part, (index, row.block), made.failure)
                continue
            if any(made.facts.get(name) for name in MADE):  # else the store had it
                part.made += 1
                part.seconds += made.seconds - made.facts["startup"]
                pool.loading = max(pool.loading, made.facts["startup"])
            pool.statistics.add(made.facts)
            if not part.is_row:
                pool.statistics.held -= made.seconds  # the statistics are of shards
            self.listener.on_prepared(part.requirement, made.seconds, made.facts)
        if not (part.ended or part.todo or part.running):
            self._end_complete(part)

    def _on_error(self, part: Part, shard: Shard, failure: Failure) -> None:
        spec = part.requirement.spec
        if not isinstance(spec, RowSpec):
            if not part.ended:
                part.todo.append(shard)
                self._try_again(part, failure)
            return
        name = f"{spec.name_of(shard[0])}, block {shard[1]}"
        failure = Failure(failure.failure_class, f"{name}: {failure.message}")
        part.errors.append(failure)
        if CLASSES[failure.failure_class].stops_after == 1:
            self._fail(part, failure)  # further shards could not be stored

    def _on_death(self, pool: Pool, actors: Actors, problem: Exception) -> None:
        """Take back the rows of a stream that has failed, as when its actors cannot start."""
        parts = dict.fromkeys(actors.rows.values())
        self._remove(pool, actors)
        for part in parts:
            if not part.ended:
                is_counted = not part.is_row or actors.last == inf  # nothing was made
                self._try_again(part, failure_of(problem), is_counted)

    def _end_complete(self, part: Part) -> None:
        """End a part whose shards have all been made, or have failed."""
        self.store.refresh_listings()
        missing = len(part.requirement.missing(self.store)) if part.is_row else 0
        if not missing:
            self._end(part)
            return
        messages = [error.message for error in part.errors[:3]]
        names = [error.failure_class for error in part.errors] or ["infra"]
        blocks = "1 block is" if missing == 1 else f"{missing} blocks are"
        reason = "; ".join(messages or ["the cluster lost them; run again"])
        name = max(set(names), key=names.count)
        self._fail(part, Failure(name, f"{blocks} missing; {reason}"))

    def _try_again(self, part: Part, failure: Failure, is_counted: bool = True) -> None:
        """Report a failure that is retried, or the end of a part that has no try left. The store
        counts the processes that a shard has killed."""
        name = failure.failure_class
        part.tries[name] += is_counted
        if part.tries[name] > CLASSES[name].retries:
            self._fail(part, failure)
        else:
            self.listener.on_retried(part.requirement, failure)

    def _fail(self, part: Part, failure: Failure) -> None:
        """End a part that has failed, and those that depend on it."""
        self._end(part)
        others = [other.requirement for other in self.parts.values()]
        kept = {id(requirement) for requirement in independent_of([part.requirement], others)}
        for other in [*self.parts.values()]:
            if id(other.requirement) not in kept:
                self._end(other)
        self.listener.on_failed(part.requirement, failure)

    def _end(self, part: Part) -> None:
        part.ended = True
        part.todo.clear()
        self.parts.pop(_digest(part.requirement), None)

    # ---------------------------------------------------------------- starts

    def begin(self) -> None:
        """Begin the work for which the allocation has room, in the order of the queue."""
        self.allocation.preparing = bool(self.parts)
        self._end_lost()
        able = [part for part in self.parts.values() if part.can_begin()]
        kept = {kind: self._kept(pool, able) for kind, pool in self.pools.items()}
        waiting: list[Part] = []
        for part in able:
            pool = self.pools[part.kind]
            for actors in kept[part.kind] or ([] if part.is_row else pool.streams[:1]):
                self._fill(actors, part)
            if part.todo:
                waiting.append(part)
                if not (pool.streams or self.allocation.room(part.kind, not part.is_row)):
                    break  # what is needed later leaves it room
        for pool in self.pools.values():
            for actors in [each for each in pool.streams if not each.rows]:
                self._remove(pool, actors)
        self._grow(waiting)

    def _end_lost(self) -> None:
        """End streams that do not fit the cluster, since it has lost a machine: Ray would wait for
        room for their actors, and keep their rows. Those end that lose the least."""
        for pool in self.pools.values():
            while pool.size > self.allocation.fitting(pool.kind):
                self._remove(pool, min(pool.streams[::-1], key=lambda each: (each.long, each.size)))

    def _kept(self, pool: Pool, able: Iterable[Part]) -> list[Actors]:
        """The streams of a pool that get further shards."""
        capacity = self.allocation.capacity(pool.kind)
        parts = [part for part in able if part.kind == pool.kind]
        # Trials wait for a pool that ends soon, but not for images that only a picture shows.
        is_awaited = any(not part.requirement.compared_with for part in parts)
        left = _seconds(parts, pool.kind) / max(pool.size, 1)
        if pool.size <= capacity or (is_awaited and left <= MAX_POOL_WAIT):
            return [*pool.streams]
        sizes = accumulate(actors.size for actors in pool.streams)
        return [one for one, size in zip(pool.streams, sizes, strict=True) if size <= capacity]

    def _grow(self, waiting: Sequence[Part]) -> None:
        """Start the actors that pools may have for parts that wait, in the order of the queue,
        while the share of the work of each takes longer than its start."""
        sizes = self.allocation.pools
        seconds = {kind: _seconds(waiting, kind) for kind in self.pools}
        # Actors that share the work.
        free = {kind: pool.size - pool.long for kind, pool in self.pools.items()}
        full: set[Process] = set()
        for part in waiting:
            kind, wanted = part.kind, len(part.todo)
            start = PROCESS_START + self.pools[kind].loading
            while (
                wanted
                and kind not in full
                and (not free[kind] or seconds[kind] > start * free[kind])
                and self.allocation.room(kind, is_task=not part.is_row) > 0
            ):
                sizes[kind] += 1
                free[kind] += not part.is_long
                wanted -= 1
            if wanted and part.is_row:
                full.add(kind)
        for kind, pool in self.pools.items():
            if count := sizes[kind] - pool.size:
                self._start(pool, count, [part for part in waiting if part.kind == kind])

    def _start(self, pool: Pool, count: int, parts: Sequence[Part]) -> None:
        """Start actors, and release their first rows: those that fit beside trials in one stream,
        and the others in a second one, which ends when trials need their resources."""
        now = time.monotonic()
        pool.began = pool.began if pool.streams else now
        reserve = self.allocation.reserve() if pool.kind == "generator" else 0
        first = min(count, reserve - pool.size) if pool.size < reserve else count
        for size in filter(None, (first, count - first)):
            actors = Actors(self.workers.stream(pool.kind, size, self.specs), size, now)
            pool.streams.append(actors)
            for part in parts:
                self._fill(actors, part)
        pool.statistics.actors = max(pool.statistics.actors, pool.size)

    def _fill(self, actors: Actors, part: Part) -> None:
        while part.todo and actors.has_room():
            shards = part.take()
            row = Row(_digest(part.requirement), tuple(i for i, _ in shards), shards[0][1])
            part.running += 1
            actors.rows[row] = part
            self.listener.stage = part.requirement.stage
            actors.stream.release(row, part.tries["oom"])

    def _remove(self, pool: Pool, actors: Actors) -> None:
        """End a stream, and take back its rows."""
        pool.streams.remove(actors)
        actors.stream.end()
        for row, part in actors.rows.items():
            part.running -= 1
            if not part.ended:
                part.todo += [(index, row.block) for index in reversed(row.indices)]
        self.ending = [each for each in self.ending if each[0].is_alive()]
        self.ending.append((actors.stream, time.monotonic()))
        self.allocation.pools[pool.kind] = pool.size
        statistics, now = pool.statistics, time.monotonic()
        statistics.held += actors.size * (now - actors.started)
        if not pool.streams:
            statistics.seconds = now - pool.began
            if statistics.images or statistics.pairs:
                self.listener.on_pool_closed(statistics)
            pool.statistics = PoolStatistics(pool.kind, statistics.gpu)


def _digest(requirement: Requirement) -> str:
    return artifact_key(requirement.spec).digest


def _seconds(parts: Iterable[Part], kind: Process) -> float:
    """Seconds that one process of a kind would take for what has not begun."""
    return sum(part.seconds_left() for part in parts if part.kind == kind)
