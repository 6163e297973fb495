"""The commands. Data on stdout, everything else on stderr; heavy imports inside the commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from orchestrator.driver import Place
    from orchestrator.plan import Plan
    from orchestrator.sweep import SweepSpec

app = typer.Typer(
    name="airsweep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt CLIP to a new image domain without labels, with diffusion, as a Ray sweep.\n\n"
    "  airsweep run quickstart\n\n  airsweep table quickstart",
)

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="a sweep file, or its bare name")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="a sweep, or PROJECT/NAME")]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="AIRSWEEP_STORE", help="folder of all results")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="AIRSWEEP_DATA", help="folder of real datasets"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the file; may repeat"),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=VALUE", help="keep these cells of the grid; may repeat"),
]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke", help="one point, seed and iteration a cell, 8 images, in <store>-smoke"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="for scripts")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="errors only")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow; default: MLFLOW_TRACKING_URI, else a file in the store"
    ),
]

AcceptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-code",
        metavar="STAGE",
        help="count what other code has made, since it would be the same; features, images, ...",
    ),
]

STORE = Path("runs")


@app.command()
def validate(spec: SpecArgument, sets: SetOption = None, only: OnlyOption = None) -> None:
    """Read and check a sweep file; starts nothing.

    airsweep validate sweeps/quickstart.yaml

    airsweep validate quickstart --set iterations=5
    """
    from orchestrator.sweep import cells_of, notes_of

    sweep = _load(spec, sets, only)
    for note in notes_of(sweep):
        print(f"note: {note}", file=sys.stderr)
    print(f"{sweep.source}: {len(cells_of(sweep))} cells, fine")


@app.command()
def plan(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="every setting and where it comes from")
    ] = False,
) -> None:
    """What would run, what is there, how long it would take; starts nothing.

    airsweep plan quickstart

    airsweep plan sweeps/quickstart.yaml --json
    """
    from orchestrator import screens
    from orchestrator.recorded import computed_by

    sweep, place, _ = _asked(spec, store, data_root, sets, only, smoke)
    planned = _plan(sweep, place)
    sources: dict[str, int] = {}
    if planned.reused:
        there = [slot.key.digest for slot in planned.slots if place.store.has(slot.spec)]
        sources = dict(computed_by(place.store, there, place))
    if as_json:
        shown = {**planned.json(place.store), "reused_from": sources}
        print(json.dumps(shown, indent=1))
    else:
        print(screens.plan_screen(planned, place, explain, sources))


@app.command()
def prepare(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    quiet: QuietOption = False,
    accept_code: AcceptOption = None,
) -> None:
    """Make features, LoRA and images of a sweep, and run no trial.

    airsweep prepare quickstart

    airsweep prepare sweeps/quickstart.yaml --only method=air
    """
    asked = _asked(spec, store, data_root, sets, only, smoke)
    _execute(*asked, quiet, prepare_only=True, accept_code=_stages(accept_code))


@app.command()
def run(
    spec: SpecArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    sets: SetOption = None,
    only: OnlyOption = None,
    smoke: SmokeOption = False,
    quiet: QuietOption = False,
    accept_code: AcceptOption = None,
) -> None:
    """Run a sweep, or go on with one that was interrupted; what is done is skipped.

    airsweep run quickstart

    ray job submit --address $ADDR --working-dir . -- python -m orchestrator run
    sweeps/quickstart.yaml --store /shared/runs
    """
    asked = _asked(spec, store, data_root, sets, only, smoke)
    _execute(*asked, quiet, tracking_uri=tracking_uri, accept_code=_stages(accept_code))


@app.command()
def retry(
    name: NameArgument,
    failure_class: Annotated[
        str, typer.Option("--class", metavar="CLASS", help="oom, nan, timeout, infra, data, user")
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    quiet: QuietOption = False,
) -> None:
    """Go on with a sweep, and of what failed try one class only.

    airsweep retry quickstart --class oom

    airsweep retry team/paper_main --class infra --store /shared/runs
    """
    sweep, place = _recorded(name, store, data_root)
    origin = json.loads((place.folder / "resolved.json").read_text())
    _execute(sweep, place, origin, quiet, tracking_uri=tracking_uri, retry=failure_class)


@app.command()
def status(name: NameArgument, store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """How a sweep stands, from its ledger.

    airsweep status quickstart

    airsweep status quickstart --json
    """
    from orchestrator import screens

    place = _place(name, store)
    found = screens.status(place)
    print(json.dumps(found, indent=1) if as_json else screens.status_screen(found))


@app.command()
def table(
    name: NameArgument,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    form: Annotated[str, typer.Option("--format", help="md, csv, json or latex")] = "md",
) -> None:
    """Results as a table: mean, spread and interval of each row.

    airsweep table quickstart

    airsweep table quickstart --format json
    """
    from orchestrator import report, tables

    if form not in ("md", "csv", "json", "latex"):
        _fail(f"--format {form!r} is not known; allowed: md, csv, json, latex")
    from orchestrator.results import entries_of

    sweep, place = _recorded(name, store, data_root)
    planned = _plan(sweep, place)
    for old in planned.stale(place.store):
        print(f"note: {old}", file=sys.stderr)
    entries = entries_of(planned, place.store)
    rows = report.rows(entries, sweep.search.objective if sweep.search else None)
    print(tables.table(rows, form, entries=entries))  # type: ignore[arg-type]


@app.command()
def ui(
    store: StoreOption = STORE,
    host: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="where to listen")] = 5000,
) -> None:
    """Browse the store's MLflow runs.

    airsweep ui

    airsweep ui --port 5001
    """
    from orchestrator.store import open_store
    from orchestrator.tracking import SERVER_ENVIRONMENT, serve_command

    open_store(store)
    if not (store / "mlflow.db").exists():
        _fail(f"{store / 'mlflow.db'} is not there: nothing was tracked in this store yet")
    argv = serve_command(store.absolute(), host, port)
    print(f"http://{host}:{port}  (Ctrl-C ends it)", file=sys.stderr)
    os.execvpe(argv[0], argv, {**os.environ, **SERVER_ENVIRONMENT})


@app.command()
def repro(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="a trial's run in MLflow, or the start of it")
    ],
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute a tracked trial again and compare it, image for image.

    Ends with 0 when it is the same or within tolerance, with 5 when it differs.

    airsweep repro 3f2a9c1d

    airsweep repro 3f2a9c1d --tracking-uri http://mlflow:5000 --json
    """
    from orchestrator.driver import DONE, GATE
    from orchestrator.repro import repro as again
    from orchestrator.resolve import Resolver
    from orchestrator.store import ArtifactStore

    found = again(
        run_id,
        ArtifactStore(store.absolute(), writable=False),
        Resolver(store / "digests.json", data_root),
        tracking_uri,
        lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(found.json(), indent=1) if as_json else "\n".join(found.lines()))
    sys.exit(DONE if found.same else GATE)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a run id, a trial key, or a slot")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one")],
    store: StoreOption = STORE,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Why two trials differ: settings, inputs, code, metrics.

    airsweep diff 3f2a9c1d 8b01e7aa

    airsweep diff 3f2a9c1d 8b01e7aa --json
    """
    from orchestrator.differences import differences
    from orchestrator.store import ArtifactStore
    from orchestrator.tracked import remembered

    there = ArtifactStore(store.absolute(), writable=False)
    found = differences(*(remembered(one, there, tracking_uri) for one in (a, b)))
    print(json.dumps(found.json(), indent=1) if as_json else "\n".join(found.lines()))


mlflow_app = typer.Typer(no_args_is_help=True, help="Keep MLflow in step with the store.")
app.add_typer(mlflow_app, name="mlflow")


@mlflow_app.command("reconcile")
def mlflow_reconcile(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="a sweep, or PROJECT/NAME; without: all")
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell MLflow what it has missed of sweeps: it was away, or tracking was off.

    airsweep mlflow reconcile quickstart

    airsweep mlflow reconcile --tracking-uri http://mlflow:5000
    """
    from orchestrator.reconcile import reconcile, recorded

    names = [name] if name else list(recorded(store))
    if not names:
        _fail(f"no sweep was recorded in {store}; run one first, or give --store")
    found, problems = [], []
    for one in names:
        try:
            found.append(reconcile(*_recorded(one, store, data_root), tracking_uri))
        except Exception as problem:
            if name:
                raise
            problems.append(problem)  # the others can be told all the same
            print(f"airsweep: {one}: {problem}", file=sys.stderr)
    if as_json:
        print(json.dumps([one.json() for one in found], indent=1))
    else:
        for told in found:
            print(told.line())
            print(f"  {told.url}", file=sys.stderr)
    if problems:
        sys.exit(max(_code_of(problem) for problem in problems))


