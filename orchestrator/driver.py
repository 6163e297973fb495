"""Run a sweep, which is also to resume it: plan, prepare, tune, tell. The only writer.

Nothing heavy is imported where nothing is left to do.
"""

from __future__ import annotations

import functools
import getpass
import json
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec, TrialSpec
from orchestrator.budget import Purse
from orchestrator.dispatch import Dispatcher, Outcome
from orchestrator.estimate import (
    Work,
    mean_seconds,
    read_history,
    remember,
    stage_work,
    trial_work,
)
from orchestrator.failures import CLASSES, EQUAL_ERRORS, Failure
from orchestrator.fit import Machine, misfit, room, this_machine
from orchestrator.freshness import accept, remedy
from orchestrator.ledger import Ledger
from orchestrator.lineage import commit, diff_digest, dirty, uncommitted
from orchestrator.plan import (
    Need,
    Plan,
    holds,
    moved_slots,
    name_of,
    needs_of,
    plan_sweep,
    possible_trials,
)
from orchestrator.publish import Publisher
from orchestrator.report import rows
from orchestrator.resolve import Resolver, text_digest
from orchestrator.results import entries_of, standing
from orchestrator.screen import Screen
from orchestrator.store import VERSION, ArtifactStore, maker, open_store, write_whole
from orchestrator.sweep import Cell, SweepSpec
from orchestrator.tables import table
from orchestrator.tracking import Status, SweepRun

if TYPE_CHECKING:
    from orchestrator.workshop import Workshop

DONE, FAILED, BAD_INPUT, REFUSED, BUDGET, GATE = range(6)
INTERRUPTED, TERMINATED = 130, 143


@dataclass(frozen=True)
class Place:
    """Where a sweep lives: the store, its folder in it, the datasets."""

    store: ArtifactStore
    project: str
    name: str
    data_root: Path | None

    @property
    def folder(self) -> Path:
        return self.store.root / "sweeps" / self.project / self.name

    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    def resolver(self) -> Resolver:
        return Resolver(self.store.root / "digests.json", self.data_root)


class Refused(RuntimeError):
    """Refused before anything started; exit code 3."""


