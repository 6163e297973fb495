"""Trial scheduler: picks the job that runs next. Does not depend on Ray or a tracker.

A job is the missing seeds of one point that can be trained in one computation (`side_by_side`);
other seeds of the point are separate jobs. Results in the store are reused. A trial that
another job is computing is not started twice: its slot waits for that job. Failures are retried as
their class allows (`failures`), each as a separate job.

Where a search prunes, a trial runs in segments that end at rungs. At a rung, a point waits until
all other points of its round have reached it; then the pruning rule decides which points continue
(`points_to_prune`). The comparison does not depend on the order in which trials end.
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
from orchestrator.planning.plan import ended_slots, fp32_slots, iterations_of, slots_of
from orchestrator.planning.pruning import points_to_prune
from orchestrator.planning.resources import side_by_side
from orchestrator.planning.studies import PrunedPoint, read_searches
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.space import Point, study_name
from orchestrator.spec.sweep import ENCODER_BATCH
from orchestrator.store import ArtifactStore, EventLog, read_trial
from orchestrator.store.checkpoints import WHOLE_TRIAL, Segments, is_finished, recorded_rungs


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
    segments: Segments = WHOLE_TRIAL
    share: float = 1.0  # of the work of whole trials


@dataclass
class _ActivePoint:
    """A point from its start to the end of its last segment."""

    point: Point
    slots: dict[str, Slot]
    rungs: list[int]  # rungs at which it is still to be compared
    iterations_done: int = 0
    pending: set[str] = field(default_factory=set)  # slots that run to the next stop
    at_rung: dict[str, float] = field(default_factory=dict)  # objectives at that stop, by slot
    final: dict[str, float | None] = field(default_factory=dict)  # objectives of finished trials

    @property
    def stop_after(self) -> int | None:
        return self.rungs[0] if self.rungs else None

    @property
    def share(self) -> float:
        """Share of all iterations that lies before the next stop."""
        total = iterations_of(self.slots.values())
        return ((self.stop_after or total) - self.iterations_done) / total if total else 1.0

    def rung_objective(self) -> float | None:
        """Mean objective at this rung; None if a trial failed: then the point is not compared."""
        return fmean(self.at_rung.values()) if len(self.at_rung) == len(self.slots) else None

    def final_objective(self) -> float | None:
        """Mean objective of its trials; None if a trial has none."""
        values = [value for value in self.final.values() if value is not None]
        return fmean(values) if values and len(values) == len(self.final) else None


class _CellQueue:
    """Points of one cell, round after round."""

    def __init__(self, cell: Cell, search: Any) -> None:
        self.cell, self.search = cell, search
        self.new: deque[Point] = deque()  # points of the round that have not started
        self.startable: deque[_ActivePoint] = deque()  # points with a segment that can start
        self.running: dict[int, _ActivePoint] = {}
        self.at_rung: list[_ActivePoint] = []  # wait for the other points of the round
        self.finished: dict[int, float | None] = {}  # objectives of the round
        self.pruned: dict[int, PrunedPoint] = {}  # points of the round
        self.started = 0  # points, over all rounds
        self.ended = False

    @property
    def is_idle(self) -> bool:
        """Whether no point of the cell runs or can start."""
        return not (self.new or self.startable or self.running)

    def next_round(self, event_log: EventLog) -> None:
        """Pass the results of the finished round to the search, and get the next round."""
        if self.search is None:
            if self.started:
                self.ended = True
            else:
                self.new.append(Point(0, {}))
            return
        if self.finished or self.pruned:
            finished = dict(sorted(self.finished.items()))
            stopped = {n: (stop.rung, stop.value) for n, stop in sorted(self.pruned.items())}
            self.search.record_round(finished, stopped)
            fields: dict[str, Any] = {
                "values": {str(point): value for point, value in finished.items()}
            }
            if stopped:
                fields["pruned"] = list(stopped)
            event_log.append("round_told", cell=self.cell.id, **fields)
            self.finished, self.pruned = {}, {}
        self.new.extend(self.search.next_round())
        self.ended = not self.new


class TrialScheduler:
    """Selects jobs and processes their results.

    Args:
        cells: in the order in which they should run.
        searches: a CellSearch for each cell that has a search space.
        on_outcome: called once for each slot, as soon as its outcome is known.
        within_budget: called before each job with the (cell, trials) of all jobs that would run
            together, the new one last. Once it returns False, no further job starts.
        failed_dependency: returns the failure of an input because of which a trial cannot run.
        is_ready: returns whether all inputs of a cell exist.
        rank: of each cell, by id; cells of a lower rank run first.
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
        within_budget: Callable[[Sequence[tuple[str, float]]], bool] = lambda jobs: True,
        failed_dependency: Callable[[TrialSpec], Failure | None] = lambda spec: None,
        is_ready: Callable[[Cell], bool] = lambda cell: True,
        rank: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.sweep, self.store, self.resolver = sweep, store, resolver
        self.event_log, self.on_outcome = event_log, on_outcome
        self.assignments = sweep.seeds.assignments()
        self.objective = sweep.search.objective if sweep.search else None
        self.rungs = sweep.search.rungs if sweep.search else ()
        self.queues = [_CellQueue(cell, searches.get(cell.id)) for cell in cells]
        self.logged_searches = read_searches(event_log)
        self.finished_before = ended_slots(event_log)
        self.job_count = 0
        self.within_budget, self.stopped = within_budget, False
        self.failed_dependency = failed_dependency
        self.is_ready, self.rank = is_ready, rank
        self.device = "cuda" if sweep.resources.trial.gpu else "cpu"
        self.memory_share = sweep.resources.encoder.batch / ENCODER_BATCH
        self.moved_before = fp32_slots(event_log)
        self.queued: deque[Job] = deque()  # not started yet
        self.tries: Counter[tuple[str, str]] = Counter()  # by trial key and failure class
        self.errors: Counter[Failure] = Counter()  # of classes that can stop a sweep
        self.fp32_slots: list[Slot] = []  # to be repeated in fp32, with inputs that may be missing
        self.running: dict[int, Job] = {}
        # By trial key and the rung that it runs to.
        self.waiting: dict[tuple[str, int | None], list[tuple[_CellQueue, int, Slot]]] = {}

    @property
    def is_complete(self) -> bool:
        if self.stopped:
            return not self.running
        return all(queue.ended for queue in self.queues)

    def out_of_budget(self) -> bool:
        """Whether a point did not start because the budget is spent."""
        return self.stopped and not self.stopping_failure()

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
            self.stopped = True
        while not self.queued and not self.stopped:
            ready = [queue for queue in self.queues if self.is_ready(queue.cell)]
            for queue in ready:
                if not queue.ended and queue.is_idle:
                    self._decide_rungs(queue)
                    if queue.is_idle:
                        queue.next_round(self.event_log)
                        self._log_early_end(queue)
            able = [queue for queue in ready if queue.new or queue.startable]
            if not able:
                break
            # Among the cells of the lowest rank, the one with the fewest started points.
            self._start_point(
                min(able, key=lambda queue: (self.rank.get(queue.cell.id, 0), queue.started))
            )
        return self.queued[0] if self.queued and not self.stopped else None

    def next(self) -> Job | None:
        """Return the next job and count it as running; None as for `peek`."""
        job = self.peek()
        if job is not None:
            self.running[job.number] = self.queued.popleft()
            self.event_log.append("trials_started", slots=list(job.slots))
        return job

    def running_slots(self) -> dict[str, Slot]:
        """The slots whose trials are running, by id."""
        stops = (
            (key, job.segments.stop_after) for job in self.running.values() for key in job.keys
        )
        return {slot.id: slot for stop in stops for _, _, slot in self.waiting.get(stop, ())}

    def complete(self, number: int, failures: Mapping[str, Failure]) -> None:
        """Process the end of a job: trials in `failures` failed, all others have a record.

        Args:
            number: of the job.
            failures: by trial key.
        """
        job = self.running.pop(number)
        for key, spec in zip(job.keys, job.trials, strict=True):
            failure = failures.get(key)
            if failure is not None and self._retry(job, key, spec, failure):
                continue
            waiting = self.waiting.pop((key, job.segments.stop_after))
            for index, (queue, point, slot) in enumerate(waiting):
                if failure is not None:
                    self._fail(queue, point, slot, failure)
                elif job.segments.stop_after is not None:
                    self._reach_rung(queue, point, slot)
                else:
                    state: Literal["done", "reused"] = "done" if index == 0 else "reused"
                    record = read_trial(slot.spec, self.store)
                    self._finish(queue, point, Outcome(slot, state, record))

    # ---------------------------------------------------------------- starting points

    def _start_point(self, queue: _CellQueue) -> None:
        """Start the next segment of a cell's next point: reuse stored trials, wait for trials that
        another job runs, and queue the others. A point that exceeds the budget stays queued."""
        if not queue.startable:
            queue.startable.append(self._active_point(queue, queue.new.popleft()))
        active = queue.startable[0]
        number, stop_after = active.point.number, active.stop_after
        if number in self.logged_searches.pruned_points(queue.cell, self.sweep.search):
            queue.startable.popleft()
            queue.started += 1
            self._prune(queue, active)
            return
        slots = [slot for slot in active.slots.values() if slot.id not in active.final]
        if not self._fits_budget(queue.cell, slots, active):
            self.stopped = True
            return
        queue.startable.popleft()
        if not active.iterations_done:
            queue.started += 1
            if queue.search is not None:
                self._log_point(queue.cell, active.point)
        queue.running[number] = active
        active.pending = {slot.id for slot in slots}
        to_run: dict[str, Slot] = {}
        for slot in slots:
            key = slot.key.digest
            if (key, stop_after) in self.waiting:
                self.waiting[key, stop_after].append((queue, number, slot))
            elif is_finished(slot.spec, self.store, stop_after):
                self._reuse(queue, number, slot)
            elif (failure := self.failed_dependency(slot.spec)) is not None:
                self._fail(queue, number, slot, failure)
            else:
                to_run[key] = slot
                self.waiting[key, stop_after] = [(queue, number, slot)]
        by_spec = {slot.spec: (key, slot) for key, slot in to_run.items()}
        segments = Segments(self.rungs, stop_after)
        for group in side_by_side(list(by_spec), self.device, self.memory_share):
            together = dict(by_spec[spec] for spec in group)
            self._queue_job(queue.cell.id, number, together, segments, active.share)

    def _active_point(self, queue: _CellQueue, point: Point) -> _ActivePoint:
        """The state of a point: at its start, or at the rung that earlier runs have reached."""
        slots = slots_of(
            queue.cell, point.number, point.params, self.assignments, self.resolver,
            self.moved_before,
        )  # fmt: skip
        rungs: list[int] = []
        if self.rungs and not point.round_is_over:
            last = iterations_of(slots)
            rungs = self.logged_searches.rungs_left(
                queue.cell, self.sweep.search, point.number, last
            )
        return _ActivePoint(point, {slot.id: slot for slot in slots}, rungs)

    def _fits_budget(self, cell: Cell, slots: Sequence[Slot], active: _ActivePoint) -> bool:
        """Whether the budget allows the missing trials of a segment beside the running ones."""
        stop_after = active.stop_after
        trials = {slot.key.digest: slot.spec for slot in slots}
        missing = sum(
            (key, stop_after) not in self.waiting and not is_finished(spec, self.store, stop_after)
            for key, spec in trials.items()
        )
        running = [(job.cell, len(job.trials) * job.share) for job in self.running.values()]
        return not missing or self.within_budget([*running, (cell.id, missing * active.share)])

    def _log_point(self, cell: Cell, point: Point) -> None:
        assert self.sweep.search is not None
        study = study_name(cell, self.sweep.search)
        logged = self.logged_searches.suggested.setdefault(study, {})
        if point.number not in logged:
            params = logged[point.number] = dict(point.params)
            self.event_log.append(
                "point_asked", cell=cell.id, study=study, point=point.number, params=params
            )

    def _queue_job(
        self,
        cell: str,
        point: int,
        slots: Mapping[str, Slot],
        segments: Segments,
        share: float,
        halvings: int = 0,
    ) -> None:
        self.job_count += 1
        self.queued.append(
            Job(
                number=self.job_count,
                cell=cell,
                point=point,
                trials=tuple(slot.spec for slot in slots.values()),
                keys=tuple(slots),
                slots=tuple(slot.id for slot in slots.values()),
                halvings=halvings,
                segments=segments,
                share=share,
            )
        )

    # ---------------------------------------------------------------- results of trials

    def _reuse(self, queue: _CellQueue, point: int, slot: Slot) -> None:
        """Reuse a stored trial that has already reached the next stop."""
        if queue.running[point].stop_after is not None:
            self._reach_rung(queue, point, slot)
            return
        digest, state = self.finished_before.get(slot.id, ("", ""))
        known = digest == slot.key.digest and state in ("done", "reused")
        record = read_trial(slot.spec, self.store)
        done = known and state == "done"
        outcome = Outcome(slot, "done" if done else "reused", record, already_logged=known)
        self._finish(queue, point, outcome)

    def _retry(self, job: Job, key: str, spec: TrialSpec, failure: Failure) -> bool:
        """Queue a failed trial again, if its class of failure allows it."""
        name = failure.failure_class
        if CLASSES[name].stops_after:
            self.errors[failure] += 1
        # Repeating a trial with a loss that is not finite gives the same loss. A sweep in half
        # precision repeats it in fp32, which is another trial; TF32 has the range of fp32.
        allowed = 0 if name == "nan" else CLASSES[name].retries
        slots = [slot for _, _, slot in self.waiting[key, job.segments.stop_after]]
        if name == "nan" and spec.precision in ("fp16", "bf16"):
            for slot in slots:
                self.event_log.append("trial_moved", slot=slot.id, key=key, precision="fp32")
            self.fp32_slots += slots
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
        halvings = job.halvings + (name == "oom")
        self._queue_job(job.cell, job.point, {key: slots[0]}, job.segments, job.share, halvings)
        return True

    def _fail(self, queue: _CellQueue, point: int, slot: Slot, failure: Failure) -> None:
        name, message = failure.failure_class, failure.message
        self._finish(queue, point, Outcome(slot, "failed", failure_class=name, message=message))

    def _reach_rung(self, queue: _CellQueue, point: int, slot: Slot) -> None:
        """Record the objective of a trial at a rung, where its point waits for the others."""
        active = queue.running[point]
        rung = active.stop_after
        assert rung is not None
        assert self.objective is not None
        rungs, _ = recorded_rungs(slot.spec, self.store)
        active.at_rung[slot.id] = rungs[rung][self.objective]
        self.event_log.append("rung_reached", slot=slot.id, key=slot.key.digest, rung=rung)
        self._end_segment(queue, active, slot)

    def _finish(self, queue: _CellQueue, point: int, outcome: Outcome) -> None:
        self.on_outcome(outcome)
        active, record = queue.running[point], outcome.record
        objective = record.objectives[self.objective] if record and self.objective else None
        active.final[outcome.slot.id] = objective
        self._end_segment(queue, active, outcome.slot)

    def _end_segment(self, queue: _CellQueue, active: _ActivePoint, slot: Slot) -> None:
        """Count a slot as ended; the last slot ends the segment of its point."""
        active.pending.discard(slot.id)
        if active.pending:
            return
        del queue.running[active.point.number]
        if len(active.final) == len(active.slots):
            queue.finished[active.point.number] = active.final_objective()
        else:
            queue.at_rung.append(active)

    # ---------------------------------------------------------------- pruning

    def _decide_rungs(self, queue: _CellQueue) -> None:
        """Decide which points continue, once all points of a round have reached a rung.

        The event log has the decision before anything follows from it.
        """
        search = self.sweep.search
        compared = sorted(queue.at_rung, key=lambda active: active.point.number)
        queue.at_rung = []
        for rung in sorted({active.rungs[0] for active in compared}):
            assert search is not None
            assert search.pruning is not None
            at_this_rung = [active for active in compared if active.rungs[0] == rung]
            values = {
                active.point.number: value
                for active in at_this_rung
                if (value := active.rung_objective()) is not None
            }
            study = study_name(queue.cell, search)
            earlier = self.logged_searches.rungs.get(study, {}).get(rung, {}).values()
            stopped = points_to_prune(search.pruning, values, earlier)
            if values:
                by_name = {str(number): value for number, value in values.items()}
                self.event_log.append(
                    "rung_decided",
                    cell=queue.cell.id,
                    study=study,
                    rung=rung,
                    values=by_name,
                    pruned=list(stopped),
                )
                self.logged_searches.record_rung(study, rung, by_name, stopped)
            for active in at_this_rung:
                if active.point.number in stopped:
                    self._prune(queue, active)
                else:
                    active.rungs.pop(0)
                    active.iterations_done, active.at_rung = rung, {}
                    queue.startable.append(active)

    def _prune(self, queue: _CellQueue, active: _ActivePoint) -> None:
        number = active.point.number
        stop = self.logged_searches.pruned_points(queue.cell, self.sweep.search)[number]
        queue.pruned[number] = stop
        for slot in active.slots.values():
            if slot.id not in active.final:
                _, seconds = recorded_rungs(slot.spec, self.store)
                known = self.finished_before.get(slot.id) == (slot.key.digest, "pruned")
                self.on_outcome(
                    Outcome(slot, "pruned", pruned=stop, seconds=seconds, already_logged=known)
                )

    def _log_early_end(self, queue: _CellQueue) -> None:
        """Log that `patience` ended a search before all its planned points ran."""
        search = self.sweep.search
        planned = self.logged_searches.points(queue.cell, search)
        if search is not None and queue.ended and queue.started < planned:
            self.event_log.append(
                "search_ended",
                cell=queue.cell.id,
                study=study_name(queue.cell, search),
                points=queue.started,
                patience=search.patience,
                trials_left=(planned - queue.started) * len(self.assignments),
            )