data_app = typer.Typer(no_args_is_help=True, help="Look at datasets on this machine.")
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a dataset, or folder:PATH")],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", "--data-root", envvar="AIRSWEEP_DATA", help="folder of real datasets"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a dataset with the published one and open every image.

    Ends with 0 when all fits, else with 2 and the first difference.

    airsweep data check flowers102 --root /data

    airsweep data check folder:/data/leaves --json
    """
    from rich.console import Console
    from rich.progress import track

    from orchestrator.datacheck import check

    console = Console(stderr=True)
    found = check(
        name,
        root,
        lambda each, total: track(
            each,
            "opening images",
            total,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ),
    )
    for line in [json.dumps(found.json(), indent=1)] if as_json else found.lines():
        print(line)
    if found.difference is not None:
        _fail(found.difference)


cache_app = typer.Typer(no_args_is_help=True, help="Look after a store of artifacts.")
app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
def cache_ls(
    store: StoreOption = STORE, data_root: DataOption = None, as_json: JsonOption = False
) -> None:
    """What lies in a store, whose it is, and which of it recorded sweeps need.

    airsweep cache ls

    airsweep cache ls --store /shared/runs --json
    """
    from orchestrator.cache_screen import listing, listing_screen
    from orchestrator.inventory import take_inventory
    from orchestrator.recorded import all_needs
    from orchestrator.store import open_store

    opened = open_store(store)
    found = listing(take_inventory(opened), all_needs(opened, data_root))
    print(json.dumps(found, indent=1) if as_json else listing_screen(found))


@cache_app.command("verify")
def cache_verify(store: StoreOption = STORE, as_json: JsonOption = False) -> None:
    """Read every file of a store and compare it with what was written.

    Ends with 0 when nothing is damaged, else with 1.

    airsweep cache verify

    airsweep cache verify --store /shared/runs --json
    """
    from orchestrator.cache_screen import verdict_screen, watched
    from orchestrator.integrity import verify
    from orchestrator.inventory import take_inventory
    from orchestrator.store import open_store

    verdict = verify(take_inventory(open_store(store)), watched)
    print(json.dumps(verdict.json(), indent=1) if as_json else verdict_screen(verdict))
    sys.exit(1 if verdict.damaged else 0)


@cache_app.command("gc")
def cache_gc(
    store: StoreOption = STORE,
    data_root: DataOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="remove; without it they are listed")] = False,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="what this recorded sweep alone needs"),
    ] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="also what others made, or nobody knows who")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what no recorded sweep needs, and with --yes remove it; only what you made yourself.

    airsweep cache gc

    airsweep cache gc --sweep old_question --yes
    """
    from orchestrator.cache_screen import spoils_screen
    from orchestrator.driver import whoami
    from orchestrator.inventory import take_inventory
    from orchestrator.recorded import all_needs, refuse_running
    from orchestrator.store import open_store
    from orchestrator.upkeep import (
        NOT_REMOVED,
        needed_by_one,
        needless,
        refuse_unread,
        remove,
    )

    opened = open_store(store)
    place = _place(sweep, store) if sweep else None
    refuse_running(opened)
    with opened.alone():  # until all is removed no sweep may start
        inventory = take_inventory(opened)
        needs = all_needs(opened, data_root)
        refuse_unread(needs, opened.root)
        if place is None:
            spoils = needless(inventory, needs, whoami(), all_users)
        else:
            of = f"{place.project}/{place.name}"
            spoils = needed_by_one(inventory, needs, of, whoami(), all_users)
        if yes:
            spoils = remove(spoils)
    print(json.dumps(spoils.json(yes), indent=1) if as_json else spoils_screen(spoils, yes))
    if any(one.why == NOT_REMOVED for one in spoils.others):
        _fail(f"some of it {NOT_REMOVED}; --json names it", 1)