def place_of(sweep: SweepSpec, root: Path, data_root: Path | None) -> Place:
    """Where a sweep goes.

    Raises:
        Refused: a relative store inside a Ray job.
        StoreRefused: another version of airsweep made the store.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not root.is_absolute():
        raise Refused(
            f"the store {str(root)!r} is relative, and this is a Ray job: its working directory "
            "is thrown away at the end; give --store or AIRSWEEP_STORE an absolute folder that "
            "every node sees"
        )
    project = sweep.project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    data = data_root or os.environ.get("AIRSWEEP_DATA") or sweep.data_root
    return Place(open_store(root), project, sweep.name, Path(data) if data else None)


@dataclass
class Tally:
    """What a run did, for the last lines of its screen."""

    started: float = field(default_factory=time.monotonic)
    walls: dict[str, float] = field(default_factory=dict)  # seconds by phase
    # Seconds and units by stage and kind.
    work: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    drawn: int = 0
    redrawn: int = 0
    holes: int = 0
    states: dict[str, int] = field(default_factory=dict)
    overheads: list[float] = field(default_factory=list)
    memory: int = 0  # bytes
    shares: dict[str, float] = field(default_factory=dict)  # what CLIP recognises, by group

    def add_wall(self, phase: str, seconds: float) -> None:
        self.walls[phase] = self.walls.get(phase, 0.0) + seconds

    def add_work(self, work: Work, seconds: float) -> None:
        before = self.work.get((work.stage, work.kind), (0.0, 0.0))
        self.work[work.stage, work.kind] = (before[0] + seconds, before[1] + work.units)


@dataclass
class Run:
    """One run of the driver."""

    sweep: SweepSpec
    place: Place
    screen: Screen
    publisher: Publisher
    ledger: Ledger
    resolver: Resolver
    purse: Purse
    tally: Tally = field(default_factory=Tally)
    machines: tuple[Machine, ...] = ()  # none before Ray is there
    terminated: bool = False
    hopeless: list[tuple[Need, Failure]] = field(default_factory=list)
    given_up: dict[str, Failure] = field(default_factory=dict)  # by slot: not tried again
    moving: list[TrialSpec] = field(default_factory=list)  # go on in fp32
    last: dict[str, str] = field(default_factory=dict)  # state by slot

    # Watcher, for orchestrator.prepare.

    def prepared(self, need: Need, seconds: float, facts: dict[str, Any]) -> None:
        plain = {name: value for name, value in facts.items() if isinstance(value, int | float)}
        self.ledger.append(
            "artifact_prepared",
            stage=need.stage,
            key=str(need.key),
            seconds=round(seconds, 3),
            facts=plain,
        )
        self.tally.add_work(stage_work(need.spec), seconds)
        self.purse.prepared(seconds)
        if need.stage == "images":
            self.tally.drawn += facts["drawn"]
            self.tally.redrawn += facts["redrawn"]
            self.tally.holes += facts["holes"]
        self.screen.prepared(need)

    def failed(self, need: Need, failure: Failure) -> None:
        self.hopeless.append((need, failure))
        self.ledger.append("artifact_failed", key=str(need.key), **_said(need.stage, failure))
        self.screen.say(f"{name_of(need.key)}: failed ({failure.failure_class}): {failure.message}")

    def retried(self, need: Need, failure: Failure) -> None:
        self.ledger.append("artifact_retried", key=str(need.key), **_said(need.stage, failure))
        remedy = CLASSES[failure.failure_class].remedy
        self.screen.say(f"{name_of(need.key)}: {failure.message}; {remedy}")

    def progress(self, name: str, done: int, total: int) -> None:
        self.screen.progress(name, done, total)

    def phase(self, stage: str, seconds: float) -> None:
        self.tally.add_wall(stage, seconds)

    # Outcomes and lost hopes, for orchestrator.dispatch.

    def no_hope(self, trial: TrialSpec) -> Failure | None:
        """Why a trial cannot run: something that it reads could not be made."""
        needs = needs_of([trial]) if self.hopeless else []
        for need, failure in self.hopeless:
            if any(holds(one.spec, need.spec) for one in needs):
                message = f"{name_of(need.key)} failed: {failure.message}"
                return Failure(failure.failure_class, message)
        return None

    def outcome(self, outcome: Outcome) -> None:
        self.last[outcome.slot.id] = outcome.state  # one that moved to fp32 comes twice
        self.tally.states = dict(Counter(self.last.values()))
        told = None
        if not outcome.known:
            fields: dict[str, Any] = {
                "slot": outcome.slot.id,
                "cell": outcome.slot.cell.id,
                "key": outcome.slot.key.digest,
            }
            if outcome.state == "failed":
                fields |= {"failure_class": outcome.failure_class, "message": outcome.message}
            told = self.ledger.append(f"trial_{outcome.state}", **fields)
        if outcome.state == "done" and not outcome.known and outcome.record is not None:
            self.tally.add_work(trial_work(outcome.slot.spec), outcome.record.seconds)
            self.purse.trial_ended(outcome.slot.cell.id, outcome.record.seconds)
        self.publisher.trial(outcome, told)
        self.screen.outcome(outcome)


def _said(stage: str, failure: Failure) -> dict[str, str]:
    return {
        "stage": stage,
        "failure_class": failure.failure_class,
        "message": failure.message,
    }


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
        Refused, SweepBusy, StoreRefused: before anything started.
    """
    ledger, resolver = place.ledger(), place.resolver()
    plan = plan_sweep(sweep, place.store, resolver, ledger)
    _settle_code(plan, place, accept_code)
    given_up = _given_up(standing(ledger).failures, retry)
    if plan.done == plan.total and standing(ledger).exit_code == DONE:
        if ledger.path.exists():  # a file that only lost cells asks for no work, but is the sweep
            _open_folder(place, sweep, origin or {})
        screen.say(f"{sweep.name}: nothing to do")
        return DONE
    problem = does_not_fit(plan, place.store)
    if problem:
        raise Refused(problem)
    use = place.store.use()
    diff = uncommitted()
    # Workers have no .git and may run as somebody else.
    made = {"DIRTY": dirty(diff), "COMMIT": commit(), "USER": whoami()}
    os.environ |= {f"AIRSWEEP_{name}": value for name, value in made.items()}
    publisher = Publisher(sweep, parent_of(sweep, place, maker()), place.store, tracking_uri)
    publisher.check(reach=not prepare_only)
    ledger.lock()
    purse = Purse(sweep.budget, sweep.resources, mean_seconds(read_history(place.store.root)))
    run = Run(sweep, place, screen, publisher, ledger, resolver, purse, given_up=given_up)
    _open_folder(place, sweep, origin or {}, diff)
    code = FAILED  # what an exception leaves behind
    try:
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
        code = _work(run, plan, prepare_only)
    except Refused:
        code = REFUSED
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) and not run.terminated else TERMINATED
    finally:
        screen.close()
        _close(run, code)
        ledger.unlock()
        use.close()
    return code


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
    version = place.store.root / "VERSION"
    if not version.exists():
        write_whole(version, VERSION + "\n")
    kept = {"spec.yaml": sweep.text, "resolved.json": json.dumps(origin, indent=1, sort_keys=True)}
    for name, text in kept.items():
        path = place.folder / name
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
    if diff:
        write_whole(place.folder / f"uncommitted-{diff_digest(diff)}.diff", diff)


