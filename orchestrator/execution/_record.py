"""What a run records in the folder of its sweep: its files and its start, and how it ended."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from air_core.tools.seal import sealed_json
from orchestrator.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    TERMINATED,
    BucketUnreachable,
    Refused,
    StoreFull,
    StoreLost,
    SweepBusy,
)
from orchestrator.execution._signals import restore_interrupts
from orchestrator.execution._state import RunState
from orchestrator.failures import first_line, is_disk_full
from orchestrator.planning import Plan, Resolver
from orchestrator.planning.checks import full_disk_message
from orchestrator.planning.estimate import record_measurements
from orchestrator.planning.plan import write_ledger
from orchestrator.planning.requests import complete_origin
from orchestrator.planning.resolve import text_digest
from orchestrator.spec import notes_of
from orchestrator.spec.marked_yaml import SpecError
from orchestrator.store import SweepLocation, read_outcome
from orchestrator.store.artifacts import provenance
from orchestrator.store.location import RESOLVED
from orchestrator.store.verification import read_cache

# During a run; before it they refuse the run.
LOST = (BucketUnreachable, SweepBusy)
RESUME_HINT = "finished work is kept, and the same command resumes the sweep"
UNRECORDED = ("started", "work")  # fields of RunStatistics that outcome.json does not have
# Exit codes of a run that an exception ends; the first match counts.
CODES: Mapping[type[BaseException], int] = {
    Refused: REFUSED,
    SpecError: BAD_INPUT,
    KeyboardInterrupt: INTERRUPTED,
    BaseException: FAILED,
}
STATES = {
    DONE: "done",
    BAD_INPUT: "refused",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}


def write_sweep_files(
    location: SweepLocation,
    plan: Plan,
    origin: Mapping[str, Any] | None,
    resolver: Resolver,
) -> None:
    """Write ledger, sweep file and resolved inputs into the sweep's folder."""
    sweep = plan.sweep
    location.folder.mkdir(parents=True, exist_ok=True)
    complete = complete_origin(origin or {}, location)
    for plugin in sweep.plugins:
        # Not in a subfolder: folders are downloaded from buckets without theirs.
        location.write(f"plugin-{plugin.digest}.py", plugin.text)
    # With `--only` a run has fewer inputs than earlier ones; the code is that of this run only.
    current: dict[str, Any] = resolver.inputs()
    before: dict[str, Any] = read_cache(
        location.folder / RESOLVED, lambda resolved: resolved.get("inputs") or {}, {}
    )
    inputs = {kind: {**before.get(kind, {}), **found} for kind, found in current.items()}
    resolved = sealed_json({**complete, "inputs": {**inputs, "code": current["code"]}})
    write_ledger(location, plan)
    location.write("spec.yaml", sweep.text)
    location.write(RESOLVED, resolved)


def log_start(state: RunState, plan: Plan) -> None:
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
    for note in notes_of(plan.sweep, plan.cells):
        state.screen.message(f"note: {note}")


@contextmanager
def explain_full_disk(location: SweepLocation) -> Iterator[None]:
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


@contextmanager
def recorded_end(state: RunState) -> Iterator[None]:
    """Record how the block ends: in the event log, in outcome.json and in the tracker.

    A signal ends the block without an exception; `state.exit_code` has its code.

    Raises:
        StoreFull: the disk is full, for an artifact or for the record of the end.
        StoreLost: the bucket stopped answering, or another driver took over.
    """
    try:
        with explain_full_disk(state.location):
            yield
    except BaseException as problem:
        # Ray's waiting calls replace the code of a SystemExit by 1, and Ray Tune turns one that
        # reaches it while it creates a trial into an error: the signal's code counts.
        state.exit_code = state.signal_exit_code or _exit_code(problem)
        if isinstance(problem, LOST):
            raise StoreLost(f"{problem}; {RESUME_HINT}") from problem
        is_stop = isinstance(problem, KeyboardInterrupt | SystemExit)
        if not (is_stop or state.signal_exit_code):
            raise
    finally:
        state.screen.close()
        try:
            with state.screen.waiting("recording the end"), explain_full_disk(state.location):
                _record_end(state)
        except LOST as lost:
            raise StoreLost(f"{lost}; {RESUME_HINT}") from lost
        finally:
            state.event_log.unlock()
            restore_interrupts()


def _exit_code(problem: BaseException) -> int:
    if isinstance(problem, SystemExit) and isinstance(problem.code, int):
        # Ray's handler, which is installed during ray.init, exits with the number of the signal.
        return TERMINATED if problem.code == signal.SIGTERM else problem.code
    return next(code for kind, code in CODES.items() if isinstance(problem, kind))


def _record_end(state: RunState) -> None:
    """Write outcome.json and the last event, and finish the tracker.

    Raises:
        OSError: a file could not be written, because the disk is full.
    """
    code, statistics, location = state.exit_code, state.statistics, state.location
    statistics.memory = state.memory_peak.stop() if state.memory_peak else 0
    seconds = round(time.monotonic() - statistics.started, 1)
    facts = {name: value for name, value in vars(statistics).items() if name not in UNRECORDED}
    facts["shares"] = statistics.shares or read_outcome(location).get("run", {}).get("shares", {})
    outcome = {"exit_code": code, "state": STATES.get(code, "failed")}
    outcome |= {"seconds": seconds, "run": facts}
    full: list[OSError] = []

    def write(do: Callable[[], object]) -> None:
        try:
            do()
        except OSError as problem:
            if not is_disk_full(problem):
                raise
            full.append(problem)

    write(lambda: location.write("outcome.json", sealed_json(outcome)))
    if full and code == DONE:
        code = FAILED  # otherwise the same command would have nothing to do
    write(lambda: state.event_log.append("sweep_ended", exit_code=code, seconds=seconds))
    unwritten = full[:]
    # If the history cannot be written, only estimates are worse.
    write(lambda: record_measurements(location.store, statistics.work))
    state.tracker.finish(code)
    for problem in unwritten[-1:]:
        raise problem
