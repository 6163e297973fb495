"""Data types of child runs, and names of tags. Imports no MLflow.

The store and the event log are authoritative. MLflow is a view of them, which `export` brings up to
date. This module does not depend on Ray, the store or the trial code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from orchestrator.keys import digest

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits
RECIPE = 1  # increase when a change computes other numbers from the same records

# Tags of MLflow itself, which a client sets in a process with a git checkout and a user name.
USER, COMMIT = "mlflow.user", "mlflow.source.git.commit"
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"


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
