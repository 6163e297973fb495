"""Checks before a run starts: the store, the machines, the services and other drivers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.environment import joins_existing_cluster
from orchestrator.errors import DONE, Refused, SweepBusy
from orchestrator.execution.screen import Screen
from orchestrator.formatting import format_time
from orchestrator.planning import (
    Machine,
    OutcomeTracker,
    Plan,
    unschedulable_reason,
    unused_gpus_reason,
)
from orchestrator.planning.requests import results_command
from orchestrator.store import EventLog, SweepLocation, is_bucket


def is_complete(plan: Plan) -> bool:
    return plan.ended == plan.total and plan.history.exit_code == DONE


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
    if is_complete(plan):
        return
    check_store_and_services(plan, location, tracker, screen)
    if location.event_log().is_locked():
        raise _busy(location)
    from orchestrator.cluster import ray_session, refuse_unfit_machine, refuse_unfit_nodes

    if not joins_existing_cluster():
        refuse_unfit_machine(plan, location, screen.message)
        return
    with ray_session() as machines:
        if problem := unschedulable_reason(plan, location.store, machines):
            if not plan.sweep.resources.wait:
                raise Refused(problem)
            screen.message(f"a run would wait for machines: {problem}")
        refuse_unused_gpus(plan, location, machines)
        refuse_unfit_nodes(plan, location, screen.message)


def check_store_and_services(
    plan: Plan,
    location: SweepLocation,
    tracker: OutcomeTracker,
    screen: Screen,
    prepare_only: bool = False,
) -> None:
    """
    Raises:
        ValueError: this user may not write to the store, a server rejects the credentials, or real
            models would run on CPUs beside GPUs.
        Refused, TrackerUnreachable: no machine can ever run a process of the sweep, or a server
            does not answer.
    """
    from orchestrator.cluster.session import check_address

    location.store.check_writable()
    refuse_unused_gpus(plan, location)
    if problem := unschedulable_reason(plan, location.store):
        raise Refused(problem)
    check_address()
    tracker.check(reach=not prepare_only)
    if is_bucket(location.store.name) and tracker.in_store and not prepare_only:
        screen.message(
            f"MLflow writes to a file in {location.store.root}, which only this machine can read; "
            "give --tracking-uri http://... to share the results"
        )


def refuse_unused_gpus(
    plan: Plan, location: SweepLocation, machines: Sequence[Machine] | None = None
) -> None:
    """
    Raises:
        SpecError: real models would run on CPUs beside GPUs.
    """
    if problem := unused_gpus_reason(plan, location.store, machines):
        raise plan.sweep.document.key_error(("resources",), problem)


def lock(event_log: EventLog, location: SweepLocation) -> None:
    """
    Raises:
        SweepBusy: another driver runs the sweep.
    """
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
