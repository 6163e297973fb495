"""Runs a sweep, or resumes it: plan, check, prepare inputs, run trials, record the end.

The driver is the only process that writes the event log. Heavy libraries are imported only when
there is work to do.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from air_core.seal import sealed_json
from orchestrator.environment import joins_existing_cluster
from orchestrator.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    TERMINATED,
    BucketUnreachable,
    DamagedArtifact,
    Refused,
    StoreFull,
    StoreLost,
    SweepBusy,
)
from orchestrator.execution._preparation import Preparation, worker_context
from orchestrator.execution._repair import set_damaged_aside
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.execution._signals import handle_signals, on_ray_death, restore_interrupts
from orchestrator.execution._state import RunState
from orchestrator.execution.screen import Screen
from orchestrator.failures import CLASSES, first_line, is_disk_full
from orchestrator.formatting import format_duration, format_time
from orchestrator.git import commit, diff_digest, uncommitted_diff
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
    unused_gpus_reason,
)
from orchestrator.planning.checks import full_disk_message
from orchestrator.planning.estimate import record_measurements
from orchestrator.planning.plan import plan_sweep
from orchestrator.planning.requests import complete_origin, results_command
from orchestrator.planning.resolve import text_digest
from orchestrator.plugins import described_plugin
from orchestrator.reporting import sweep_status
from orchestrator.spec import Cell, SweepSpec, notes_of
from orchestrator.spec.marked_yaml import SpecError
from orchestrator.store import (
    EventLog,
    SweepLocation,
    is_bucket,
    read_outcome,
    user_name,
)
from orchestrator.store.artifacts import provenance
from orchestrator.store.location import RESOLVED
from orchestrator.store.verification import read_cache

if TYPE_CHECKING:
    from orchestrator.execution._allocation import Allocation
    from orchestrator.planning import Machine
    from orchestrator.planning.search import CellSearch

# During a run; before it they refuse the run.
LOST = (BucketUnreachable, SweepBusy)
RESUME_HINT = "finished work is kept, and the same command resumes the sweep"


def run_sweep(
    sweep: SweepSpec,
    location: SweepLocation,
    screen: Screen,
    tracker: OutcomeTracker,
    *,
    prepare_only: bool = False,
    origin: dict[str, Any] | None = None,
) -> int:
    """Run the missing trials of a sweep. Running it again resumes it.

    Args:
        tracker: receives each outcome and the end of the run.
        origin: the options that changed the sweep (`sets`, `only`), recorded so that other commands
            can read the sweep again.

    Returns:
        The exit code, which `outcome.json` has too.

    Raises:
        ValueError: before anything has started: this user may not write to the store, or the sweep
            does not say whether to use the GPUs.
        Refused, SweepBusy, StoreRefused, BucketUnreachable: before anything has
            started.
        StoreLost: one of the same reasons, during the run.
        StoreFull: the disk is full.
    """
    location = replace(location, recorded=False)  # read the inputs as they are now
    event_log, resolver = location.event_log(), resolver_of(location, sweep.folders)
    plan = _plan_and_repair(sweep, location, resolver, screen)
    sweep = plan.sweep  # with memory of its trials and defaults of its generators
    for line in changed_inputs(earlier_results(plan, location)):
        screen.message(line)
    if _is_complete(plan, event_log):
        if event_log.path.exists():  # record the current file, which may have fewer cells
            _write_sweep_files(location, sweep, origin, resolver)
        screen.message(f"{sweep.name}: nothing to do")
        tracker.export()
        return DONE
    location.store.check_writable()
    _refuse_unschedulable(plan, location)
    _check_services(location, tracker, screen, prepare_only)
    # Shut Ray down last: after SIGTERM only seconds remain before SIGKILL, so record the end first.
    with ExitStack() as ray_session, location.store.locks.shared_store():
        diff = uncommitted_diff()
        _export_provenance(location, diff)
        with _explain_full_disk(location):
            location.store.initialize()
            _lock(event_log, location)
        resolver.save()  # a new store did not exist when the plan was made
        state = RunState(sweep, location, screen, tracker, event_log, resolver)
        with _recorded_end(state):
            handle_signals(state)
            _write_sweep_files(location, sweep, origin, resolver, diff)
            _log_start(state, plan)
            state.exit_code = _run_cells(state, plan, prepare_only, ray_session)
    return state.exit_code


# ---------------------------------------------------------------- before the start


def _plan_and_repair(
    sweep: SweepSpec, location: SweepLocation, resolver: Resolver, screen: Screen
) -> Plan:
    """Plan a sweep, with damaged artifacts set aside so that this run makes them again."""
    while True:
        try:
            plan = plan_sweep(sweep, location.store, resolver, location.event_log())
            damaged = set_damaged_aside(plan, location.store, resolver)
        except DamagedArtifact as problem:  # planning itself reads some records
            location.store.set_aside(problem)
            damaged = [problem]
        for artifact in damaged:
            screen.message(
                f"{artifact.name} was damaged ({artifact.reason}) and will be made again"
            )
        if not damaged:
            return plan


def _is_complete(plan: Plan, event_log: EventLog) -> bool:
    return plan.ended == plan.total and sweep_status(event_log).exit_code == DONE


def check_start(
    plan: Plan, location: SweepLocation, tracker: OutcomeTracker, screen: Screen
) -> None:
    """Check that `run_sweep` would start now, for `airsweep plan --check`.

    Checks this machine, or with RAY_ADDRESS the machines of that cluster.

    Raises:
        ValueError: this user may not write to the store, or the sweep does not say whether to use
            the GPUs.
        Refused, SweepBusy, TrackerUnreachable: it would not.
    """
    event_log = location.event_log()
    if _is_complete(plan, event_log):
        return
    location.store.check_writable()
    _refuse_unschedulable(plan, location)
    _check_services(location, tracker, screen, prepare_only=False)
    if event_log.is_locked():
        raise _busy(location)
    _check_machines(plan, location, screen)


def _check_machines(plan: Plan, location: SweepLocation, screen: Screen) -> None:
    from orchestrator.cluster import ray_session, refuse_unfit_machine, refuse_unfit_nodes

    if not joins_existing_cluster():
        refuse_unfit_machine(plan, location, screen.message)
        return
    with ray_session() as machines:
        if problem := unschedulable_reason(plan, location.store, machines):
            if not plan.sweep.resources.wait:
                raise Refused(problem)
            screen.message(f"a run would wait for machines: {problem}")
        _refuse_unused_gpus(plan, location, machines)
        refuse_unfit_nodes(plan, location, screen.message)


def _lock(event_log: EventLog, location: SweepLocation) -> None:
    try:
        event_log.lock()
    except SweepBusy as problem:
        raise _busy(location) from problem


def _busy(location: SweepLocation) -> SweepBusy:
    """The error for a sweep that another driver runs, with what its log says about the driver."""
    started: dict[str, Any] | None = None
    for event in location.event_log().events():
        if event["event"] in ("sweep_started", "sweep_ended"):
            started = event if event["event"] == "sweep_started" else None
    about = ""
    if started is not None:
        host = f" on {started['host']}" if "host" in started else ""
        about = (
            f", since {format_time(started['time'])}: process {started.get('pid')}{host} of "
            f"{started['user']}"
        )
    return SweepBusy(
        f"another driver runs {location.full_name}{about}; wait for it, or stop it; "
        f"`{results_command('status', location)}` shows its progress"
    )


def _refuse_unschedulable(plan: Plan, location: SweepLocation) -> None:
    """
    Raises:
        SpecError: real models would run on CPUs beside GPUs.
        Refused: no machine can ever run a process of the sweep.
    """
    _refuse_unused_gpus(plan, location)
    problem = unschedulable_reason(plan, location.store)
    if problem:
        raise Refused(problem)


def _refuse_unused_gpus(
    plan: Plan, location: SweepLocation, machines: Sequence[Machine] | None = None
) -> None:
    """
    Raises:
        SpecError: real models would run on CPUs beside GPUs.
    """
    problem = unused_gpus_reason(plan, location.store, machines)
    if problem:
        raise plan.sweep.document.key_error(("resources",), problem)


def _export_provenance(location: SweepLocation, diff: bytes) -> None:
    """Set the variables of `PROVENANCE`, which the `WorkerContext` passes to the workers."""
    os.environ |= {
        "AIRSWEEP_DIRTY": diff_digest(diff),
        "AIRSWEEP_COMMIT": commit(),
        "AIRSWEEP_USER": user_name(),
        "AIRSWEEP_SWEEP": location.full_name,
    }


def _check_services(
    location: SweepLocation,
    tracker: OutcomeTracker,
    screen: Screen,
    prepare_only: bool,
) -> None:
    """Check Ray's address and MLflow before any work.

    Raises:
        ValueError: a server rejects the credentials.
        Refused, TrackerUnreachable: a server does not answer.
    """
    from orchestrator.cluster.session import check_address

    check_address()
    tracker.check(reach=not prepare_only)
    if is_bucket(location.store.name) and tracker.in_store and not prepare_only:
        screen.message(
            f"MLflow writes to a file in {location.store.root}, which only this machine can read; "
            "give --tracking-uri http://... to share the results"
        )


@contextmanager
def _explain_full_disk(location: SweepLocation) -> Iterator[None]:
    """
    Raises:
        StoreFull: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise StoreFull(full_disk_message(location.store, first_line(error))) from error


