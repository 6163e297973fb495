"""The tracker for machines without MLflow: a line of JSON for everything that is told.

Nothing is ever rewritten. What holds for a slot is its last line, so a file that was told twice, or
whose writer was killed in mid-line, reads the same as one that was not. Artifacts are not copied:
lines name them where they are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.tracking import Status, SweepRun, TrialRun, small_artifacts


@dataclass
class TrackedSweep:
    """What a file says about one sweep."""

    sweep: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)  # by slot


class JsonlTracker:
    def __init__(self, path: Path, *, project: str) -> None:
        self._path = path
        self._project = project
        self._told = TrackedSweep()

    def start(self, run: SweepRun) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self._path)
        name = f"{self._project}/{run.sweep}"
        self._told = read(self._path).get(name, TrackedSweep())
        self._told.sweep = {"id": name, **dataclasses.asdict(run)}
        self._append({"kind": "sweep", **self._told.sweep, "status": "RUNNING"})
        return name

    def trial(self, run: TrialRun) -> None:
        points = run.points()
        line = {
            "kind": "trial",
            "parent": self._told.sweep["id"],
            **dataclasses.asdict(run),
            "status": run.status,
            "metrics": {key: series[-1].value for key, series in points.items()},
            "curves": {
                k: [(p.step, p.value) for p in points[k]] for k in run.curves if k in points
            },
            "artifacts": _places(small_artifacts(run.artifacts, run.name)),
        }
        line = json.loads(json.dumps(line))  # as it will be read: tuples become lists
        if self._told.trials.get(run.slot) != line:
            self._append(line)
            self._told.trials[run.slot] = line

    def finish(self, status: Status, note: str, artifacts: dict[str, Path]) -> None:
        end = {"status": status, "note": note}
        places = _places(small_artifacts(artifacts, self._told.sweep["id"]))
        self._append({"kind": "sweep", **self._told.sweep, **end, "artifacts": places})

    def url(self) -> str:
        return str(self._path)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


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
        if line["kind"] == "sweep":
            sweeps.setdefault(line["id"], TrackedSweep()).sweep = line
        else:
            sweeps.setdefault(line["parent"], TrackedSweep()).trials[line["slot"]] = line
    return sweeps


def _places(artifacts: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in artifacts.items()}


def _end_last_line(path: Path) -> None:
    """A killed writer leaves half a line; the next one must not be glued to it."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
