"""What a tracker is told about a sweep: one parent, one child for every outcome and every setting.

A tracker is a view. The store and the ledger hold the truth, so whatever a tracker has missed can
be told to it later (`orchestrator.reconcile`). Knows nothing of Ray, of the store or of how a trial
runs.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args
from urllib.parse import quote, unquote, urlsplit

log = logging.getLogger(__name__)

MAX_METRICS = 30  # keys a child; the columns of a tracker's table are what makes it slow
MAX_ARTIFACT = 1_000_000  # bytes; images go by reference
MAX_UNTOLD = 1000  # outcomes that are kept while a tracker is away; the rest is told by reconcile

DATABASE = "mlflow.db"  # both lie in the store's folder and move with it
ARTIFACTS = "mlartifacts"

# For the environment of `serve_command`: no job runner beside the server, nothing sent home.
SERVER_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]


class TrackerAway(RuntimeError):
    """The tracker does not answer. Said before anything was started; exit code 3."""


@dataclass
class Told:
    """What a tracker did with what it was told."""

    told: int = 0  # outcomes that it lacked, or had otherwise
    there: int = 0  # outcomes that it had
    missed: int = 0  # outcomes that it lacks still
    points: int = 0  # settings that it lacked, or had otherwise
    sweep: Literal["told", "there", "missed"] = "there"  # the parent, with its end

    @property
    def nothing(self) -> bool:
        """Whether it had all of it."""
        return not (self.told or self.missed or self.points) and self.sweep == "there"


class Point(NamedTuple):
    """One number of a trial: its place on a curve, when it was measured, and what it was."""

    step: int
    time: int  # ms since the epoch
    value: float


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The parent: a sweep, by its name."""

    sweep: str
    project: str
    spec_hash: str
    note: str  # Markdown
    user: str
    commit: str
    source: str
    params: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A child: what became of one (cell, point, seed).

    Times come from the record and never from the clock: an outcome that is told twice says the same
    twice, and a tracker can tell that it has it.
    """

    slot: str  # unique within the sweep, the same after a resume
    name: str
    state: Literal["done", "reused", "failed", "pruned"]
    failure_class: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)  # a value per iteration
    started: int  # ms since the epoch
    ended: int
    artifacts: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count(self.metrics.keys() | self.curves.keys(), self.slot)
        assert self.state == "failed" or not self.failure_class, (
            f"{self.slot} is {self.state} and has the failure class {self.failure_class}"
        )
        for key, curve in self.curves.items():
            last = curve[-1] if curve else math.nan
            metric = self.metrics.get(key, last)
            assert metric == last or math.isnan(metric) or math.isnan(last), (
                f"{key} of {self.slot} is {metric}, but its curve ends at {last}"
            )

    @property
    def status(self) -> Status:
        return "FAILED" if self.state == "failed" else "FINISHED"

    def points(self) -> dict[str, list[Point]]:
        """All numbers with step and time; what is not finite is left out.

        >>> run = TrialRun(slot="s", name="n", state="done", started=0, ended=90,
        ...                metrics={"s": 3.0}, curves={"loss": [2.0, float("nan"), 1.0]})
        >>> run.points()["loss"]
        [Point(step=0, time=30, value=2.0), Point(step=2, time=90, value=1.0)]
        >>> run.points()["s"]
        [Point(step=0, time=90, value=3.0)]
        """
        return series(self.metrics, self.curves, self.started, self.ended)


def series(
    metrics: Mapping[str, float], curves: Mapping[str, list[float]], started: int, ended: int
) -> dict[str, list[Point]]:
    """Numbers and curves with step and time; what is not finite is left out."""
    all_curves = {key: [value] for key, value in metrics.items()}
    all_curves |= {key: curve for key, curve in curves.items() if curve}
    found = {
        key: [
            Point(step, started + (ended - started) * (step + 1) // len(curve), value)
            for step, value in enumerate(curve)
            if math.isfinite(value)
        ]
        for key, curve in all_curves.items()
    }
    return {key: points for key, points in found.items() if points}


def _check_count(keys: set[str], whose: str) -> None:
    assert len(keys) <= MAX_METRICS, (
        f"{len(keys)} metric keys for {whose}, at most {MAX_METRICS}: "
        "numbers per class belong in an artifact"
    )


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a setting has over its runs; fractions, not percent."""

    metrics: dict[str, float]  # means, and of the headline also _std, _low, _high; n
    curves: dict[str, list[float]]  # mean over runs, per iteration
    interval: str  # what _low and _high are

    def __post_init__(self) -> None:
        _check_count(self.metrics.keys() | self.curves.keys(), "a setting")