# ---------------------------------------------------------------- helpers


def _execute(
    sweep: SweepSpec,
    place: Place,
    origin: dict[str, Any],
    quiet: bool,
    prepare_only: bool = False,
    **how: Any,
) -> NoReturn:
    from orchestrator import driver, screens
    from orchestrator.screen import make_screen

    # Ray's daemons print to file descriptor 1 whatever they are told; stdout is for data.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = driver.run_sweep(
        sweep, place, make_screen(quiet), origin=origin, prepare_only=prepare_only, **how
    )
    if not quiet and not prepare_only:
        print(screens.summary_screen(sweep, place), file=stdout)
    stdout.flush()
    sys.exit(code)


def _asked(
    spec: str,
    store: Path,
    data_root: Path | None,
    sets: list[str] | None,
    only: list[str] | None,
    smoke: bool,
) -> tuple[SweepSpec, Place, dict[str, Any]]:
    """A sweep from its file, where it goes, and how it was asked for."""
    from orchestrator.driver import place_of
    from orchestrator.sweep import smoke as smoked

    sweep = _load(spec, sets, only)
    if smoke:
        sweep = smoked(sweep)
        store = store.with_name(store.name + "-smoke")
    place = place_of(sweep, store, data_root)
    origin = {"sets": sets or [], "only": only or [], "smoke": smoke, "source": sweep.source}
    return sweep, place, origin


