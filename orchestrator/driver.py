"""Run a sweep, which is also to resume it: plan, prepare, tune, tell. The only writer.

Nothing heavy is imported where nothing is left to do.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec
from orchestrator.audit_card import Audited, audited
from orchestrator.audits import known_card
from orchestrator.budget import Purse
from orchestrator.disk import full
from orchestrator.dispatch import Dispatcher
from orchestrator.estimate import (
    mean_seconds,
    read_history,
    remember,
)
from orchestrator.failures import CLASSES, Failure, no_room
from orchestrator.fit import Machine, misfit, room, this_machine
from orchestrator.freshness import accept, remedy
from orchestrator.ledger import SweepBusy
from orchestrator.lineage import commit, diff_digest, dirty, uncommitted
from orchestrator.parent import ending_of, parent_of, status_of
from orchestrator.place import (
    BUDGET,
    DONE,
    FAILED,
    INTERRUPTED,
    REFUSED,
    TERMINATED,
    Place,
    Refused,
    read_outcome,
    whoami,
)
from orchestrator.plan import (
    Need,
    Plan,
    holds,
    moved_slots,
    needs_of,
    plan_sweep,
    possible_trials,
)
from orchestrator.publish import Publisher
from orchestrator.remote import RemoteAway
from orchestrator.resolve import text_digest
from orchestrator.results import standing
from orchestrator.running import Run
from orchestrator.screen import Screen
from orchestrator.store import ArtifactStore, StoreFull, maker
from orchestrator.studies import StudiesAway
from orchestrator.sweep import JOURNAL, Budget, Cell, SweepSpec

if TYPE_CHECKING:
    from orchestrator.ahead import Ahead
    from orchestrator.prepare import Watcher
    from orchestrator.workshop import Workshop

log = logging.getLogger(__name__)


class StoreLost(RuntimeError):
    """Bucket or studies do not answer any more, or another driver took the sweep over."""


LOST = (RemoteAway, SweepBusy, StudiesAway)
GO_ON = "what is done is there, and the same command goes on with the rest"


def run_sweep(
    sweep: SweepSpec,
    place: Place,
    screen: Screen,
    *,
    tracking_uri: str | None = None,
    prepare_only: bool = False,
    origin: dict[str, Any] | None = None,
    accept_code: Sequence[str] = (),
    retry: str | None = None,
) -> int:
    """Do what is left of a sweep and say how it stands.

    Args:
        origin: how the sweep was asked for (sets, only), kept so that it can be read again.
        accept_code: stages whose artifacts count although other code has made them.
        retry: the only class of failures to try again; None: all.

    Returns:
        The exit code; `outcome.json` says the same.

    Raises:
        Refused, SweepBusy, StoreRefused, RemoteAway, StudiesAway: before anything started.
        StoreLost: later.
        StoreFull: there was no room for what was made, or for saying how it ended.
    """
    ledger, resolver = place.ledger(), place.resolver()
    plan = plan_sweep(sweep, place.store, resolver, ledger)
    _settle_code(plan, place, accept_code)
    given_up = _given_up(standing(ledger).failures, retry)
    if plan.done + len(plan.pruned) == plan.total and standing(ledger).exit_code == DONE:
        if ledger.path.exists():  # a file that only lost cells asks for no work, but is the sweep
            _open_folder(place, sweep, origin or {})
        screen.say(f"{sweep.name}: nothing to do")
        return DONE
    problem = does_not_fit(plan, place.store)
    if problem:
        raise Refused(problem)
    use = place.store.locks.use()
    diff = uncommitted()
    # Workers have no .git and may run as somebody else.
    made = {"DIRTY": dirty(diff), "COMMIT": commit(), "USER": whoami()}
    made["SWEEP"] = f"{place.project}/{place.name}"
    os.environ |= {f"AIRSWEEP_{name}": value for name, value in made.items()}
    publisher = Publisher(sweep, parent_of(sweep, place, maker()), place.store, tracking_uri)
    publisher.check(reach=not prepare_only)
    _check_studies(plan)
    if place.store.mirror is not None and publisher.in_store and not prepare_only:
        screen.say(
            f"tracking goes to a file in {place.store.root}, which this machine alone sees; give "
            "--tracking-uri http://... for one that all see"
        )
    with _told_where_full(plan, place):
        place.store.settle()
        ledger.lock()
    purse = Purse(sweep.budget, sweep.resources, mean_seconds(read_history(place.store)))
    run = Run(sweep, place, screen, publisher, ledger, resolver, purse, given_up=given_up)
    code = FAILED  # what an exception leaves behind
    cluster = ExitStack()
    try:
        with _told_where_full(plan, place):
            _heed_signals(run)
            _open_folder(place, sweep, origin or {}, diff)
            ledger.append(
                "sweep_started",
                spec=text_digest(sweep.text),
                total=plan.total,
                to_run=plan.to_run,
                asks=plan.asks,
                pid=os.getpid(),
                **maker(),
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
    finally:
        _heard()
        screen.close()
        # Ray ends last: who is being stopped has seconds until SIGKILL, and should have told by
        # then how it ended.
        with cluster, use:
            try:
                untold = _close(run, code)
            except LOST as lost:
                raise StoreLost(f"{lost}; {GO_ON}") from lost
            finally:
                ledger.unlock()
    if untold is not None:
        raise StoreFull(full(plan, place.store, _first_line(untold)))
    return code


@contextmanager
def _told_where_full(plan: Plan, place: Place) -> Iterator[None]:
    """
    Raises:
        StoreFull: there was no room for something.
    """
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        raise StoreFull(full(plan, place.store, _first_line(error))) from error


def _first_line(problem: BaseException) -> str:
    return f"{problem}".strip().partition("\n")[0]


def _settle_code(plan: Plan, place: Place, accepted: Sequence[str]) -> None:
    """
    Raises:
        Refused: something is there that other code has made, and nobody said that it counts.
    """
    stale = plan.stale(place.store)
    left = [one for one in stale if one.stage not in accepted]
    if left:
        raise Refused(f"{'; '.join(map(str, left))}: {remedy(left)}")
    if stale:
        accept(stale, f"{place.project}/{place.name}", place.store)


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


def _open_folder(place: Place, sweep: SweepSpec, origin: dict[str, Any], diff: bytes = b"") -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    kept = {"spec.yaml": sweep.text, "resolved.json": json.dumps(origin, indent=1, sort_keys=True)}
    for name, text in kept.items():
        path = place.folder / name
        if not path.exists() or path.read_text() != text:
            place.write(name, text)
    if diff:
        place.write(f"uncommitted-{diff_digest(diff)}.diff", diff)


def _work(run: Run, plan: Plan, prepare_only: bool, cluster: ExitStack) -> int:
    """Group after group: cells without images first, then those that share a row of images.

    Args:
        cluster: is given Ray's end, where Ray has to be started.
    """
    searches = _searches(run, plan)
    groups = deque(_groups(plan, run))
    assignments = run.sweep.seeds.assignments()
    rows = functools.cache(lambda: audited(possible_trials(plan.cells, assignments, run.resolver)))
    while groups:
        cells = groups.popleft()
        needs = _needs(run, plan, cells)
        dispatcher = Dispatcher(
            run.sweep,
            cells,
            searches,
            run.place.store,
            run.resolver,
            run.ledger,
            run.outcome,
            run.purse.affords,
            run.no_hope,
            run.given_up,
        )
        job = None if prepare_only else dispatcher.peek()
        if dispatcher.out_of_budget():
            return _out_of_budget(run)
        if job is None and not (prepare_only and _incomplete(needs, run.place.store)):
            continue  # all of it was known
        if not run.machines:
            run.machines = _start_cluster(cluster, run)
            problem = does_not_fit(plan, run.place.store, run.machines)
            if problem:
                raise Refused(problem)
        if not run.purse.affords_preparing(needs, run.place.store, _workers(run)):
            return _out_of_budget(run)
        _prepare(run, cells, needs)
        beside = _begun(run, [_sheet(run, needs), _cards(run, rows())])
        if job is not None:
            ahead = _ahead(run, plan, groups[0]) if groups else None
            _tune(run, dispatcher)
            _wait_for(ahead, run)
        if beside is not None:
            beside.tell()
        if dispatcher.out_of_budget():
            return _out_of_budget(run)
        lost = dispatcher.gave_up()
        if lost is not None and lost.failure_class == "disk":
            raise StoreFull(lost.message)
        if lost is not None:
            count = CLASSES[lost.failure_class].stops_after
            run.screen.say(f"stopped after {count} equal errors: {lost.message}")
            return FAILED
        if dispatcher.moving:  # the same cells again, with what they need in fp32
            run.moving += [replace(slot.spec, precision="fp32") for slot in dispatcher.moving]
            groups.appendleft(cells)
            searches = _searches(run, plan)
    failed = run.tally.states.get("failed", 0) or run.hopeless
    return FAILED if failed else DONE


def _needs(run: Run, plan: Plan, cells: Sequence[Cell]) -> list[Need]:
    """What some cells read, also in trials that went on in fp32."""
    ids, moved = {cell.id for cell in cells}, moved_slots(run.ledger)
    earlier = [slot.spec for slot in plan.slots if slot.cell.id in ids and slot.id in moved]
    possible = possible_trials(cells, run.sweep.seeds.assignments(), run.resolver)
    return needs_of([*possible, *earlier, *run.moving])


def _out_of_budget(run: Run) -> int:
    run.screen.say(run.purse.refusal)
    return BUDGET


def _workers(run: Run) -> int:
    """How many stages are made side by side."""
    want = run.sweep.resources.generator
    return want.actors or room(want, run.machines)


def _incomplete(needs: Sequence[Need], store: ArtifactStore) -> bool:
    return any(need.have(store) < need.total() for need in needs)


def _groups(plan: Plan, run: Run) -> list[list[Cell]]:
    """Cells by the images that they read, in the order of the cells; none first."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    assignments = run.sweep.seeds.assignments()
    for cell in plan.cells:
        needs = needs_of(possible_trials([cell], assignments, run.resolver))
        rows = tuple(sorted(str(need.key) for need in needs if need.stage == "images"))
        groups.setdefault(rows, []).append(cell)
    return [groups[rows] for rows in sorted(groups, key=bool)]


