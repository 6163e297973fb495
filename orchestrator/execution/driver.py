"""Run a sweep, which is also to resume it: plan, prepare, tune, tell. The only writer.

Nothing heavy is imported where nothing is left to do.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.seal import sealed_json
from orchestrator.environment import joins_a_cluster
from orchestrator.errors import (
    BUDGET,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    TERMINATED,
    DamagedArtifact,
    Refused,
    RemoteAway,
    StoreFull,
    StoreLost,
    StudiesAway,
    SweepBusy,
)
from orchestrator.execution._prefetch import Prefetch, worker_context
from orchestrator.execution._repair import set_damaged_aside
from orchestrator.execution._run import Run
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.execution._stall import Stall
from orchestrator.execution.screen import Screen
from orchestrator.failures import CLASSES, Failure, first_line, no_room
from orchestrator.formatting import clock
from orchestrator.git import commit, diff_digest, dirty, uncommitted
from orchestrator.planning import (
    OutcomeTracker,
    Plan,
    Resolver,
    changed_inputs,
    earlier_results,
    possible_trials,
    requirements_of,
    resolver_of,
    unschedulable_reason,
)
from orchestrator.planning.budget import BudgetTracker
from orchestrator.planning.disk import full_disk_message
from orchestrator.planning.estimate import (
    mean_seconds,
    read_history,
    record_measurements,
)
from orchestrator.planning.plan import plan_sweep
from orchestrator.planning.resolve import text_digest
from orchestrator.reporting import sweep_status
from orchestrator.spec import Cell, SweepSpec
from orchestrator.spec.sweep import JOURNAL, Budget
from orchestrator.store import SweepLocation, is_bucket, read_outcome, read_resolved, whoami
from orchestrator.store.artifacts import provenance
from orchestrator.store.location import RESOLVED

if TYPE_CHECKING:
    from orchestrator.execution._allocation import Allocation

log = logging.getLogger(__name__)


LOST = (RemoteAway, SweepBusy, StudiesAway)
GO_ON = "what is done is there, and the same command goes on with the rest"


def run_sweep(
    sweep: SweepSpec,
    location: SweepLocation,
    screen: Screen,
    tracker: OutcomeTracker,
    *,
    prepare_only: bool = False,
    origin: dict[str, Any] | None = None,
    retry: str | None = None,
) -> int:
    """Do what is left of a sweep and say how it stands.

    Args:
        tracker: receives each outcome and the end of the run.
        origin: how the sweep was asked for (sets, only), kept so that it can be read again.
        retry: the only class of failures to try again; None: all.

    Returns:
        The exit code; `outcome.json` says the same.

    Raises:
        Refused, SweepBusy, StoreRefused, RemoteAway, StudiesAway: before anything started.
        StoreLost: later.
        StoreFull: there was no room for what was made, or for saying how it ended.
    """
    location = replace(location, recorded=False)  # a run reads its inputs as they are now
    event_log, resolver = location.event_log(), resolver_of(location)
    plan = _sound_plan(sweep, location, resolver, screen)
    for line in changed_inputs(earlier_results(plan, location)):
        screen.say(line)
    given_up = _given_up(sweep_status(event_log).failures, retry)
    if plan.done + len(plan.pruned) == plan.total and sweep_status(event_log).exit_code == DONE:
        if (
            event_log.path.exists()
        ):  # a file that only lost cells asks for no work, but is the sweep
            _open_folder(location, sweep, origin or {}, resolver)
        screen.say(f"{sweep.name}: nothing to do")
        return DONE
    problem = unschedulable_reason(plan, location.store)
    if problem:
        raise Refused(problem)
    use = location.store.locks.shared_store()
    diff = uncommitted()
    # Workers have no .git and may run as somebody else.
    made = {"DIRTY": dirty(diff), "COMMIT": commit(), "USER": whoami()}
    made["SWEEP"] = f"{location.project}/{location.name}"
    os.environ |= {f"AIRSWEEP_{name}": value for name, value in made.items()}
    tracker.check(reach=not prepare_only)
    _check_studies(plan)
    if is_bucket(location.store.name) and tracker.in_store and not prepare_only:
        screen.say(
            f"tracking goes to a file in {location.store.root}, which this machine alone sees; "
            "give --tracking-uri http://... for one that all see"
        )
    with _told_where_full(plan, location):
        location.store.initialize()
        event_log.lock()
    budget_tracker = BudgetTracker(
        sweep.budget, sweep.resources, mean_seconds(read_history(location.store))
    )
    run = Run(
        sweep, location, screen, tracker, event_log, resolver, budget_tracker, given_up=given_up
    )
    code = FAILED  # what an exception leaves behind
    cluster = ExitStack()
    try:
        with _told_where_full(plan, location):
            _heed_signals(run)
            _open_folder(location, sweep, origin or {}, resolver, diff)
            event_log.append(
                "sweep_started",
                spec=text_digest(sweep.text),
                total=plan.total,
                to_run=plan.to_run,
                asks=plan.request_digest,
                pid=os.getpid(),
                **provenance(),
            )
            screen.started(plan)
            code = _work(run, plan, prepare_only, cluster)
    except Refused:
        code = REFUSED
        raise
    except LOST as lost:
        raise StoreLost(f"{lost}; {GO_ON}") from lost
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:
        # Ray's waits turn a SystemExit of another code into 1.
        code = run.stopped or (stop.code if isinstance(stop.code, int) else FAILED)
    except Exception:
        # Ray Tune turns a SystemExit that reaches it while it makes a trial into an error.
        if run.stopped is None:
            raise
        code = run.stopped
    finally:
        _restore_interrupts()
        screen.close()
        # Ray ends last: who is being stopped has seconds until SIGKILL, and should have told by
        # then how it ended.
        with cluster, use:
            try:
                untold = _close(run, code)
            except LOST as lost:
                raise StoreLost(f"{lost}; {GO_ON}") from lost
            finally:
                event_log.unlock()
    if untold is not None:
        raise StoreFull(full_disk_message(plan, location.store, first_line(untold)))
    return code


def _sound_plan(
    sweep: SweepSpec, location: SweepLocation, resolver: Resolver, screen: Screen
) -> Plan:
    """The plan of a sweep, after what is damaged was set aside; it is made again by this run."""
    while True:
        try:
            plan = plan_sweep(sweep, location.store, resolver, location.event_log())
            damaged = set_damaged_aside(plan, location.store, resolver)
        except DamagedArtifact as problem:  # of a record that the plan itself reads
            location.store.set_aside(problem)
            damaged = [problem]
        for one in damaged:
            screen.say(f"{one.name} was damaged ({one.why}) and is made again")
        if not damaged:
            return plan


@contextmanager
def _told_where_full(plan: Plan, location: SweepLocation) -> Iterator[None]:
    """
    Raises:
        StoreFull: there was no room for something.
    """
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        raise StoreFull(full_disk_message(plan, location.store, first_line(error))) from error


def _given_up(failures: Mapping[str, Mapping[str, Any]], retry: str | None) -> dict[str, Failure]:
    """By slot, failures that are not to be tried again.

    Raises:
        ValueError: there is none of the class that is.
    """
    if retry is None:
        return {}
    counts = Counter(event["failure_class"] for event in failures.values())
    if not counts[retry]:
        there = ", ".join(f"{count} x {name}" for name, count in counts.items()) or "nothing"
        raise ValueError(f"no trial of class {retry!r} failed; failed: {there}")
    return {
        slot: Failure(event["failure_class"], event["message"])
        for slot, event in failures.items()
        if event["failure_class"] != retry
    }


def _open_folder(
    location: SweepLocation,
    sweep: SweepSpec,
    origin: dict[str, Any],
    resolver: Resolver,
    diff: bytes = b"",
) -> None:
    location.folder.mkdir(parents=True, exist_ok=True)
    resolved = sealed_json({**origin, "inputs": _merged_inputs(location, resolver)})
    for name, data in {"spec.yaml": sweep.text.encode(), RESOLVED: resolved}.items():
        path = location.folder / name
        if not path.exists() or path.read_bytes() != data:
            location.write(name, data)
    if diff:
        location.write(f"uncommitted-{diff_digest(diff)}.diff", diff)


def _merged_inputs(location: SweepLocation, resolver: Resolver) -> dict[str, Any]:
    """The inputs of this run, and of earlier runs those that this one does not use: with `--only`
    a run has fewer cells."""
    now: dict[str, Any] = resolver.inputs()
    before: dict[str, Any] = {}
    try:
        before = read_resolved(location).get("inputs") or {}
    except FileNotFoundError:
        pass
    except ValueError as problem:
        log.warning("%s", problem)
    merged = {kind: {**before.get(kind, {}), **of} for kind, of in now.items()}
    return merged | {"code": now["code"]}  # of this run alone


def _work(run: Run, plan: Plan, prepare_only: bool, cluster: ExitStack) -> int:
    """All groups of cells together: those without images first, then those that share a row of
    images. Trials of a group start when what they read is there. On a budget, which trials might
    spend while images are drawn, group after group.

    Args:
        cluster: is given Ray's end, where Ray has to be started.
    """
    searches = _searches(run, plan)
    groups = _groups(plan, run)
    batches = deque([groups] if run.sweep.budget == Budget() else [[cells] for cells in groups])
    while batches:
        groups = batches.popleft()
        prefetch = Prefetch(run, plan, groups, prepare_only)
        rank = {cell.id: location for location, cells in enumerate(groups) for cell in cells}
        scheduler = TrialScheduler(
            run.sweep,
            [cell for cells in groups for cell in cells],
            searches,
            run.location.store,
            run.resolver,
            run.event_log,
            run.outcome,
            run.budget_tracker.can_start,
            run.failed_dependency,
            run.given_up,
            prefetch.has,
            rank,
        )
        while not (prepare_only and not prefetch.waiting):
            job = None if prepare_only else scheduler.peek()
            if scheduler.out_of_budget():
                return _out_of_budget(run)
            if job is None and not prefetch.waiting:
                break
            if run.allocation is None:
                run.allocation = _start_cluster(cluster, run)
                _wait_for_machines(run, plan)
                _look(run, plan)
            prefetch.begin()
            if job is not None:
                _tune(run, scheduler, prefetch)
            elif not prefetch.can_afford():
                return _out_of_budget(run)
            else:
                prefetch.wait()
            code = _given_up_on(run, scheduler)
            if code is not None:
                return code
        prefetch.finish()
        if scheduler.moving:  # the same cells again, with what they need in fp32
            run.moving += [replace(slot.spec, precision="fp32") for slot in scheduler.moving]
            moved = {slot.cell.id for slot in scheduler.moving}
            batches.appendleft([cells for cells in groups if any(c.id in moved for c in cells)])
            searches = _searches(run, plan)
    failed = run.tally.states.get("failed", 0) or run.failed_requirements
    return FAILED if failed else DONE


def _given_up_on(run: Run, scheduler: TrialScheduler) -> int | None:
    """
    Raises:
        StoreFull: a trial found no room.
    """
    lost = scheduler.gave_up()
    if lost is None:
        return None
    if lost.failure_class == "disk":
        raise StoreFull(lost.message)
    count = CLASSES[lost.failure_class].stops_after
    run.screen.say(f"stopped after {count} equal errors: {lost.message}")
    return FAILED


def _out_of_budget(run: Run) -> int:
    run.screen.say(run.budget_tracker.refusal)
    return BUDGET


def _groups(plan: Plan, run: Run) -> list[list[Cell]]:
    """Cells by the images that they read; none first, then those that lack the fewest."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    missing: dict[tuple[str, ...], int] = {}
    assignments = run.sweep.seeds.assignments()
    store = run.location.store
    for cell in plan.cells:
        requirements = requirements_of(possible_trials([cell], assignments, run.resolver))
        images = [requirement for requirement in requirements if requirement.stage == "images"]
        rows = tuple(sorted(str(requirement.key) for requirement in images))
        groups.setdefault(rows, []).append(cell)
        missing[rows] = sum(requirement.total() - requirement.have(store) for requirement in images)
    return [groups[rows] for rows in sorted(groups, key=lambda rows: (bool(rows), missing[rows]))]


