"""Picks the trial that runs next. Knows no Ray and no tracker.

The missing seeds of a point are one job as far as they are trained in one computation (`replicas`);
a seed that is not is a job of its own. What the store has is reused; what another job is computing
is waited for. So one computation runs once, and what runs was planned.
What fails is tried again as its class allows (`failures`), as a job of its own.

Where a search prunes, a point comes to its end in legs. Each ends at a rung; there it waits for the
other points of its round, and then the rule says who goes on (`pruning`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

from air_core.specs import TrialSpec
from orchestrator.failures import CLASSES, Failure
from orchestrator.planning import Outcome, Resolver, Slot
from orchestrator.planning.plan import ended_slots, iterations_of, moved_slots, slots_of
from orchestrator.planning.pruning import pruned
from orchestrator.planning.studies import Pruned
from orchestrator.planning.studies import searches as fold_searches
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.space import Point, study_name
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.stages.side_by_side import side_by_side
from orchestrator.stages.trial import WHOLE, Segments, is_over
from orchestrator.store import ArtifactStore, EventLog, read_trial
from orchestrator.store.checkpoints import rungs_of


@dataclass(frozen=True)
class Job:
    """Trials of one point that one actor has to run.

    `halvings`: how often fewer images than usual go through a tower at a time.
    """

    number: int
    cell: str
    point: int
    trials: tuple[TrialSpec, ...]
    keys: tuple[str, ...]
    slots: tuple[str, ...]
    halvings: int = 0
    segments: Segments = WHOLE
    share: float = 1.0  # of the work of whole trials


@dataclass
class _Going:
    """A point on its way."""

    point: Point
    slots: dict[str, Slot]
    rungs: list[int]  # where it is still to be compared
    passed: int = 0  # iterations that its trials have behind them
    pending: set[str] = field(default_factory=set)  # slots that are under way to the next stop
    here: dict[str, float] = field(default_factory=dict)  # objectives at that stop
    ends: dict[str, float | None] = field(default_factory=dict)  # of trials that are over

    @property
    def until(self) -> int | None:
        return self.rungs[0] if self.rungs else None

    @property
    def share(self) -> float:
        """Of all the work, what lies before the next stop."""
        whole = iterations_of(self.slots.values())
        return ((self.until or whole) - self.passed) / whole if whole else 1.0

    def value_here(self) -> float | None:
        """Mean objective at this rung; None: a trial failed, and the point cannot be compared."""
        return fmean(self.here.values()) if len(self.here) == len(self.slots) else None

    def value(self) -> float | None:
        """Mean objective of its trials; None: one of them has none."""
        values = [value for value in self.ends.values() if value is not None]
        return fmean(values) if values and len(values) == len(self.ends) else None


class _CellQueue:
    """One cell's rounds."""

    def __init__(self, cell: Cell, search: Any) -> None:
        self.cell, self.search = cell, search
        self.asked: deque[Point] = deque()
        self.ready: deque[_Going] = deque()  # with a leg that can start
        self.open: dict[int, _Going] = {}
        self.compared: list[_Going] = []  # came to a rung and wait for the others
        self.told: dict[int, float | None] = {}
        self.stopped: dict[int, Pruned] = {}
        self.handed = 0
        self.ended = False

    @property
    def waits(self) -> bool:
        """Is there nothing in it that runs or could start?"""
        return not (self.asked or self.ready or self.open)

    def ask(self, event_log: EventLog) -> None:
        """Tell a round that is over and ask the next one."""
        if self.search is None:
            if self.handed:
                self.ended = True
            else:
                self.asked.append(Point(0, {}))
            return
        if self.told or self.stopped:
            told = dict(sorted(self.told.items()))
            stopped = {n: (one.rung, one.value) for n, one in sorted(self.stopped.items())}
            self.search.record_round(told, stopped)
            values = {str(point): value for point, value in told.items()}
            more = {"pruned": list(stopped)} if stopped else {}
            event_log.append("round_told", cell=self.cell.id, values=values, **more)
            self.told, self.stopped = {}, {}
        self.asked.extend(self.search.next_round())
        self.ended = not self.asked