def _stages(asked: list[str] | None) -> list[str]:
    from orchestrator.keys import STAGES

    for stage in asked or []:
        if stage not in STAGES:
            _fail(f"--accept-code {stage!r} is no stage; allowed: {', '.join(STAGES)}")
    return asked or []


def _load(spec: str, sets: list[str] | None, only: list[str] | None) -> SweepSpec:
    from orchestrator.sweep_file import find_sweep, load_sweep

    return load_sweep(find_sweep(spec), sets=sets or [], only=only or [])


def _plan(sweep: SweepSpec, place: Place) -> Plan:
    from orchestrator.plan import plan_sweep

    return plan_sweep(sweep, place.store, place.resolver(), place.ledger())


def _place(name: str, store: Path) -> Place:
    """A sweep that was run before.

    Raises:
        ValueError: there is none of this name.
    """
    from orchestrator.driver import Place
    from orchestrator.store import open_store

    project, _, short = name.rpartition("/")
    project = project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    place = Place(open_store(store), project, short, None)
    if not (place.folder / "events.jsonl").exists():
        there = sorted(
            f"{p.parent.parent.name}/{p.parent.name}"
            for p in (store / "sweeps").glob("*/*/events.jsonl")
        )
        raise ValueError(
            f"no sweep {project}/{short} in {store}; there: {', '.join(there) or 'none yet'}"
        )
    return place


def _recorded(name: str, store: Path, data_root: Path | None) -> tuple[SweepSpec, Place]:
    """A sweep as it was last run, with the values that were set then."""
    from orchestrator.recorded import read_sweep

    return read_sweep(_place(name, store), data_root)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"airsweep: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """The console script: known problems become one message and an exit code."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except Exception as problem:
        if debug:
            raise
        if type(problem).__name__ == "SpecError":  # it begins with file:line:column
            print(problem, file=sys.stderr)
            sys.exit(_code_of(problem))
        code = _code_of(problem)
        if code == 1:
            _fail(f"{type(problem).__name__}: {problem} (--debug shows where)", code)
        _fail(str(problem), code)


def _code_of(problem: Exception) -> int:
    """2 for what a user can get wrong, 3 for what was refused before it started, else 1."""
    from orchestrator.driver import BAD_INPUT, FAILED, REFUSED, Refused
    from orchestrator.ledger import SweepBusy
    from orchestrator.store import StoreRefused
    from orchestrator.tracking import TrackerAway

    if isinstance(problem, Refused | SweepBusy | StoreRefused | TrackerAway):
        return REFUSED
    return BAD_INPUT if isinstance(problem, ValueError) else FAILED


if __name__ == "__main__":
    main()
