"""Which trial runs next, and who waits for whom. Knows no Ray and no tracker.

One job is one point: the trials of its seeds that are missing. What the store has is reused; what
another job is computing is waited for. So one computation runs once, and what runs was planned.
What fails is tried again as its class allows (`failures`), as a job of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

from air_core.specs import TrialSpec
from orchestrator.failures import CLASSES, Failure
from orchestrator.ledger import Ledger
from orchestrator.plan import Slot, finished_slots, moved_slots, slots_of
from orchestrator.resolve import Resolver
from orchestrator.space import Point, study_name
from orchestrator.store import ArtifactStore
from orchestrator.studies import searches as fold_searches
from orchestrator.sweep import Cell, SweepSpec
from orchestrator.trial import TrialRecord, read_trial


@dataclass(frozen=True)
class Outcome:
    """What became of a slot."""

    slot: Slot
    state: Literal["done", "reused", "failed"]
    record: TrialRecord | None = None
    failure_class: str | None = None
    message: str = ""
    known: bool = False  # the ledger said so already


@dataclass(frozen=True)
class Job:
    """Trials of one point that somebody has to run.

    `halvings`: how often fewer images than usual go through a tower at a time.
    """

    number: int
    cell: str
    point: int
    trials: tuple[TrialSpec, ...]
    keys: tuple[str, ...]
    slots: tuple[str, ...]
    halvings: int = 0


@dataclass
class _OpenPoint:
    slots: dict[str, Slot]
    pending: set[str]
    values: list[float | None] = field(default_factory=list)


class _CellQueue:
    """One cell's rounds."""

    def __init__(self, cell: Cell, search: Any) -> None:
        self.cell, self.search = cell, search
        self.queue: deque[Point] = deque()
        self.open: dict[int, _OpenPoint] = {}
        self.told: dict[int, float | None] = {}
        self.handed = 0
        self.ended = False

    def fill(self, ledger: Ledger) -> None:
        """Tell a round that is over and ask the next one."""
        if self.queue or self.open:
            return
        if self.search is None:
            if self.handed:
                self.ended = True
            else:
                self.queue.append(Point(0, {}))
            return
        if self.told:
            told = dict(sorted(self.told.items()))
            self.search.tell_round(told)
            values = {str(point): value for point, value in told.items()}
            ledger.append("round_told", cell=self.cell.id, values=values)
            self.told = {}
        self.queue.extend(self.search.next_round())
        self.ended = not self.queue