@dataclass(frozen=True, kw_only=True)
class PointRun:
    """A child that is no trial: one setting (cell and point) over its seeds and splits.

    Args:
        content: digest of what the numbers are computed from. While it stays, they stay, and
            nobody computes them again to see that a tracker has them.
        note: Markdown, with links to trials (`link`).
    """

    point: str  # unique within the sweep; trials name it in their tag air.point
    name: str
    content: str
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    note: str = ""
    numbers: Callable[[], Numbers]
    started: int  # ms since the epoch: its first trial
    ended: int  # its last one


# What a note may point at: a trial by its slot, a setting by its point, a file of the sweep by its
# name, a list of runs by their kind, charts of them. Only a tracker knows where they are.
Target = Literal["trial", "point", "file", "runs", "charts"]
TARGETS = get_args(Target)
_LINK = re.compile(rf"(!?)\[([^\]]*)\]\(({'|'.join(TARGETS)}):([^)\s]*)\)")


def link(text: str, target: Target, name: str) -> str:
    """A link of a note to something that a tracker shows.

    >>> link("seed 1", "trial", "digits-air/0/seed=1")
    '[seed 1](trial:digits-air/0/seed=1)'
    """
    return f"[{text}]({target}:{quote(name, safe='/=')})"


def image(text: str, name: str) -> str:
    """A picture of a note: a file of the sweep."""
    return f"!{link(text, 'file', name)}"


def linked(note: str, find: Callable[[str, str], str | None]) -> str:
    """A note with addresses in place of targets.

    Args:
        find: target and name to an address; None: a link becomes its text, a picture goes.

    >>> linked("[a](trial:x) ![b](file:y.png) [c](http://z)", lambda target, name: f"/{name}")
    '[a](/x) ![b](/y.png) [c](http://z)'
    >>> linked("[a](trial:x) ![b](file:y.png)", lambda target, name: None)
    'a '
    """

    def resolved(match: re.Match[str]) -> str:
        bang, text, target, name = match.groups()
        address = find(target, unquote(name))
        if address is None:
            return "" if bang else text
        return f"{bang}[{text}]({address})"

    return _LINK.sub(resolved, note)


@dataclass(frozen=True, kw_only=True)
class SeenRun:
    """A run as a tracker has it."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    text: str | None  # of the file that was asked for


class Tracker(Protocol):
    """Where people look at sweeps. One writer at a time: who holds the sweep's lock."""

    def check(self) -> None:
        """See whether it can be told anything, quickly and before any work.

        Raises:
            ValueError: it answers, and will not let us in.
            TrackerAway: it does not answer.
        """

    def start(self, run: SweepRun, *, live: bool = True) -> str:
        """Open the sweep's parent, the one it had before if there is one; return its id.

        Args:
            live: it runs now. Else it is only told of, and a parent that is closed stays closed.
        """

    def trial(self, run: TrialRun) -> None:
        """Say what became of a trial. A slot is one child, however often it is told."""

    def point(self, run: PointRun) -> None:
        """Say how a setting did, after its trials were told. A point is one child."""

    def finish(self, status: Status, note: str | None, artifacts: Mapping[str, Path]) -> Told:
        """Close the parent, and whatever a killed driver has left open below it.

        Args:
            note: Markdown with links (`link`); None: there is no time for note and artifacts.
        """

    def url(self) -> str:
        """Where to look, for people."""


class NoTracker:
    """Tracking switched off: the store, the ledger and the tables are all there is."""

    def check(self) -> None: ...

    def start(self, run: SweepRun, *, live: bool = True) -> str:
        return ""

    def trial(self, run: TrialRun) -> None: ...

    def point(self, run: PointRun) -> None: ...

    def finish(self, status: Status, note: str | None, artifacts: Mapping[str, Path]) -> Told:
        return Told()

    def url(self) -> str:
        return "nowhere: tracking is off"


def uri_of(uri: str | None, store: Path) -> str:
    """Where a tracker is: as asked, else as MLFLOW_TRACKING_URI says, else the store's file."""
    asked = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return asked or f"sqlite:///{store.resolve() / DATABASE}"


