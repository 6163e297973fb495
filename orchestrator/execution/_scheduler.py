"""Trial scheduler: picks the job that runs next. Does not depend on Ray or a tracker.

A job is the missing seeds of one point that can be trained in one computation (`side_by_side`);
other seeds of the point are separate jobs. Results in the store are reused. A trial that
another job is computing is not started twice: its slot waits for that job. Failures are retried as
their class allows (`failures`), each as a separate job.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from orchestrator.failures import CLASSES, Failure
from orchestrator.planning import Outcome, Resolver, Slot
from orchestrator.planning.history import History
from orchestrator.planning.ledger import lines_of
from orchestrator.planning.plan import PlannedSlot, slots_of
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.resources import ENCODER_BATCH
from orchestrator.spec.space import Point, study_name
from orchestrator.stages import TrialSpec
from orchestrator.stages.trial import side_by_side
from orchestrator.store import ArtifactStore, EventLog, read_trial


@dataclass(frozen=True)
class Job:
    """Trials of one point that one actor runs.

    `halvings`: how often the number of images in one pass of a tower is halved.
    """

    number: int
    cell: str
    point: int
    trials: tuple[TrialSpec, ...]
    keys: tuple[str, ...]
    slots: tuple[str, ...]
    halvings: int = 0


class _CellQueue:
    """Points of one cell, round after round."""

    def __init__(self, cell: Cell, group: int, search: Any) -> None:
        self.cell, self.group, self.search = cell, group, search
        self.new: deque[Point] = deque()  # points of the round that have not started
        # Objectives of the trials of a running point that have ended; None: it has none.
        self.running: dict[int, list[float | None]] = {}
        self.finished: dict[int, float | None] = {}  # objectives of the round
        self.started = 0  # points, over all rounds
        self.ended = False

    def next_round(self) -> None:
        """Pass the results of the finished round to the search, and get the next round."""
        if self.search is None:
            if self.started:
                self.ended = True
            else:
                self.new.append(Point(0, {}))
            return
        if self.finished:
            self.search.record_round(self.finished)
            self.finished = {}
        self.new.extend(self.search.next_round())
        self.ended = not self.new


class TrialScheduler:
    """Selects jobs and processes their results.

    Args:
        groups: cells that read the same images; cells of earlier groups run first.
        searches: a CellSearch for each cell that has a search space.
        on_outcome: called once for each slot, as soon as its outcome is known.
        failed_dependency: returns the failure of an input because of which a trial cannot run.
        is_ready: returns whether all inputs of a cell exist.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        groups: Sequence[Sequence[Cell]],
        searches: Mapping[str, Any],
        store: ArtifactStore,
        resolver: Resolver,
        event_log: EventLog,
        history: History,
        on_outcome: Callable[[Outcome], None],
        failed_dependency: Callable[[TrialSpec], Failure | None] = lambda spec: None,
        is_ready: Callable[[Cell], bool] = lambda cell: True,
    ) -> None:
        self.sweep, self.store, self.resolver = sweep, store, resolver
        self.event_log, self.on_outcome = event_log, on_outcome
        self.assignments = sweep.seeds.assignments()
        self.objective = sweep.search.objective if sweep.search else None
        self.queues = [
            _CellQueue(cell, index, searches.get(cell.id))
            for index, cells in enumerate(groups)
            for cell in cells
        ]
        self.history = history
        self.job_count = 0
        self.failed_dependency = failed_dependency
        self.is_ready = is_ready
        self.device = "cuda" if sweep.resources.trial.gpu else "cpu"
        self.memory_share = sweep.resources.encoder.batch / ENCODER_BATCH
        self.queued: deque[Job] = deque()  # not started yet
        self.tries: Counter[tuple[str, str]] = Counter()  # by trial key and failure class
        self.errors: Counter[Failure] = Counter()  # of classes that can stop a sweep
        self.running: dict[int, Job] = {}
        # Slots whose trials run, each with its point: by trial key.
        self.waiting: dict[str, list[tuple[_CellQueue, int, PlannedSlot]]] = {}

    @property
    def is_complete(self) -> bool:
        if self.stopping_failure():
            return not self.running
        return all(queue.ended for queue in self.queues)

    def stopping_failure(self) -> Failure | None:
        """The failure that stops the sweep because it occurred too often, if any."""
        for failure, count in self.errors.items():
            if count >= CLASSES[failure.failure_class].stops_after:
                return failure
        return None

    def peek(self) -> Job | None:
        """The job that `next` would return. None: no job can start until a running job ends, or
        the scheduler `is_complete`."""
        if self.stopping_failure():
            return None
        while not self.queued:
            ready = [queue for queue in self.queues if self.is_ready(queue.cell)]
            for queue in ready:
                if not (queue.ended or queue.new or queue.running):
                    queue.next_round()
            able = [queue for queue in ready if queue.new]
            if not able:
                break
            # Among the cells of the first group, the one with the fewest started points.
            self._start_point(min(able, key=lambda queue: (queue.group, queue.started)))
        return self.queued[0] if self.queued else None

    def next(self) -> Job | None:
        """Return the next job and count it as running; None as for `peek`."""
        job = self.peek()
        if job is not None:
            self.running[job.number] = self.queued.popleft()
            self.event_log.append("trials_started", slots=list(job.slots))
        return job

    def running_slots(self) -> dict[str, Slot]:
        """The slots whose trials are running, by id."""
        keys = (key for job in self.running.values() for key in job.keys)
        return {slot.id: slot for key in keys for _, _, slot in self.waiting.get(key, ())}

    def complete(self, number: int, failures: Mapping[str, Failure]) -> None:
        """Process the end of a job: trials in `failures` failed, all others have a record.

        Args:
            number: of the job.
            failures: by trial key.
        """
        job = self.running.pop(number)
        for key in job.keys:
            failure = failures.get(key)
            if failure is not None and self._retry(job, key, failure):
                continue
            for index, (queue, point, slot) in enumerate(self.waiting.pop(key)):
                if failure is not None:
                    self._fail(queue, point, slot, failure)
                else:
                    state: Literal["done", "reused"] = "done" if index == 0 else "reused"
                    record = read_trial(slot.spec, self.store)
                    self._finish(queue, point, Outcome(slot, state, record))

    # ---------------------------------------------------------------- starting points

    def _start_point(self, queue: _CellQueue) -> None:
        """Start a cell's next point: reuse stored trials, wait for trials that another job runs,
        and queue the others."""
        point = queue.new.popleft()
        slots = slots_of(queue.cell, point.number, point.params, self.assignments, self.resolver)
        queue.started += 1
        if queue.search is not None:
            self._log_point(queue.cell, point, slots)
        queue.running[point.number] = []
        to_run: dict[TrialSpec, PlannedSlot] = {}
        for slot in slots:
            key = slot.key.digest
            if key in self.waiting:
                self.waiting[key].append((queue, point.number, slot))
            elif self.store.has(slot.spec):
                self._reuse(queue, point.number, slot)
            elif (failure := self.failed_dependency(slot.spec)) is not None:
                self._fail(queue, point.number, slot, failure)
            else:
                to_run[slot.spec] = slot
                self.waiting[key] = [(queue, point.number, slot)]
        for group in side_by_side(list(to_run), self.device, self.memory_share):
            self._queue_job(queue.cell.id, point.number, [to_run[spec] for spec in group])

    def _log_point(self, cell: Cell, point: Point, slots: Sequence[Slot]) -> None:
        assert self.sweep.search is not None
        study = study_name(cell, self.sweep.search)
        logged = self.history.suggested.setdefault(study, {})
        if point.number not in logged:
            params = logged[point.number] = dict(point.params)
            fields = {"study": study, "point": point.number, "params": params}
            self.event_log.append("point_asked", cell=cell.id, **fields, slots=lines_of(slots))

    def _queue_job(
        self, cell: str, point: int, slots: Sequence[PlannedSlot], halvings: int = 0
    ) -> None:
        self.job_count += 1
        self.queued.append(
            Job(
                number=self.job_count,
                cell=cell,
                point=point,
                trials=tuple(slot.spec for slot in slots),
                keys=tuple(slot.key.digest for slot in slots),
                slots=tuple(slot.id for slot in slots),
                halvings=halvings,
            )
        )

    # ---------------------------------------------------------------- results of trials

    def _reuse(self, queue: _CellQueue, point: int, slot: PlannedSlot) -> None:
        """Reuse a stored trial."""
        ended = self.history.ended(slot.id, slot.key.digest)
        known, done = ended in ("done", "reused"), ended == "done"
        record = read_trial(slot.spec, self.store)
        outcome = Outcome(slot, "done" if done else "reused", record, already_logged=known)
        self._finish(queue, point, outcome)

    def _retry(self, job: Job, key: str, failure: Failure) -> bool:
        """Queue a failed trial again, if its class of failure allows it."""
        name = failure.failure_class
        if CLASSES[name].stops_after:
            self.errors[failure] += 1
        slots = [slot for _, _, slot in self.waiting[key]]
        if self.stopping_failure() or self.tries[key, name] >= CLASSES[name].retries:
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
        halvings = job.halvings + (name == "oom")
        self._queue_job(job.cell, job.point, slots[:1], halvings)
        return True

    def _fail(self, queue: _CellQueue, point: int, slot: Slot, failure: Failure) -> None:
        name, message = failure.failure_class, failure.message
        self._finish(queue, point, Outcome(slot, "failed", failure_class=name, message=message))

    def _finish(self, queue: _CellQueue, point: int, outcome: Outcome) -> None:
        """Report an outcome; the last one of its point ends the point."""
        self.on_outcome(outcome)
        record, ended = outcome.record, queue.running[point]
        ended.append(record.objectives[self.objective] if record and self.objective else None)
        if len(ended) == len(self.assignments):
            del queue.running[point]
            values = [value for value in ended if value is not None]
            queue.finished[point] = fmean(values) if len(values) == len(ended) else None