def _searches(run: Run, plan: Plan) -> dict[str, Any]:
    if run.sweep.search is None or not any(cell.space for cell in plan.cells):
        return {}
    from orchestrator.search import open_searches

    place = run.place
    owner = (place.store.name, place.project, place.name)
    return dict(open_searches(plan, run.ledger, place.folder / "studies.journal", owner))


def _check_studies(plan: Plan) -> None:
    """Where studies are in a database: does it answer, before any work?

    Raises:
        ValueError: it lets us not in.
        StudiesAway: it does not answer.
    """
    search = plan.sweep.search
    if search is None or search.storage == JOURNAL or not any(cell.space for cell in plan.cells):
        return
    from orchestrator.search import open_database

    open_database(search.storage)


def does_not_fit(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """What would wait for ever; None: nothing, or this is told only once the cluster is joined."""
    if machines is None:
        if os.environ.get("RAY_ADDRESS"):
            return None
        machines = [this_machine()]
    return misfit(plan.sweep.resources, machines, _incomplete(plan.needs, store))


def _start_cluster(cluster: ExitStack, run: Run) -> tuple[Machine, ...]:
    from orchestrator.session import MemoryPeak, ray_session

    run.screen.say("starting Ray")
    machines = cluster.enter_context(ray_session(functools.partial(_lost, run)))
    run.peak = MemoryPeak()
    _heed_signals(run)  # ray.init replaces the handlers that were there before
    return machines


def _heed_signals(run: Run) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, functools.partial(_terminated, run))
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a shell's background job
            signal.signal(signal.SIGINT, functools.partial(_interrupted, run))


