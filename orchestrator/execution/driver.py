"""Runs a sweep, or resumes it: plan, check, prepare inputs, run trials, record the end.

The driver is the only process that writes the event log. Heavy libraries are imported only when
there is work to do.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from orchestrator.environment import joins_existing_cluster
from orchestrator.errors import DONE, FAILED, Refused, StoreFull
from orchestrator.execution._preparation import Preparation, worker_context
from orchestrator.execution._record import (
    explain_full_disk,
    log_start,
    recorded_end,
    write_sweep_files,
)
from orchestrator.execution._repair import plan_and_repair
from orchestrator.execution._scheduler import TrialScheduler
from orchestrator.execution._signals import handle_signals, on_ray_death
from orchestrator.execution._state import RunState
from orchestrator.execution.checks import (
    check_store_and_services,
    is_complete,
    lock,
    refuse_unused_gpus,
)
from orchestrator.execution.screen import Screen
from orchestrator.failures import CLASSES
from orchestrator.formatting import format_duration
from orchestrator.git import commit
from orchestrator.planning import (
    OutcomeTracker,
    Plan,
    changed_inputs,
    earlier_results,
    resolver_of,
    unschedulable_reason,
)
from orchestrator.planning.history import read_history
from orchestrator.spec import Cell, SweepSpec
from orchestrator.store import SweepLocation, user_name

if TYPE_CHECKING:
    from orchestrator.execution._allocation import Allocation
    from orchestrator.planning.search import CellSearch


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
    event_log, resolver = location.event_log(), resolver_of(location, sweep.folders)
    plan = plan_and_repair(sweep, location, resolver, screen)
    sweep = plan.sweep  # with memory of its trials and defaults of its generators
    for line in changed_inputs(earlier_results(plan, location)):
        screen.message(line)
    if is_complete(plan):
        if event_log.path.exists():  # record the current file, which may have fewer cells
            write_sweep_files(location, plan, origin, resolver)
        screen.message(f"{sweep.name}: nothing to do")
        tracker.export()
        return DONE
    check_store_and_services(plan, location, tracker, screen, prepare_only)
    # Shut Ray down last: after SIGTERM only seconds remain before SIGKILL, so record the end first.
    with ExitStack() as ray_session, location.store.locks.shared_store():
        os.environ |= {  # `PROVENANCE`, which the `WorkerContext` passes to the workers
            "AIRSWEEP_COMMIT": commit(),
            "AIRSWEEP_USER": user_name(),
            "AIRSWEEP_SWEEP": location.full_name,
        }
        with explain_full_disk(location):
            location.store.initialize()
            lock(event_log, location)
        resolver.save()  # a new store did not exist when the plan was made
        state = RunState(sweep, location, screen, tracker, event_log, resolver)
        with recorded_end(state):
            handle_signals(state)
            if read_history(event_log).last != plan.history.last:  # another driver ran meanwhile
                plan = plan_and_repair(sweep, location, resolver, screen)
            write_sweep_files(location, plan, origin, resolver)
            log_start(state, plan)
            state.exit_code = _run_cells(state, plan, prepare_only, ray_session)
    return state.exit_code


# ---------------------------------------------------------------- the work


def _run_cells(state: RunState, plan: Plan, prepare_only: bool, ray_session: ExitStack) -> int:
    """Prepare inputs and run the trials of all cells, each as soon as its inputs exist; returns the
    exit code.

    Args:
        ray_session: receives the end of Ray, if Ray has to be started.

    Raises:
        StoreFull: a trial found the disk full.
    """
    groups = _cell_groups(state, plan)
    preparation = Preparation(state, plan, groups, prepare_only)
    scheduler = _trial_scheduler(state, plan, groups, preparation)
    while (job := None if prepare_only else scheduler.peek()) or preparation.pending:
        if state.allocation is None:
            _start_ray(state, plan, ray_session)
            if not prepare_only:
                state.tracker.start()
        preparation.start()
        if job is not None:
            _run_trials(state, scheduler, preparation)
        else:
            preparation.wait()
        if failure := scheduler.stopping_failure():
            if failure.failure_class == "disk":
                raise StoreFull(failure.message)
            count = CLASSES[failure.failure_class].stops_after
            state.screen.message(f"stopped after {count} equal errors: {failure.message}")
            return FAILED
    preparation.finish()
    failed = state.statistics.states.get("failed", 0) or state.failed_requirements
    return FAILED if failed else DONE


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


def _cell_groups(state: RunState, plan: Plan) -> list[list[Cell]]:
    """Cells that read the same images and denoising errors together. Cells without any come first,
    then the group that lacks the fewest blocks."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    missing: dict[tuple[str, ...], int] = {}
    store = state.location.store
    for cell in plan.cells:
        row_requirements = [each for each in plan.inputs([cell]) if each.spec.is_drawn]
        rows = tuple(sorted(str(requirement.key) for requirement in row_requirements))
        groups.setdefault(rows, []).append(cell)
        missing[rows] = sum(
            requirement.total() - requirement.have(store) for requirement in row_requirements
        )
    return [groups[rows] for rows in sorted(groups, key=lambda rows: (bool(rows), missing[rows]))]


def _trial_scheduler(
    state: RunState, plan: Plan, groups: Sequence[Sequence[Cell]], preparation: Preparation
) -> TrialScheduler:
    searches: Mapping[str, CellSearch] = {}
    if state.sweep.search is not None and any(cell.space for cell in plan.cells):
        from orchestrator.planning.search import open_searches

        searches = open_searches(plan)
    scheduler = TrialScheduler(
        state.sweep,
        groups,
        searches,
        state.location.store,
        state.resolver,
        state.event_log,
        plan.history,
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
    refuse_unused_gpus(plan, state.location, state.allocation.machines())
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