def _searches(run: Run, plan: Plan) -> dict[str, Any]:
    if run.sweep.search is None or not any(cell.space for cell in plan.cells):
        return {}
    from orchestrator.planning.search import open_searches

    location = run.location
    owner = (location.store.name, location.project, location.name)
    return dict(open_searches(plan, run.event_log, location.folder / "studies.journal", owner))


def _check_studies(plan: Plan) -> None:
    """Where studies are in a database: does it answer, before any work?

    Raises:
        ValueError: it lets us not in.
        StudiesAway: it does not answer.
    """
    search = plan.sweep.search
    if search is None or search.storage == JOURNAL or not any(cell.space for cell in plan.cells):
        return
    from orchestrator.planning.search import open_database

    open_database(search.storage)


def _start_cluster(cluster: ExitStack, run: Run) -> Allocation:
    from orchestrator.cluster import ray_session
    from orchestrator.cluster.session import MemoryPeak, free_resources, machines
    from orchestrator.execution._allocation import Allocation
    from orchestrator.execution._progress import Progress

    run.joined = joins_a_cluster()
    run.screen.say("joining Ray" if run.joined else "starting Ray")
    cluster.enter_context(ray_session(functools.partial(_lost, run), lambda: run.died))
    run.peak = MemoryPeak()
    _heed_signals(run)  # ray.init replaces the handlers that were there before
    run.progress = Progress(run)
    run.stall = Stall(run.sweep.resources, free_resources, run.screen.say)
    return Allocation(run.sweep.resources, machines)