# ---------------------------------------------------------------- the start


def _write_sweep_files(
    location: SweepLocation,
    sweep: SweepSpec,
    origin: dict[str, Any] | None,
    resolver: Resolver,
    diff: bytes = b"",
) -> None:
    """Write the sweep file, its resolved inputs and uncommitted changes into the sweep's folder."""
    location.folder.mkdir(parents=True, exist_ok=True)
    complete = complete_origin(origin or {}, sweep, location)
    if sweep.plugins:
        complete["plugins"] = [*map(described_plugin, sweep.plugins)]
    for plugin in sweep.plugins:
        # Not in a subfolder: folders are downloaded from buckets without theirs.
        location.write(f"plugin-{plugin.digest}.py", plugin.text)
    resolved = sealed_json({**complete, "inputs": _merged_inputs(location, resolver)})
    for name, data in {"spec.yaml": sweep.text.encode(), RESOLVED: resolved}.items():
        path = location.folder / name
        if not path.exists() or path.read_bytes() != data:
            location.write(name, data)
    if diff:
        location.write(f"uncommitted-{diff_digest(diff)}.diff", diff)


def _merged_inputs(location: SweepLocation, resolver: Resolver) -> dict[str, Any]:
    """The inputs of this run, and those of earlier runs that this run does not use: with `--only`
    a run has fewer cells."""
    current: dict[str, Any] = resolver.inputs()
    file = location.folder / RESOLVED
    before: dict[str, Any] = read_cache(file, lambda resolved: resolved.get("inputs") or {}, {})
    merged = {kind: {**before.get(kind, {}), **inputs} for kind, inputs in current.items()}
    return merged | {"code": current["code"]}  # the code of this run only