def _work(run: Run, plan: Plan, prepare_only: bool) -> int:
    """Group after group: cells without images first, then those that share a row of images."""
    searches = _searches(run, plan)
    with ExitStack() as stack:
        groups = deque(_groups(plan, run))
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
                run.machines = _start_cluster(stack, run)
                problem = does_not_fit(plan, run.place.store, run.machines)
                if problem:
                    raise Refused(problem)
            if not run.purse.affords_preparing(needs, run.place.store, _workers(run)):
                return _out_of_budget(run)
            _prepare(run, cells, needs)
            if job is not None:
                _tune(run, dispatcher)
            if dispatcher.out_of_budget():
                return _out_of_budget(run)
            if dispatcher.gave_up():
                run.screen.say(f"stopped after {EQUAL_ERRORS} equal errors: {dispatcher.gave_up()}")
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

    return dict(open_searches(plan, run.ledger, run.place.folder / "studies.journal"))


def does_not_fit(
    plan: Plan, store: ArtifactStore, machines: Sequence[Machine] | None = None
) -> str | None:
    """What would wait for ever; None: nothing, or this is told only once the cluster is joined."""
    if machines is None:
        if os.environ.get("RAY_ADDRESS"):
            return None
        machines = [this_machine()]
    return misfit(plan.sweep.resources, machines, _incomplete(plan.needs, store))


def _start_cluster(stack: ExitStack, run: Run) -> tuple[Machine, ...]:
    from orchestrator.session import MemoryPeak, ray_session

    run.screen.say("starting Ray")
    machines = stack.enter_context(ray_session())
    peak = MemoryPeak()
    stack.callback(lambda: setattr(run.tally, "memory", peak.stop()))
    # After ray.init, which replaces handlers that were there before.
    signal.signal(signal.SIGTERM, functools.partial(_terminated, run))
    return machines


def _terminated(run: Run, number: int, frame: Any) -> None:
    run.terminated = True  # Ray's waits turn a SystemExit of another code into 1
    raise SystemExit(TERMINATED)


def _workshop(run: Run) -> Workshop:
    from orchestrator.workshop import Workshop

    gpu = run.sweep.resources.trial.gpu
    batch = run.sweep.resources.encoder.batch
    return Workshop(run.place.store, run.place.data_root, "cuda" if gpu else "cpu", batch)