def make_tracker(uri: str | None, *, store: Path, project: str) -> Tracker:
    """The tracker that a sweep asked for.

    Args:
        uri: `http(s)://...` of an MLflow server, `sqlite:///<file>`, `jsonl:<file>` or `none`.
            None: MLFLOW_TRACKING_URI, and without it a database in the store's folder.
        store: the folder of the store.
        project: runs go to the experiment `air/<project>`.

    Raises:
        ValueError: the uri is of another kind.
    """
    uri = uri_of(uri, store)
    match kind_of(uri):
        case "none":
            return NoTracker()
        case "jsonl":
            from orchestrator.tracking.jsonl import JsonlTracker

            return JsonlTracker(Path(uri.partition(":")[2]).absolute(), project=project)
        case "http":
            from orchestrator.tracking.mlflow import MlflowTracker  # seconds to import

            return MlflowTracker(uri, project=project, database=None)
        case "sqlite":
            from orchestrator.tracking.mlflow import MlflowTracker

            database = Path(uri.removeprefix("sqlite:///")).absolute()
            return MlflowTracker(f"sqlite:///{database}", project=project, database=database)


def read_run(uri: str | None, store: Path, run_id: str, file: str) -> SeenRun:
    """A run of MLflow by its id, or by the beginning of one, with the text of one of its files.

    Raises:
        ValueError: there is no such run, or the uri means no MLflow.
        TrackerAway: the server does not answer.
    """
    uri = uri_of(uri, store)
    kind = kind_of(uri)
    if kind not in ("http", "sqlite"):
        raise ValueError(f"{kind}: has no runs that could be read; give an MLflow --tracking-uri")
    from orchestrator.tracking.runs import read_run as read

    database = Path(uri.removeprefix("sqlite:///")).absolute() if kind == "sqlite" else None
    return read(uri, database, run_id, file)


def kind_of(uri: str) -> Literal["none", "jsonl", "http", "sqlite"]:
    """Which tracker a uri means; imports none.

    Raises:
        ValueError: it means none that we have.
    """
    scheme, _, rest = uri.partition(":")
    match scheme:
        case "none":
            return "none"
        case "jsonl" if rest:
            return "jsonl"
        case "http" | "https":
            return "http"
        case "sqlite" if rest.startswith("///") and rest != "///":
            return "sqlite"
    raise ValueError(_unknown(scheme, uri))


def _unknown(scheme: str, uri: str) -> str:
    # Only the scheme is repeated: a database's address often holds a password.
    known = "known: http(s)://<server>, sqlite:///<file>, jsonl:<file>, none"
    if scheme in ("postgresql", "mysql", "mssql") or scheme.startswith(("postgresql+", "mysql+")):
        return (
            f"the tracking uri is a {scheme} database, which only a server should write to: run "
            f"`mlflow server --backend-store-uri ...` and give its http address; {known}"
        )
    if scheme == "file" or ":" not in uri:
        return (
            "the tracking uri is a folder, and MLflow no longer keeps runs in folders; "
            f"give sqlite:///<file> instead; {known}"
        )
    return f"unknown tracking uri {scheme}:...; {known}"


def serve_command(
    store: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    auth: bool = False,
    allowed_hosts: str | None = None,
) -> list[str]:
    """The command that shows a store's runs: a real MLflow server over its database and artifacts.

    Run it with SERVER_ENVIRONMENT and in its own process group: killed alone, it leaves its worker
    on the port. Away from the loopback, `exposure` has a word to say.
    """
    folder = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)),
        *(("--app-name", "basic-auth") if auth else ()),
        *(("--allowed-hosts", allowed_hosts) if allowed_hosts else ()),
    ]


def small_artifacts(artifacts: Mapping[str, Path], owner: str) -> dict[str, Path]:
    """The artifacts that are there and small enough; a warning for each of the others."""
    small = {}
    for name, path in sorted(artifacts.items()):
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            log.warning("artifact %s of %s is not tracked: there is no file %s", name, owner, path)
        elif size >= MAX_ARTIFACT:
            log.warning(
                "artifact %s of %s is not tracked: it has %.1f MB, the limit is %.0f MB; see %s",
                *(name, owner, size / 1e6, MAX_ARTIFACT / 1e6, path),
            )
        else:
            small[name] = path
    return small


def without_credentials(uri: str) -> str:
    """
    >>> without_credentials("https://me:secret@mlflow.example.org:443/x")
    'https://mlflow.example.org:443/x'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
