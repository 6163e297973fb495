"""Builds the trial runs and setting runs of a sweep: names, tags, params, metrics and files.

User, commit and code of a trial run come from the trial's record, not from the process that sends
it. A setting is a cell and a point over all seeds and splits: one row of the table, with the
table's numbers.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from air_core.settings.flat import REFS
from orchestrator.formatting import format_value, own_name
from orchestrator.git import UNKNOWN
from orchestrator.keys import digest
from orchestrator.planning.ledger import Ledger, Slot
from orchestrator.planning.outcome import Outcome
from orchestrator.planning.resolve import spec_json
from orchestrator.reporting.comparisons import BEST, Results
from orchestrator.reporting.results import Finished, finished_trial, varied_settings
from orchestrator.reporting.rows import is_bound, method_text
from orchestrator.reporting.selection import trial_spec
from orchestrator.store import TrialRecord

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits
RECIPE = 1  # increase when a change computes other numbers from the same records

# Tags of MLflow itself, which a client sets in a process with a git checkout and a user name.
USER, COMMIT = "mlflow.user", "mlflow.source.git.commit"
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"

SPEC = "spec.json"
MAX_NAME, MAX_PARAM = 250, 6000  # characters, in MLflow


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Metrics of a run. Accuracies and other shares are fractions, not percentages."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # one value per iteration
    interval: str = ""  # of a setting: kind of interval between _low and _high
    classifier: str = ""  # of a setting: that of best/test/accuracy


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A child of the sweep run: the outcome of a trial, or a setting over its trials.

    Times come from records, never from the clock, so an outcome has the same digest whenever it is
    sent.

    Args:
        id: the slot of a trial or the point of a setting. Unique within the sweep and kind, and
            stable over resumes.
        content: identifies the records that `numbers` and `files` read.
        numbers: computes the metrics, which takes time for a setting; called only if MLflow lacks
            the run.
        started: ms since the epoch, like `ended`. A running trial ends now.
        files: small files by name; each function is called only if MLflow lacks the run.
    """

    kind: Kind
    id: str
    content: str
    name: str
    status: Status = "FINISHED"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    numbers: Callable[[], Numbers] = Numbers
    started: int
    ended: int
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of everything that the run shows."""
        shown = {k: v for k, v in vars(self).items() if k not in ("numbers", "files")}
        return digest([RECIPE, shown, sorted(self.files)])


class ChildRuns:
    """Builds the child runs of a sweep run.

    Args:
        user: of trials whose records do not name theirs.
    """

    def __init__(self, ledger: Ledger, user: str) -> None:
        self._user, self._ledger, about = user, ledger, ledger.about
        self._seeds = about.vary
        self._planned = about.runs  # trials of a setting
        self._varied = {*about.grid, *about.space, *about.vary}
        self._outcomes: dict[str, dict[str, Outcome]] = {}  # by setting and slot

    def trial(self, outcome: Outcome, at: float | None, driver: Mapping[str, Any]) -> ChildRun:
        """The run of a trial.

        Args:
            at: when an outcome without a record was logged, in seconds since the epoch.
            driver: user and commit of an outcome without a record.
        """
        slot, record = outcome.slot, outcome.record
        seed = slot.settings["seed"]
        logged = int((at or 0.0) * 1000)
        started, ended = _times(record) if record else (logged, logged)
        numbers = Numbers(metrics=record.metrics, curves=record.curves) if record else Numbers()
        return ChildRun(
            kind="trial",
            id=slot.id,
            content=slot.key.digest,
            name=self._run_name(slot, {**varied_settings(slot), **(slot.seeds or {"seed": seed})}),
            status="FAILED" if outcome.state == "failed" else "FINISHED",
            tags={
                **self._tags(slot),
                "air.state": outcome.state,
                "air.failure_class": outcome.failure_class or "",
                "air.seed": str(seed),
                "air.split_seed": str(slot.settings["split_seed"]),
                "air.trial_key": slot.key.digest,
                "air.point": point_id(slot),
                "air.message": outcome.message,
                **self._lineage(slot, record, driver),
            },
            params=self._params(slot),
            numbers=lambda: numbers,
            started=started,
            ended=ended,
            files=self._files(outcome),
        )

    def running(
        self,
        slot: Slot,
        curves: Mapping[str, Sequence[float]],
        started: float,
        driver: Mapping[str, Any],
    ) -> ChildRun:
        """The run of a trial that is running; the other arguments are those of `trial`.

        Args:
            curves: of the rounds so far.
            started: in seconds since the epoch.
        """
        run, numbers = self.trial(Outcome(slot, "done"), started, driver), Numbers(curves=curves)
        return replace(
            run,
            status="RUNNING",
            tags={**run.tags, "air.state": ""},
            numbers=lambda: numbers,
            ended=int(time.time() * 1000),
            files={},
        )

    def completed_setting(self, outcome: Outcome) -> ChildRun | None:
        """The run of an outcome's setting; None while trials are missing, or without a result.

        `sync` sends incomplete settings at the end of the sweep.
        """
        outcomes = self._outcomes.setdefault(point_id(outcome.slot), {})
        outcomes[outcome.slot.id] = outcome
        done = [(each.slot, each.record) for each in outcomes.values() if each.record is not None]
        if len(outcomes) < self._planned or not done:
            return None
        return self.setting(done)

    def setting(self, done: Sequence[Finished], best: str = "") -> ChildRun:
        """The run of a setting.

        Args:
            done: the finished trials of the setting, at least one.
            best: the sweep's best classifier, if it is one of this setting.
        """
        slot = done[0][0]
        done = sorted(done, key=lambda trial: tuple(trial[0].seeds.values()))
        times = [_times(record) for _, record in done]
        params = {k: v for k, v in self._params(slot).items() if k not in self._seeds}
        users = {str(record.provenance.get("user", UNKNOWN)) for _, record in done} - {UNKNOWN}
        return ChildRun(
            kind="point",
            id=point_id(slot),
            content=digest(
                sorted([s.id, s.key.digest, record.started, record.seconds] for s, record in done)
            ),
            name=self._run_name(slot, varied_settings(slot)),
            tags={
                **self._tags(slot),
                "air.seed": _join_values(trial.settings["seed"] for trial, _ in done),
                "air.split_seed": _join_values(trial.settings["split_seed"] for trial, _ in done),
                "air.best_classifier": best and BEST + best,
                "air.runs": f"{len(done)} of {self._planned}",
                "air.user": ", ".join(sorted(users)),
            },
            params=params,
            numbers=lambda: _numbers(done),
            started=min(started for started, _ in times),
            ended=max(ended for _, ended in times),
        )

    def _params(self, slot: Slot) -> dict[str, str]:
        """All settings that have a value, and those that the sweep varies."""
        values = {**varied_settings(slot), **slot.settings, "method": slot.cell.method}
        return {
            key: str(value)[:MAX_PARAM]
            for key, value in values.items()
            if value is not None or key in self._varied
        }

    def _lineage(
        self, slot: Slot, record: TrialRecord | None, driver: Mapping[str, Any]
    ) -> dict[str, str]:
        """Tags with the inputs and the code that computed a trial."""
        made, spec = (record.provenance, record.spec) if record else (driver, {})
        tags = {name: str(made.get(name, "")) for name in ("user", "commit", "code")}
        if tags["user"] in ("", UNKNOWN):
            tags["user"] = self._user
        tags |= {name: str(made.get(name, "")) for name in ("host", "device")}
        tags |= {name: json.dumps(made[name]) for name in ("versions", "files") if made.get(name)}
        seeds = {key: value for key, value in slot.settings.items() if key.endswith("seed")}
        tags["seeds"] = json.dumps(seeds)
        digests = {name: spec[name]["digest"] for name in REFS if spec.get(name)}
        tags |= {f"{name}_digest": digest for name, digest in digests.items() if digest}
        return {f"air.{name}": value for name, value in tags.items()}

    def _files(self, outcome: Outcome) -> dict[str, Callable[[], bytes]]:
        """The spec of a trial and, if it has test images, its confusion matrix."""
        record = outcome.record
        if record is None:
            return {}
        files = {SPEC: lambda: spec_json(trial_spec(record), record.key[:12]).encode()}
        if record.headline is not None:
            classnames = self._ledger.tested(outcome.slot).classnames
            files["confusion_matrix.csv"] = lambda: _confusion_matrix(record, classnames)
        return files

    def _run_name(self, slot: Slot, settings: Mapping[str, Any]) -> str:
        """The method and settings, then the task: MLflow's table shows the first 20 characters.

        Args:
            settings: that distinguish the run from others of its method.
        """
        flat = slot.cell.flat
        task = "-".join([own_name(flat["dataset"]), flat["paradigm"], flat["modality"]])
        words = [f"{key}={format_value(value)}" for key, value in settings.items()]
        return " ".join([method_text(slot.cell.method), *words, task])[:MAX_NAME]

    def _tags(self, slot: Slot) -> dict[str, str]:
        flat = slot.cell.flat
        return {
            "air.dataset": self._ledger.data[flat["dataset"]].ref.name,
            "air.paradigm": flat["paradigm"],
            "air.modality": flat["modality"],
            "air.method": slot.cell.method,
            "air.cell": slot.cell.id,
            "air.bound": "true" if is_bound(slot.cell.method) else "",
        }


def point_id(slot: Slot) -> str:
    """The value of the tag air.point: identifies a setting within its sweep."""
    return f"{slot.cell.id}/{slot.point}"


def group_by_setting(done: Iterable[Finished]) -> list[list[Finished]]:
    """Group finished trials by setting."""
    groups: dict[str, list[Finished]] = {}
    for slot, record in done:
        groups.setdefault(point_id(slot), []).append((slot, record))
    return list(groups.values())


def _times(record: TrialRecord) -> tuple[int, int]:
    """Start and end of a trial, in ms since the epoch."""
    started = int(record.started * 1000)
    return started, started + int(record.seconds * 1000)


def _join_values(values: Iterable[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


# ---------------------------------------------------------------- numbers of a setting


def _numbers(done: Sequence[Finished]) -> Numbers:
    """The numbers of the table's row, that of its best classifier, and the means of all others."""
    trials = [finished_trial(slot, record) for slot, record in done]
    results = Results(trials)
    [row] = results.rows
    best = results.best_classifiers.get(row.task)
    distinct = list({slot.key.digest: record for slot, record in done}.values())
    metrics = _means([record.metrics for record in distinct])
    curves = _mean_curves([record.curves for record in distinct])
    headline = f"test/{row.metric}"
    if row.is_tested:
        metrics |= {headline: row.mean, f"{headline}_low": row.low, f"{headline}_high": row.high}
    if row.std is not None:
        metrics[f"{headline}_std"] = row.std
    if best is not None and best.test is not None:  # bounds have none, so they are below the others
        metrics["best/test/accuracy"] = best.test.mean
    metrics["n"] = float(row.n)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    for name, curve in curves.items():  # MLflow shows a curve's last value as the metric
        if name in metrics:
            curve[-1] = metrics[name]
    classifier = best.classifier if best else ""
    return Numbers(metrics=metrics, curves=curves, interval=row.interval, classifier=classifier)


def _means(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the runs, of the metrics that all of them have."""
    common = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: fmean(run[name] for run in runs) for name in common}


def _mean_curves(runs: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    common = [name for name, curve in runs[0].items() if curve]
    common = [n for n in common if len({len(run.get(n, ())) for run in runs}) == 1]
    return {n: [fmean(at) for at in zip(*(run[n] for run in runs), strict=True)] for n in common}


def _confusion_matrix(record: TrialRecord, classnames: Sequence[str]) -> bytes:
    """Test images by true class (rows) and predicted class (columns)."""
    from orchestrator.reporting.charts import confusion

    _, predictions, labels = record.predictions()
    counts = confusion(labels, predictions, len(classnames)).tolist()
    text = io.StringIO()
    rows = ([name, *row] for name, row in zip(classnames, counts, strict=True))
    csv.writer(text, lineterminator="\n").writerows([["true class", *classnames], *rows])
    return text.getvalue().encode()