def _prepare(run: Run, cells: Sequence[Cell], needs: Sequence[Need]) -> None:
    from orchestrator.prepare import contact_sheet, prepare

    store = run.place.store
    left = {str(need.key): need.total() - need.have(store) for need in needs}
    left = {key: count for key, count in left.items() if count}
    run.ledger.append("cells_waiting", cells=[cell.id for cell in cells], artifacts=left)
    prepare(needs, _workshop(run), run.sweep.resources, run)
    run.ledger.append("cells_ready")
    rows = [
        need.spec
        for need in needs
        if isinstance(need.spec, SyntheticFeaturesSpec) and need.have(store) == need.total()
    ]
    sheet = run.place.folder / "contact_sheet.png"
    if rows and not sheet.exists():
        drawn, base = _shown(rows)
        features = next(need.spec for need in needs if isinstance(need.spec, FeaturesSpec))
        png, run.tally.shares = contact_sheet(drawn, base, features, _workshop(run))
        write_whole(sheet, png)


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
        run.progress,
    )
    run.tally.add_wall("trials", figures.wall)
    if figures.overhead is not None:
        run.tally.overheads.append(figures.overhead)


# ---------------------------------------------------------------- the end


def _close(run: Run, code: int) -> None:
    """Say how it ended, everywhere: ledger, outcome.json, tracker."""
    tally = run.tally
    remember(run.place.store.root, tally.work)
    seconds = round(time.monotonic() - tally.started, 1)
    facts = {name: value for name, value in vars(tally).items() if name not in HIDDEN}
    facts["shares"] = tally.shares or read_outcome(run.place).get("run", {}).get("shares", {})
    outcome = {
        "exit_code": code,
        "state": STATES.get(code, "failed"),
        "seconds": seconds,
        "run": facts,
    }
    run.ledger.append("sweep_ended", exit_code=code, seconds=seconds)
    text = json.dumps(outcome, indent=1, sort_keys=True)
    write_whole(run.place.folder / "outcome.json", text)
    run.publisher.finish(
        status_of(code), lambda: note_of(run.sweep, run.place), sweep_files(run.place)
    )


def status_of(code: int | None) -> Status:
    """An exit code as the state of a parent; None: the driver was killed."""
    return "FINISHED" if code == DONE else "FAILED" if code == FAILED else "KILLED"


def parent_of(sweep: SweepSpec, place: Place, made: Mapping[str, Any]) -> SweepRun:
    """A sweep as a tracker's parent.

    Args:
        made: who runs it, and with which code: user, commit.
    """
    return SweepRun(
        sweep=place.name,
        project=place.project,
        spec_hash=text_digest(sweep.text),
        note=sweep.question,
        user=made["user"],
        commit=made["commit"],
        source=f"airsweep run {sweep.source}",
    )


def note_of(sweep: SweepSpec, place: Place) -> str:
    """The parent's note: the table first, since long notes are folded; then the question."""
    plan = plan_sweep(sweep, place.store, place.resolver(), place.ledger())
    entries = entries_of(plan, place.store)
    found = rows(entries, sweep.search.objective if sweep.search else None)
    return f"{table(found, 'md', entries=entries)}\n\n{sweep.question}"


def sweep_files(place: Place) -> dict[str, Path]:
    """What a tracker's parent shows: the contact sheet, and code that was not committed."""
    found = [place.folder / "contact_sheet.png", *place.folder.glob("uncommitted-*.diff")]
    return {file.name: file for file in sorted(found) if file.exists()}


HIDDEN = ("started", "work")
STATES = {
    DONE: "done",
    FAILED: "failed",
    REFUSED: "refused",
    BUDGET: "budget",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}


def read_outcome(place: Place) -> dict[str, Any]:
    """outcome.json of the last run; empty if there is none."""
    try:
        outcome: dict[str, Any] = json.loads((place.folder / "outcome.json").read_text())
    except FileNotFoundError:
        return {}
    return outcome


def whoami() -> str:
    """Who runs this, for tags."""
    try:
        return os.environ.get("AIRSWEEP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