class Dispatcher:
    """Hands out jobs and takes their results.

    Args:
        cells: in the order in which they should come.
        searches: a CellSearch for each cell that has a space.
        on_outcome: called once per slot, as soon as its outcome is known.
        within_budget: asked before each job, with the (cell, trials) of all jobs that would be
            under way, the new one last; once it says no, nothing more is handed out.
        hopeless: why a trial cannot run, such as an input that could not be made.
        given_up: failures by slot that are not tried again.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        cells: Sequence[Cell],
        searches: Mapping[str, Any],
        store: ArtifactStore,
        resolver: Resolver,
        ledger: Ledger,
        on_outcome: Callable[[Outcome], None],
        within_budget: Callable[[Sequence[tuple[str, int]]], bool] = lambda under_way: True,
        hopeless: Callable[[TrialSpec], Failure | None] = lambda spec: None,
        given_up: Mapping[str, Failure] = MappingProxyType({}),
    ) -> None:
        self.sweep, self.store, self.resolver = sweep, store, resolver
        self.ledger, self.on_outcome = ledger, on_outcome
        self.assignments = sweep.seeds.assignments()
        self.objective = sweep.search.objective if sweep.search else None
        self.queues = [_CellQueue(cell, searches.get(cell.id)) for cell in cells]
        self.by_cell = {queue.cell.id: queue for queue in self.queues}
        self.found = fold_searches(ledger)
        self.finished_before = finished_slots(ledger)
        self.jobs = 0
        self.ahead: Job | None = None
        self.within_budget, self.stopped = within_budget, False
        self.hopeless, self.given_up = hopeless, given_up
        self.moved = moved_slots(ledger)
        self.again: deque[Job] = deque()
        self.tries: Counter[tuple[str, str]] = Counter()  # by trial key and failure class
        self.errors: Counter[Failure] = Counter()  # of classes that can stop a sweep
        self.moving: list[Slot] = []  # will go on in fp32, with inputs that are not there yet
        self.running: dict[int, Job] = {}
        self.waiting: dict[str, list[tuple[_CellQueue, int, Slot]]] = {}

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

    def peek(self) -> Job | None:
        """What `next` will hand out, for who only wants to know whether there is anything."""
        if self.ahead is None:
            self.ahead = self._find()
        return self.ahead

    def next(self) -> Job | None:
        """A job, or None: nothing to hand out until a running job ends (or `finished`)."""
        job, self.ahead = self.peek(), None
        if job is not None:
            self.ledger.append("trials_started", slots=list(job.slots))
        return job

    def _find(self) -> Job | None:
        if self.gave_up():
            self.stopped = True
        if self.again and not self.stopped:
            job = self.again.popleft()
            self.running[job.number] = job
            return job
        while not self.stopped:
            for queue in self.queues:
                if not queue.ended:
                    queue.fill(self.ledger)
                    self._note_early_end(queue)
            ready = [queue for queue in self.queues if queue.queue]
            if not ready:
                # Telling a round may have ended a cell without any job.
                return None
            queue = min(ready, key=lambda one: one.handed)  # the furthest behind first
            found = self._open(queue, queue.queue[0])
            if found is not None:
                return found
        return None

    def _note_early_end(self, queue: _CellQueue) -> None:
        """Patience ended a search: what was planned beyond it will not be asked."""
        search = self.sweep.search
        planned = self.found.points(queue.cell, search)
        if search is not None and queue.ended and queue.handed < planned:
            self.ledger.append(
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
            for place, (queue, point, slot) in enumerate(self.waiting.pop(key)):
                if failure is not None:
                    self._fail(queue, point, slot, failure)
                    continue
                state: Literal["done", "reused"] = "done" if place == 0 else "reused"
                self._settle(queue, point, Outcome(slot, state, read_trial(slot.spec, self.store)))

    def _try_again(self, job: Job, key: str, spec: TrialSpec, failure: Failure) -> bool:
        name = failure.failure_class
        if CLASSES[name].stops_after:
            self.errors[failure] += 1
        # In fp32 a loss that is not finite would be so again, and below it is another trial.
        allowed = 0 if name == "nan" else CLASSES[name].retries
        slots = [slot for _, _, slot in self.waiting[key]]
        if name == "nan" and spec.precision != "fp32":
            for slot in slots:
                self.ledger.append("trial_moved", slot=slot.id, key=key, precision="fp32")
            self.moving += slots
        if self.stopped or self.tries[key, name] >= allowed:
            return False
        self.tries[key, name] += 1
        self.ledger.append(
            "trial_retried",
            slots=[slot.id for slot in slots],
            key=key,
            failure_class=name,
            message=failure.message,
            attempt=self.tries[key, name],
        )
        self.jobs += 1
        halvings = job.halvings + (name == "oom")
        self.again.append(
            replace(
                job,
                number=self.jobs,
                trials=(spec,),
                keys=(key,),
                slots=(slots[0].id,),
                halvings=halvings,
            )
        )
        return True

    def _fail(self, queue: _CellQueue, point: int, slot: Slot, failure: Failure) -> None:
        known = slot.id in self.given_up
        name, message = failure.failure_class, failure.message
        outcome = Outcome(slot, "failed", failure_class=name, message=message, known=known)
        self._settle(queue, point, outcome)

    def _open(self, queue: _CellQueue, point: Point) -> Job | None:
        """Start a point: settle what is known, wait for what runs, hand out the rest.

        None: there is no job in it, or it is over the budget and was left where it is.
        """
        cell = queue.cell
        slots = slots_of(
            cell, point.number, point.params, self.assignments, self.resolver, self.moved
        )
        if not self._affordable(cell, slots):
            self.stopped = True
            return None
        queue.queue.popleft()
        queue.handed += 1
        if queue.search is not None:
            self._log(cell, point)
        queue.open[point.number] = _OpenPoint(
            {slot.id: slot for slot in slots}, {slot.id for slot in slots}
        )
        run: dict[str, Slot] = {}
        for slot in slots:
            key = slot.key.digest
            if key in self.waiting:
                self.waiting[key].append((queue, point.number, slot))
            elif self.store.has(slot.spec):
                before, state = self.finished_before.get(slot.id, ("", ""))
                known = before == key
                record = read_trial(slot.spec, self.store)
                done = known and state == "done"
                outcome = Outcome(slot, "done" if done else "reused", record, known=known)
                self._settle(queue, point.number, outcome)
            elif (failure := self.given_up.get(slot.id) or self.hopeless(slot.spec)) is not None:
                self._fail(queue, point.number, slot, failure)
            else:
                run[key] = slot
                self.waiting[key] = [(queue, point.number, slot)]
        if not run:
            return None
        self.jobs += 1
        job = Job(
            self.jobs,
            cell.id,
            point.number,
            tuple(slot.spec for slot in run.values()),
            tuple(run),
            tuple(slot.id for slot in run.values()),
        )
        self.running[job.number] = job
        return job

    def _affordable(self, cell: Cell, slots: Sequence[Slot]) -> bool:
        """May what this point lacks be started, beside what runs?"""
        trials = {slot.key.digest: slot.spec for slot in slots}
        new = sum(
            key not in self.waiting and not self.store.has(spec) for key, spec in trials.items()
        )
        running = [(job.cell, len(job.trials)) for job in self.running.values()]
        return not new or self.within_budget([*running, (cell.id, new)])

    def _log(self, cell: Cell, point: Point) -> None:
        assert self.sweep.search is not None
        study = study_name(cell, self.sweep.search)
        known = self.found.asked.setdefault(study, {})
        if point.number not in known:
            known[point.number] = dict(point.params)
            self.ledger.append(
                "point_asked",
                cell=cell.id,
                study=study,
                point=point.number,
                params=known[point.number],
            )

    def _settle(self, queue: _CellQueue, point: int, outcome: Outcome) -> None:
        self.on_outcome(outcome)
        opened = queue.open[point]
        opened.pending.discard(outcome.slot.id)
        record = outcome.record
        if self.objective is not None:
            opened.values.append(record.objectives[self.objective] if record else None)
        if opened.pending:
            return
        values = [value for value in opened.values if value is not None]
        whole = bool(values) and len(values) == len(opened.values)
        queue.told[point] = fmean(values) if whole else None
        del queue.open[point]