def _terminated(run: Run, number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: now it is told how it ended
    run.stopped = run.stopped or TERMINATED
    _insist(SystemExit(run.stopped))


def _interrupted(run: Run, number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who asks twice does not wait
    run.stopped = run.stopped or INTERRUPTED
    _insist(KeyboardInterrupt())


INSIST_EVERY = 1.0  # seconds


def _insist(stop: BaseException) -> NoReturn:
    """Raise, and raise again until `_heard`.

    A signal may come while other code runs that drops whatever is raised there: a callback of Ray,
    a finalizer. The run would go on as if nobody had asked.
    """

    def again(number: int, frame: Any) -> None:
        raise stop

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, INSIST_EVERY, INSIST_EVERY)
    raise stop


def _heard() -> None:
    """It ends, for whatever reason."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _lost(run: Run) -> None:
    run.stopped = FAILED
    log.error("Ray died here: it was killed, or had no memory left; the same command goes on")
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _workshop(run: Run) -> Workshop:
    from orchestrator.workshop import Workshop

    gpu = run.sweep.resources.trial.gpu
    batch = run.sweep.resources.encoder.batch
    return Workshop(run.place.store, run.place.data_root, "cuda" if gpu else "cpu", batch)


def _prepare(run: Run, cells: Sequence[Cell], needs: Sequence[Need]) -> None:
    from orchestrator.prepare import prepare

    store = run.place.store
    left = {str(need.key): need.total() - need.have(store) for need in needs}
    left = {key: count for key, count in left.items() if count}
    run.ledger.append("cells_waiting", cells=[cell.id for cell in cells], artifacts=left)
    prepare(_hopeful(run, needs), _workshop(run), run.sweep.resources, run)
    run.ledger.append("cells_ready")


def _begun(run: Run, works: Sequence[Callable[[Watcher], None] | None]) -> Ahead | None:
    """What no trial waits for, one after the other: so one worker imports torch for all of it."""
    wanted = [work for work in works if work is not None]
    if not wanted:
        return None
    from orchestrator.ahead import Ahead

    def make(watcher: Watcher) -> None:
        for work in wanted:
            work(watcher)

    return Ahead(make, run)


def _sheet(run: Run, needs: Sequence[Need]) -> Callable[[Watcher], None] | None:
    """Draws the contact sheet, where it is missing."""
    store = run.place.store
    rows = [
        need.spec
        for need in needs
        if isinstance(need.spec, SyntheticFeaturesSpec) and need.have(store) == need.total()
    ]
    sheet = run.place.folder / "contact_sheet.png"
    if not rows or sheet.exists():
        return None
    from orchestrator.prepare import contact_sheet

    drawn, base = _shown(rows)
    features = next(need.spec for need in needs if isinstance(need.spec, FeaturesSpec))

    def draw(watcher: Watcher) -> None:
        png, run.tally.shares = contact_sheet(drawn, base, features, _workshop(run))
        run.place.write(sheet.name, png)

    return draw


def _cards(run: Run, rows: Sequence[Audited]) -> Callable[[Watcher], None] | None:
    """Makes the audit cards of rows that are whole by now, where they are missing."""
    store = run.place.store
    whole = [row for row in rows if row.need.have(store) == row.need.total()]
    new = [row for row in whole if known_card(row, run.place) is None]
    if not new:
        return None
    from orchestrator.prepare import audit

    def look(watcher: Watcher) -> None:
        for row in new:
            try:
                files = audit(row, _workshop(run), watcher)
            except Exception as problem:  # a sweep is not about its audit
                log.warning("%s: no card: %s", row.name, _first_line(problem))
                continue
            for name, content in files.items():
                run.place.write(name, content)

    return look


def _hopeful(run: Run, needs: Sequence[Need]) -> list[Need]:
    """Without what this run has tried often enough, and what would be made from it."""
    lost = [need.spec for need, _ in run.hopeless]
    return [need for need in needs if not any(holds(need.spec, one) for one in lost)]


def _ahead(run: Run, plan: Plan, cells: Sequence[Cell]) -> Ahead | None:
    """Begin what the next cells read. Not on a budget, which trials might spend meanwhile."""
    if run.sweep.budget != Budget():
        return None
    from orchestrator.ahead import Ahead, can_come_ahead
    from orchestrator.prepare import prepare

    needs = can_come_ahead(_hopeful(run, _needs(run, plan, cells)), run.place.store)
    if not needs:
        return None
    shop, resources = _workshop(run), run.sweep.resources
    return Ahead(lambda watcher: prepare(needs, shop, resources, watcher), run)


def _wait_for(ahead: Ahead | None, run: Run) -> None:
    if ahead is not None:
        started = time.monotonic()
        ahead.tell()
        run.tally.add_wall("lora", time.monotonic() - started)


def _shown(
    rows: Sequence[SyntheticFeaturesSpec],
) -> tuple[SyntheticFeaturesSpec, SyntheticFeaturesSpec | None]:
    """The row to show, and the one without LoRA to show it against.

    The row that trials read comes after those that it was made from.
    """
    tuned = [row for row in rows if getattr(row.images, "lora", None) is not None]
    plain = [row for row in rows if getattr(row.images, "lora", None) is None]
    if tuned:
        return tuned[-1], plain[-1] if plain else None
    return plain[-1], None


def _tune(run: Run, dispatcher: Dispatcher) -> None:
    from orchestrator.tuning import run_points

    fits = room(run.sweep.resources.trial, run.machines)
    figures = run_points(
        dispatcher,
        _workshop(run),
        run.sweep.resources,
        run.place.folder / "tune",
        fits,
        run,
    )
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
    facts["shares"] = tally.shares or read_outcome(run.place).get("run", {}).get("shares", {})
    outcome = {
        "exit_code": code,
        "state": STATES.get(code, "failed"),
        "seconds": seconds,
        "run": facts,
    }
    text = json.dumps(outcome, indent=1, sort_keys=True)
    untold = _no_room_for(lambda: run.place.write("outcome.json", text))
    if untold is not None and code == DONE:
        code = FAILED  # else the same command would find nothing to do
    ended: dict[str, Any] = {"exit_code": code, "seconds": seconds}
    untold = _no_room_for(lambda: run.ledger.append("sweep_ended", **ended)) or untold
    _no_room_for(lambda: remember(run.place.store, tally.work))  # estimates do without
    run.publisher.finish(
        status_of(code),
        lambda folder: ending_of(run.sweep, run.place, folder),
        hasty=code == TERMINATED,
    )
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