def _log_start(state: RunState, plan: Plan) -> None:
    state.event_log.append(
        "sweep_started",
        spec=text_digest(state.sweep.text),
        total=plan.total,
        to_run=plan.to_run,
        pid=os.getpid(),
        host=socket.gethostname(),
        **provenance(),
    )
    state.screen.show_start(plan)
    for note in notes_of(plan.sweep):
        state.screen.message(f"note: {note}")


# ---------------------------------------------------------------- the work


def _run_cells(state: RunState, plan: Plan, prepare_only: bool, ray_session: ExitStack) -> int:
    """Prepare inputs and run the trials of all cells; returns the exit code.

    Args:
        ray_session: receives the end of Ray, if Ray has to be started.
    """
    groups = _cell_groups(state, plan)
    while groups:
        searches = _open_searches(state, plan)
        preparation = Preparation(state, plan, groups, prepare_only)
        scheduler = _trial_scheduler(state, groups, searches, preparation)
        code = _run_groups(state, plan, scheduler, preparation, prepare_only, ray_session)
        if code is not None:
            return code
        preparation.finish()
        # Trials that are repeated in fp32 need inputs in fp32: the same cells again.
        state.fp32_trials += [replace(slot.spec, precision="fp32") for slot in scheduler.fp32_slots]
        moved = {slot.cell.id for slot in scheduler.fp32_slots}
        groups = [cells for cells in groups if any(cell.id in moved for cell in cells)]
    failed = state.statistics.states.get("failed", 0) or state.failed_requirements
    return FAILED if failed else DONE


def _run_groups(
    state: RunState,
    plan: Plan,
    scheduler: TrialScheduler,
    preparation: Preparation,
    prepare_only: bool,
    ray_session: ExitStack,
) -> int | None:
    """Run trials as soon as their inputs exist, until none is left; returns an exit code if the
    run ends."""
    while True:
        job = None if prepare_only else scheduler.peek()
        if job is None and not preparation.pending:
            return None
        if state.allocation is None:
            _start_ray(state, plan, ray_session)
        preparation.start()
        if job is not None:
            _run_trials(state, scheduler, preparation)
        else:
            preparation.wait()
        code = _report_stopping_failure(state, scheduler)
        if code is not None:
            return code