def _wait_for_machines(run: Run, plan: Plan) -> None:
    """
    Raises:
        Refused: there is no room for what a process asks for, and no more machine came.
    """
    assert run.allocation is not None
    wait, started = run.sweep.resources.wait or 0.0, time.monotonic()
    asked = False
    while problem := unschedulable_reason(plan, run.location.store, run.allocation.machines()):
        if time.monotonic() - started >= wait:
            waited = f" (waited {clock(wait)} for one)" if wait else ""
            raise Refused(f"{problem}{waited}")
        if not asked:
            run.screen.say(f"waiting for machines, at most {clock(wait)}: {problem}")
            from orchestrator.cluster.session import ask_autoscaler

            ask_autoscaler(run.sweep.resources)
            asked = True
        time.sleep(min(wait, 1.0))


def _look(run: Run, plan: Plan) -> None:
    """Before any work: are the machines of a cluster that was joined fit for it?"""
    if run.joined:
        from orchestrator.cluster import refuse_unfit_nodes

        refuse_unfit_nodes(plan, run.location, run.screen.say)


def _heed_signals(run: Run) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, functools.partial(_terminated, run))
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a shell's background job
            signal.signal(signal.SIGINT, functools.partial(_interrupted, run))


def _terminated(run: Run, number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the end is recorded now
    run.stopped = run.stopped or (FAILED if run.lost else TERMINATED)
    raise SystemExit(run.stopped)


def _interrupted(run: Run, number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once
    run.stopped = run.stopped or INTERRUPTED
    raise KeyboardInterrupt


def _restore_interrupts() -> None:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _lost(run: Run, logs: Path) -> None:
    run.lost = True
    log.error(
        "Ray died here: it was killed, or had no memory left; the same command goes on "
        f"(Ray's logs: {logs})"
    )
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _tune(run: Run, scheduler: TrialScheduler, prefetch: Prefetch) -> None:
    """Run trials until none is left, or the next one reads what is not there yet."""
    from orchestrator.execution._tuning import run_points

    assert run.allocation is not None
    assert run.progress is not None
    run.allocation.tuning = True
    figures = run_points(
        scheduler,
        worker_context(run),
        run.sweep.resources,
        run.location.folder / "tune",
        run.allocation.trials,
        prefetch.advance,
        run.progress.board,
    )
    run.allocation.tuning = False
    run.tally.add_wall("trials", figures.wall)
    if figures.overhead is not None:
        run.tally.overheads.append(figures.overhead)


# ---------------------------------------------------------------- the end


def _close(run: Run, code: int) -> Exception | None:
    """Say how it ended, everywhere: ledger, outcome.json, tracker.

    Returns:
        Why one of them could not be told, on a full disk.
    """
    tally = run.tally
    tally.memory = run.peak.stop() if run.peak else 0
    seconds = round(time.monotonic() - tally.started, 1)
    facts = {name: value for name, value in vars(tally).items() if name not in HIDDEN}
    facts["shares"] = tally.shares or read_outcome(run.location).get("run", {}).get("shares", {})
    outcome = {
        "exit_code": code,
        "state": STATES.get(code, "failed"),
        "seconds": seconds,
        "run": facts,
    }
    untold = _no_room_for(lambda: run.location.write("outcome.json", sealed_json(outcome)))
    if untold is not None and code == DONE:
        code = FAILED  # else the same command would find nothing to do
    if code == DONE:
        run.tracker.catch_up()
        # Before the event log says so: after it no run would open MLflow again.
        run.tracker.finish(code)
    ended: dict[str, Any] = {"exit_code": code, "seconds": seconds}
    untold = _no_room_for(lambda: run.event_log.append("sweep_ended", **ended)) or untold
    _no_room_for(
        lambda: record_measurements(run.location.store, tally.work)
    )  # estimates do without
    if code != DONE:
        run.tracker.finish(code)
    return untold


def _no_room_for(write: Callable[[], object]) -> OSError | None:
    """Why it could not be written, on a full disk."""
    try:
        write()
    except OSError as problem:
        if not no_room(problem):
            raise
        return problem
    return None


HIDDEN = ("started", "work")
STATES = {
    DONE: "done",
    FAILED: "failed",
    REFUSED: "refused",
    BUDGET: "budget",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}
