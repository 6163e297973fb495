"""Data types of sweep runs and child runs. Imports no MLflow.

The store and the event log are authoritative. MLflow is a view of them; `reconcile` sends all that
MLflow lacks. This module does not depend on Ray, the store or the trial code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Kind = Literal["trial", "point"]  # a point is a setting over its seeds and splits


@dataclass
class Counts:
    """Numbers of runs that were sent to MLflow."""

    sent: int = 0  # outcomes that were missing or different
    present: int = 0  # outcomes that were unchanged
    settings: int = 0  # settings that were missing or different
    sweep: bool = False  # whether the sweep run itself was changed


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Metrics of a run. Accuracies and other shares are fractions, not percentages."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # one value per iteration
    interval: str = ""  # of a setting: kind of interval between _low and _high
    classifier: str = ""  # of a setting: that of best/test/accuracy


@dataclass(frozen=True)
class DatasetUse:
    """A part of a dataset that a run reads. MLflow distinguishes the parts by their names."""

    name: str
    context: Literal["pool", "test"]
    digest: str  # of the whole dataset
    source: str  # a folder, or the origin of a dataset that airsweep knows


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The run of a sweep, the parent of its trial runs and setting runs."""

    sweep: str
    project: str
    spec_hash: str
    note: str  # Markdown
    user: str
    commit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """A child of the sweep run: the outcome of a trial, or a setting over its trials.

    Times come from records, never from the clock, so an outcome that is sent twice has the same
    times and is stored once.

    Args:
        id: the slot of a trial or the point of a setting. Unique within the sweep and kind, and
            stable over resumes.
        content: identifies the computation: the key of a trial, a digest of a setting's trials.
        numbers: computes the metrics, which takes time for a setting; called only if MLflow lacks
            them.
        started: ms since the epoch, like `ended`. A running trial ends now.
        files: small files by name; each function is called only if MLflow lacks the files.
    """

    kind: Kind
    id: str
    content: str
    name: str
    status: Status = "FINISHED"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    numbers: Callable[[], Numbers] = Numbers
    note: str = ""  # Markdown
    datasets: Sequence[DatasetUse] = ()
    started: int
    ended: int
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
