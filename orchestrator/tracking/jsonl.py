"""The tracker for machines without MLflow: a line of JSON for everything that is told.

Nothing is ever rewritten. What holds for a slot is its last line, so a file that was told twice, or
whose writer was killed in mid-line, reads the same as one that was not. Files of trials and of the
sweep are copied to a folder beside the lines, `<name>.files`. Links of notes stay names.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.ledger import append_line
from orchestrator.tracking import (
    PointRun,
    Status,
    SweepRun,
    Told,
    TrackerAway,
    TrialRun,
    series,
    small_artifacts,
)


@dataclass
class TrackedSweep:
    """What a file says about one sweep."""

    sweep: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)  # by slot
    points: dict[str, dict[str, Any]] = field(default_factory=dict)  # by point


class JsonlTracker:
    def __init__(self, path: Path, *, project: str) -> None:
        self._path = path
        self._project = project
        self._told = TrackedSweep()
        self._sweep: dict[str, Any] = {}
        self._counts = Told()

    def check(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError as problem:
            raise TrackerAway(f"{self._path} cannot be written to: {problem}") from problem

    def start(self, run: SweepRun, *, live: bool = True) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self._path)
        name = f"{self._project}/{run.sweep}"
        self._counts = Told()
        self._told = read(self._path).get(name, TrackedSweep())
        self._sweep = {"kind": "sweep", "id": name, **dataclasses.asdict(run)}
        if live:
            self._told.sweep = {**self._sweep, "status": "RUNNING"}
            self._append(self._told.sweep)
        return name

    def trial(self, run: TrialRun) -> None:
        points = run.points()
        line = {
            "kind": "trial",
            "parent": self._sweep["id"],
            **dataclasses.asdict(dataclasses.replace(run, artifacts={})),
            "status": run.status,
            "metrics": {key: series[-1].value for key, series in points.items()},
            "curves": {
                k: [(p.step, p.value) for p in points[k]] for k in run.curves if k in points
            },
        }
        line = json.loads(json.dumps(line))  # as it will be read: tuples become lists
        known = self._told.trials.get(run.slot, {})
        if known == {**line, "artifacts": known.get("artifacts")} and (
            run.artifacts.keys() <= known["artifacts"].keys()  # to look at them may be to make them
        ):
            self._counts.there += 1
            return
        line["artifacts"] = self._kept(run.name, run.artifacts)
        if known == line:
            self._counts.there += 1
            return
        self._append(line)
        self._told.trials[run.slot] = line
        self._counts.told += 1

    def point(self, run: PointRun) -> None:
        about = {"kind": "point", "parent": self._sweep["id"], **vars(run)}
        del about["numbers"]  # to look at them is to compute them
        known = self._told.points.get(run.point, {})
        if about.items() <= known.items():
            return
        numbers = run.numbers()
        points = series(numbers.metrics, numbers.curves, run.started, run.ended)
        line = {
            **about,
            "metrics": {key: found[-1].value for key, found in points.items()},
            "curves": {
                k: [[p.step, p.value] for p in points[k]] for k in numbers.curves if k in points
            },
            "interval": numbers.interval,
        }
        self._append(line)
        self._told.points[run.point] = line
        self._counts.points += 1

    def finish(self, status: Status, note: str | None, artifacts: Mapping[str, Path]) -> Told:
        end = {"status": status, "note": note}
        places = self._kept(self._sweep["sweep"], artifacts)
        line = {**self._sweep, **end, "artifacts": places}
        if self._told.sweep != line:
            self._append(line)
            self._told.sweep = line
            self._counts.sweep = "told"
        return self._counts

    def url(self) -> str:
        return str(self._path)

    def _kept(self, owner: str, artifacts: Mapping[str, Path]) -> dict[str, str]:
        """Copies of files: the originals may be gone when somebody looks."""
        folder = self._path.with_name(f"{self._path.stem}.files") / owner
        places = {}
        for name, path in small_artifacts(artifacts, owner).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            places[name] = str(shutil.copyfile(path, folder / name))
        return places

    def _append(self, line: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(line))


def read(path: Path) -> dict[str, TrackedSweep]:
    """All sweeps of a file, by `<project>/<sweep>`."""
    sweeps: dict[str, TrackedSweep] = {}
    if not path.exists():
        return sweeps
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the writer was killed here; the outcome was told again further down
        match line["kind"]:
            case "sweep":
                sweeps.setdefault(line["id"], TrackedSweep()).sweep = line
            case "point":
                sweeps.setdefault(line["parent"], TrackedSweep()).points[line["point"]] = line
            case _:
                sweeps.setdefault(line["parent"], TrackedSweep()).trials[line["slot"]] = line
    return sweeps


def _end_last_line(path: Path) -> None:
    """A killed writer leaves half a line; the next one must not be glued to it."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