class TrialScheduler:
    """Hands out jobs and takes their results.

    Args:
        cells: in the order in which they should come.
        searches: a CellSearch for each cell that has a space.
        on_outcome: called once per slot, as soon as its outcome is known.
        within_budget: asked before each job, with the (cell, trials) of all jobs that would be
            under way, the new one last; once it says no, nothing more is handed out.
        hopeless: why a trial cannot run, such as an input that could not be made.
        given_up: failures by slot that are not tried again.
        ready: is what a cell reads there by now?
        rank: of cells, by id; a lower one comes first.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        cells: Sequence[Cell],
        searches: Mapping[str, Any],
        store: ArtifactStore,
        resolver: Resolver,
        event_log: EventLog,
        on_outcome: Callable[[Outcome], None],
        within_budget: Callable[[Sequence[tuple[str, float]]], bool] = lambda under_way: True,
        failed_requirements: Callable[[TrialSpec], Failure | None] = lambda spec: None,
        given_up: Mapping[str, Failure] = MappingProxyType({}),
        ready: Callable[[Cell], bool] = lambda cell: True,
        rank: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.sweep, self.store, self.resolver = sweep, store, resolver
        self.event_log, self.on_outcome = event_log, on_outcome
        self.assignments = sweep.seeds.assignments()
        self.objective = sweep.search.objective if sweep.search else None
        self.rungs = sweep.search.rungs if sweep.search else ()
        self.queues = [_CellQueue(cell, searches.get(cell.id)) for cell in cells]
        self.found = fold_searches(event_log)
        self.finished_before = ended_slots(event_log)
        self.jobs = 0
        self.within_budget, self.stopped = within_budget, False
        self.failed_requirements, self.given_up = failed_requirements, given_up
        self.ready, self.rank = ready, rank
        self.device = "cuda" if sweep.resources.trial.gpu else "cpu"
        self.memory_share = sweep.resources.encoder.batch / ENCODER_BATCH
        self.moved = moved_slots(event_log)
        self.queued: deque[Job] = deque()  # not handed out yet
        self.tries: Counter[tuple[str, str]] = Counter()  # by trial key and failure class
        self.errors: Counter[Failure] = Counter()  # of classes that can stop a sweep
        self.moving: list[Slot] = []  # will go on in fp32, with inputs that are not there yet
        self.running: dict[int, Job] = {}
        # By trial key and the rung that it runs to.
        self.waiting: dict[tuple[str, int | None], list[tuple[_CellQueue, int, Slot]]] = {}

    @property
    def finished(self) -> bool:
        if self.stopped:
            return not self.running
        return all(queue.ended for queue in self.queues)

    def out_of_budget(self) -> bool:
        """Was a point held back because the budget was spent?"""
        return self.stopped and not self.gave_up()

    def gave_up(self) -> Failure | None:
        """What went wrong so often that no more was tried."""
        for failure, count in self.errors.items():
            if count >= CLASSES[failure.failure_class].stops_after:
                return failure
        return None

    @property
    def under_way(self) -> int:
        """Jobs that were handed out and have not ended."""
        return len(self.running)

    def peek(self) -> Job | None:
        """The job that `next` will hand out; None: none until a running job ends, or `finished`."""
        if self.gave_up():
            self.stopped = True
        while not self.queued and not self.stopped:
            ready = [queue for queue in self.queues if self.ready(queue.cell)]
            for queue in ready:
                if not queue.ended and queue.waits:
                    self._decide(queue)
                    if queue.waits:
                        queue.ask(self.event_log)
                        self._note_early_end(queue)
            able = [queue for queue in ready if queue.asked or queue.ready]
            if not able:
                break
            # Of those that come first, the furthest behind.
            self._start(min(able, key=lambda one: (self.rank.get(one.cell.id, 0), one.handed)))
        return self.queued[0] if self.queued and not self.stopped else None

    def next(self) -> Job | None:
        """Hand out a job; None: as `peek`."""
        job = self.peek()
        if job is not None:
            self.running[job.number] = self.queued.popleft()
            self.event_log.append("trials_started", slots=list(job.slots))
        return job

    def _decide(self, queue: _CellQueue) -> None:
        """All points of a round have come to a rung: who goes on?

        What was decided is in the ledger before anything follows from it.
        """
        search = self.sweep.search
        compared = sorted(queue.compared, key=lambda going: going.point.number)
        queue.compared = []
        for rung in sorted({going.rungs[0] for going in compared}):
            assert search is not None
            assert search.pruning is not None
            here = [going for going in compared if going.rungs[0] == rung]
            values = {
                going.point.number: value
                for going in here
                if (value := going.value_here()) is not None
            }
            study = study_name(queue.cell, search)
            earlier = self.found.rungs.get(study, {}).get(rung, {}).values()
            stopped = pruned(search.pruning, values, earlier)
            if values:
                named = {str(number): value for number, value in values.items()}
                what = {"study": study, "rung": rung, "values": named, "pruned": list(stopped)}
                self.event_log.append("rung_decided", cell=queue.cell.id, **what)
                self.found.record_rung(study, rung, named, stopped)
            for going in here:
                if going.point.number in stopped:
                    self._prune(queue, going)
                else:
                    going.rungs.pop(0)
                    going.passed, going.here = rung, {}
                    queue.ready.append(going)

    def _prune(self, queue: _CellQueue, going: _Going) -> None:
        stop = self.found.pruned_of(queue.cell, self.sweep.search)[going.point.number]
        queue.stopped[going.point.number] = stop
        for slot in going.slots.values():
            if slot.id not in going.ends:
                _, seconds = rungs_of(slot.spec, self.store)
                known = self.finished_before.get(slot.id) == (slot.key.digest, "pruned")
                outcome = Outcome(slot, "pruned", pruned=stop, seconds=seconds, known=known)
                self.on_outcome(outcome)

    def _note_early_end(self, queue: _CellQueue) -> None:
        """Patience ended a search: what was planned beyond it will not be asked."""
        search = self.sweep.search
        planned = self.found.points(queue.cell, search)
        if search is not None and queue.ended and queue.handed < planned:
            self.event_log.append(
                "search_ended",
                cell=queue.cell.id,
                study=study_name(queue.cell, search),
                points=queue.handed,
                patience=search.patience,
                trials_left=(planned - queue.handed) * len(self.assignments),
            )

    def complete(self, number: int, failures: Mapping[str, Failure]) -> None:
        """A job ended: what is in `failures` failed, the rest has a record.

        Args:
            number: of the job.
            failures: by trial key.
        """
        job = self.running.pop(number)
        for key, spec in zip(job.keys, job.trials, strict=True):
            failure = failures.get(key)
            if failure is not None and self._try_again(job, key, spec, failure):
                continue
            waiting = self.waiting.pop((key, job.segments.until))
            for place, (queue, point, slot) in enumerate(waiting):
                if failure is not None:
                    self._fail(queue, point, slot, failure)
                elif job.segments.until is not None:
                    self._reach(queue, point, slot)
                else:
                    state: Literal["done", "reused"] = "done" if place == 0 else "reused"
                    record = read_trial(slot.spec, self.store)
                    self._settle(queue, point, Outcome(slot, state, record))

    def _try_again(self, job: Job, key: str, spec: TrialSpec, failure: Failure) -> bool:
        name = failure.failure_class
        if CLASSES[name].stops_after:
            self.errors[failure] += 1
        # In fp32 a loss that is not finite would be so again, and below it is another trial.
        allowed = 0 if name == "nan" else CLASSES[name].retries
        slots = [slot for _, _, slot in self.waiting[key, job.segments.until]]
        if name == "nan" and spec.precision != "fp32":
            for slot in slots:
                self.event_log.append("trial_moved", slot=slot.id, key=key, precision="fp32")
            self.moving += slots
        if self.stopped or self.tries[key, name] >= allowed:
            return False
        self.tries[key, name] += 1
        self.event_log.append(
            "trial_retried",
            slots=[slot.id for slot in slots],
            key=key,
            failure_class=name,
            message=failure.message,
            attempt=self.tries[key, name],
        )
        again = {key: slots[0]}
        self._queue(
            job.cell, job.point, again, job.segments, job.share, job.halvings + (name == "oom")
        )
        return True

    def _fail(self, queue: _CellQueue, point: int, slot: Slot, failure: Failure) -> None:
        known = slot.id in self.given_up
        name, message = failure.failure_class, failure.message
        outcome = Outcome(slot, "failed", failure_class=name, message=message, known=known)
        self._settle(queue, point, outcome)

    def _start(self, queue: _CellQueue) -> None:
        """Start the next leg of a cell's next point: settle what is known, wait for what runs,
        queue the rest. A point that is over the budget is left where it is."""
        if not queue.ready:
            queue.ready.append(self._going(queue, queue.asked.popleft()))
        going = queue.ready[0]
        number, until = going.point.number, going.until
        if number in self.found.pruned_of(queue.cell, self.sweep.search):
            queue.ready.popleft()
            queue.handed += 1
            self._prune(queue, going)
            return
        slots = [slot for slot in going.slots.values() if slot.id not in going.ends]
        if not self._affordable(queue.cell, slots, going):
            self.stopped = True
            return
        queue.ready.popleft()
        if not going.passed:
            queue.handed += 1
            if queue.search is not None:
                self._log(queue.cell, going.point)
        queue.open[number] = going
        going.pending = {slot.id for slot in slots}
        run: dict[str, Slot] = {}
        for slot in slots:
            key = slot.key.digest
            if (key, until) in self.waiting:
                self.waiting[key, until].append((queue, number, slot))
            elif is_over(slot.spec, self.store, until):
                self._know(queue, number, slot)
            elif (
                failure := self.given_up.get(slot.id) or self.failed_requirements(slot.spec)
            ) is not None:
                self._fail(queue, number, slot, failure)
            else:
                run[key] = slot
                self.waiting[key, until] = [(queue, number, slot)]
        by_spec = {slot.spec: (key, slot) for key, slot in run.items()}
        for group in side_by_side(list(by_spec), self.device, self.memory_share):
            together = dict(by_spec[spec] for spec in group)
            self._queue(queue.cell.id, number, together, Segments(self.rungs, until), going.share)

    def _queue(
        self,
        cell: str,
        point: int,
        run: Mapping[str, Slot],
        segments: Segments,
        share: float,
        halvings: int = 0,
    ) -> None:
        self.jobs += 1
        slots = tuple(slot.id for slot in run.values())
        trials = tuple(slot.spec for slot in run.values())
        job = Job(self.jobs, cell, point, trials, tuple(run), slots, halvings, segments, share)
        self.queued.append(job)

    def _going(self, queue: _CellQueue, point: Point) -> _Going:
        """A point at its start, or where it was when an earlier driver ended."""
        found = slots_of(
            queue.cell, point.number, point.params, self.assignments, self.resolver, self.moved
        )
        going = _Going(point, {slot.id: slot for slot in found}, [])
        if self.rungs and not point.told:
            last = iterations_of(found)
            search, number = self.sweep.search, point.number
            going.rungs = self.found.rungs_left(queue.cell, search, number, last)
        return going

    def _know(self, queue: _CellQueue, point: int, slot: Slot) -> None:
        """A trial need not run: it is where it should come to."""
        if queue.open[point].until is not None:
            self._reach(queue, point, slot)
            return
        before, state = self.finished_before.get(slot.id, ("", ""))
        known = before == slot.key.digest and state in ("done", "reused")
        record = read_trial(slot.spec, self.store)
        done = known and state == "done"
        self._settle(queue, point, Outcome(slot, "done" if done else "reused", record, known=known))

    def _affordable(self, cell: Cell, slots: Sequence[Slot], going: _Going) -> bool:
        """May what this leg of a point lacks be started, beside what runs?"""
        trials = {slot.key.digest: slot.spec for slot in slots}
        new = sum(
            (key, going.until) not in self.waiting and not is_over(spec, self.store, going.until)
            for key, spec in trials.items()
        )
        running = [(job.cell, len(job.trials) * job.share) for job in self.running.values()]
        return not new or self.within_budget([*running, (cell.id, new * going.share)])

    def _log(self, cell: Cell, point: Point) -> None:
        assert self.sweep.search is not None
        study = study_name(cell, self.sweep.search)
        known = self.found.suggested.setdefault(study, {})
        if point.number not in known:
            known[point.number] = dict(point.params)
            self.event_log.append(
                "point_asked",
                cell=cell.id,
                study=study,
                point=point.number,
                params=known[point.number],
            )

    def _reach(self, queue: _CellQueue, point: int, slot: Slot) -> None:
        """A trial came to the rung where its point waits for the others."""
        going = queue.open[point]
        rung = going.until
        assert rung is not None
        assert self.objective is not None
        rungs, _ = rungs_of(slot.spec, self.store)
        going.here[slot.id] = rungs[rung][self.objective]
        self.event_log.append("rung_reached", slot=slot.id, key=slot.key.digest, rung=rung)
        self._leave(queue, going, slot)

    def _settle(self, queue: _CellQueue, point: int, outcome: Outcome) -> None:
        self.on_outcome(outcome)
        going, record = queue.open[point], outcome.record
        objective = record.objectives[self.objective] if record and self.objective else None
        going.ends[outcome.slot.id] = objective
        self._leave(queue, going, outcome.slot)

    def _leave(self, queue: _CellQueue, going: _Going, slot: Slot) -> None:
        """A slot is no longer under way; the last one ends the leg of its point."""
        going.pending.discard(slot.id)
        if going.pending:
            return
        del queue.open[going.point.number]
        if len(going.ends) == len(going.slots):
            queue.told[going.point.number] = going.value()
        else:
            queue.compared.append(going)