def _run_trials(state: RunState, scheduler: TrialScheduler, preparation: Preparation) -> None:
    """Run trials until none is left, or the next one lacks inputs."""
    from orchestrator.execution._tuning import run_points

    assert state.allocation is not None
    assert state.progress is not None
    state.allocation.trials_running = True
    started = time.monotonic()
    overhead = run_points(
        scheduler,
        worker_context(state),
        state.sweep.resources,
        state.allocation.max_trials,
        preparation.advance,
        state.progress.actor,
    )
    state.allocation.trials_running = False
    state.statistics.add_wall("trials", time.monotonic() - started)
    if overhead is not None:
        state.statistics.overheads.append(overhead)


def _report_stopping_failure(state: RunState, scheduler: TrialScheduler) -> int | None:
    """
    Raises:
        StoreFull: a trial found the disk full.
    """
    failure = scheduler.stopping_failure()
    if failure is None:
        return None
    if failure.failure_class == "disk":
        raise StoreFull(failure.message)
    count = CLASSES[failure.failure_class].stops_after
    state.screen.message(f"stopped after {count} equal errors: {failure.message}")
    return FAILED


def _cell_groups(state: RunState, plan: Plan) -> list[list[Cell]]:
    """Cells that read the same images and denoising errors together. Cells without any come first,
    then the group that lacks the fewest blocks."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    missing: dict[tuple[str, ...], int] = {}
    assignments = state.sweep.seeds.assignments()
    store = state.location.store
    for cell in plan.cells:
        requirements = requirements_of(possible_trials([cell], assignments, state.resolver))
        row_requirements = [each for each in requirements if each.spec.is_drawn]
        rows = tuple(sorted(str(requirement.key) for requirement in row_requirements))
        groups.setdefault(rows, []).append(cell)
        missing[rows] = sum(
            requirement.total() - requirement.have(store) for requirement in row_requirements
        )
    return [groups[rows] for rows in sorted(groups, key=lambda rows: (bool(rows), missing[rows]))]


def _open_searches(state: RunState, plan: Plan) -> Mapping[str, CellSearch]:
    if state.sweep.search is None or not any(cell.space for cell in plan.cells):
        return {}
    from orchestrator.planning.search import open_searches

    return open_searches(plan, state.event_log)


def _trial_scheduler(
    state: RunState,
    groups: Sequence[Sequence[Cell]],
    searches: Mapping[str, CellSearch],
    preparation: Preparation,
) -> TrialScheduler:
    scheduler = TrialScheduler(
        state.sweep,
        groups,
        searches,
        state.location.store,
        state.resolver,
        state.event_log,
        on_outcome=state.on_outcome,
        failed_dependency=state.failed_dependency,
        is_ready=preparation.is_ready,
    )
    state.running_slots = scheduler.running_slots
    return scheduler


# ---------------------------------------------------------------- Ray


def _start_ray(state: RunState, plan: Plan, session: ExitStack) -> None:
    """Start Ray or join a cluster, and check that its machines can do the work.

    Raises:
        SpecError: they have GPUs that the sweep does not mention.
        Refused: they cannot.
    """
    from orchestrator.cluster import ray_session, refuse_unfit_nodes
    from orchestrator.cluster.session import MemoryPeak, machines

    joins = joins_existing_cluster()
    state.screen.message("joining Ray" if joins else "starting Ray")
    with state.screen.waiting("waiting for Ray to start"):
        session.enter_context(
            ray_session(functools.partial(on_ray_death, state), lambda: state.process_died)
        )
    # Not before: the session sets variables that Ray reads when it is imported.
    from orchestrator.execution._allocation import Allocation
    from orchestrator.execution._progress import ProgressMonitor

    state.memory_peak = MemoryPeak()
    if joins:  # the workers are no children of this process
        state.statistics.memory_of = "driver"
    handle_signals(state)  # again, since ray.init has replaced the handlers
    state.progress = ProgressMonitor()
    state.allocation = Allocation(state.sweep.resources, machines)
    _wait_for_machines(state, state.allocation, plan)
    _refuse_unused_gpus(plan, state.location, state.allocation.machines())
    if joins:
        refuse_unfit_nodes(plan, state.location, state.screen.message)


def _wait_for_machines(state: RunState, allocation: Allocation, plan: Plan) -> None:
    """Wait for `resources.wait` until the machines of the cluster suffice.

    Raises:
        Refused: they do not.
    """
    wait, started = state.sweep.resources.wait or 0.0, time.monotonic()
    requested = False
    while problem := unschedulable_reason(plan, state.location.store, allocation.machines()):
        if time.monotonic() - started >= wait:
            waited = f" (waited {format_duration(wait)} for more machines)" if wait else ""
            raise Refused(f"{problem}{waited}")
        if not requested:
            state.screen.message(
                f"waiting for machines, at most {format_duration(wait)}: {problem}"
            )
            from orchestrator.cluster.session import request_autoscaling

            request_autoscaling(state.sweep.resources)
            requested = True
        time.sleep(min(wait, 1.0))
        state.news = time.monotonic()


# ---------------------------------------------------------------- the end


@contextmanager
def _recorded_end(state: RunState) -> Iterator[None]:
    """Record how the block ends: in the event log, in outcome.json and in the tracker.

    A signal ends the block without an exception; `state.exit_code` has its code.

    Raises:
        StoreFull: the disk is full, for an artifact or for the record of the end.
        StoreLost: the bucket stopped answering, or another driver took over.
    """
    try:
        with _explain_full_disk(state.location):
            yield
    except (Refused, SpecError) as problem:
        state.exit_code = REFUSED if isinstance(problem, Refused) else BAD_INPUT
        raise
    except LOST as lost:
        raise StoreLost(f"{lost}; {RESUME_HINT}") from lost
    except KeyboardInterrupt:
        state.exit_code = INTERRUPTED
    except SystemExit as stop:
        # Ray's waiting calls replace the code of a SystemExit by 1: the signal's code counts.
        # Ray's handler, which is installed during ray.init, exits with the number of the signal.
        code = stop.code if isinstance(stop.code, int) else FAILED
        code = TERMINATED if code == signal.SIGTERM else code
        state.exit_code = state.signal_exit_code or code
    except Exception:
        # Ray Tune turns a SystemExit that reaches it while it creates a trial into an error.
        if state.signal_exit_code is None:
            raise
        state.exit_code = state.signal_exit_code
    finally:
        state.screen.close()
        try:
            with state.screen.waiting("recording the end"):
                unwritten = _record_end(state)
        except LOST as lost:
            raise StoreLost(f"{lost}; {RESUME_HINT}") from lost
        finally:
            state.event_log.unlock()
            restore_interrupts()
    if unwritten is not None:
        raise StoreFull(full_disk_message(state.location.store, first_line(unwritten)))


def _record_end(state: RunState) -> OSError | None:
    """Write outcome.json and the last event, and finish the tracker.

    Returns:
        The error of a full disk, if a file could not be written.
    """
    code, statistics, location = state.exit_code, state.statistics, state.location
    statistics.memory = state.memory_peak.stop() if state.memory_peak else 0
    seconds = round(time.monotonic() - statistics.started, 1)
    facts = {name: value for name, value in vars(statistics).items() if name not in UNRECORDED}
    facts["shares"] = statistics.shares or read_outcome(location).get("run", {}).get("shares", {})
    outcome = {
        "exit_code": code,
        "state": STATES.get(code, "failed"),
        "seconds": seconds,
        "run": facts,
    }
    unwritten = _full_disk_error(lambda: location.write("outcome.json", sealed_json(outcome)))
    if unwritten is not None and code == DONE:
        code = FAILED  # otherwise the same command would have nothing to do
    ended: dict[str, Any] = {"exit_code": code, "seconds": seconds}
    unwritten = (
        _full_disk_error(lambda: state.event_log.append("sweep_ended", **ended)) or unwritten
    )
    # If the history cannot be written, only estimates are worse.
    _full_disk_error(lambda: record_measurements(location.store, statistics.work))
    state.tracker.finish(code)
    return unwritten


def _full_disk_error(write: Callable[[], object]) -> OSError | None:
    """Write something; returns the error of a full disk."""
    try:
        write()
    except OSError as problem:
        if not is_disk_full(problem):
            raise
        return problem
    return None


UNRECORDED = ("started", "work")  # fields of RunStatistics that outcome.json does not have
STATES = {
    DONE: "done",
    FAILED: "failed",
    BAD_INPUT: "refused",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}
