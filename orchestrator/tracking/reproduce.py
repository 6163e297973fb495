"""Compares two trials, or a trial with a second computation of it.

The second computation takes its settings from the record of the trial, or from MLflow alone, reads
prepared artifacts from the store and runs in a temporary store. Nothing is written to the store.
Torch is imported for the computation only.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from air_core.datasets import get_dataset
from air_core.specs import (
    EvidenceSpec,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from orchestrator.git import commit, diff_digest, uncommitted_diff
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, Resolver, artifact_title, refs_of, requirements_of
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.artifacts import versions
from orchestrator.store.code_version import part_version
from orchestrator.tracking.lookup import PastTrial, find_trial

TOLERANCE = 0.01  # of a metric, absolute and relative: rounding differs between processors
MAX_CHANGED = 0.02  # share of test images whose prediction may change
UNAVAILABLE = "unavailable"
CODE = ("commit", "dirty", "code", "device", "host", "user")
WIDTH = 22  # characters per value in a table of differences
Verdict = Literal["bit-equal", "within tolerance", "different", "inputs differ"]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The pairs of values that differ, by name."""
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


# ---------------------------------------------------------------- two trials


@dataclass(frozen=True)
class Differences:
    """The differences between two trials, as pairs of values.

    Metrics are complete, whether they differ or not, except for times.
    """

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]  # digests
    code: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[float | None, float | None]]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """A table of three columns for the screen."""
        lines = [f"{'':<34} {'a':<{WIDTH}} b", f"{'a':<4} {self.a}", f"{'b':<4} {self.b}"]
        parts = {"settings": self.settings, "inputs": self.inputs, "code": self.code}
        for word, pairs in parts.items():
            lines.append(word if pairs else f"{word}: the same")
            lines += [_line(name, *pair) for name, pair in pairs.items()]
        lines.append("metrics")
        for name, (a, b) in self.metrics.items():
            gap = "" if a is None or b is None else f"  {round(b - a, 4) + 0.0:+.4f}"
            numbers = (None if value is None else f"{value:.4f}" for value in (a, b))
            lines.append(_line(name, *numbers) + gap)
        return lines


def differences(a: PastTrial, b: PastTrial) -> Differences:
    """Compare two trials."""
    settings = _differing(a.flat, b.flat)
    # Trials with other settings use other code, so the code is compared for equal settings only.
    names = [name for name in CODE if name != "code" or not settings]
    code = [
        {name: side.provenance.get(name) or None for name in names}
        | (side.provenance.get("versions") or {})
        for side in (a, b)
    ]
    metrics = [_without_times(side.metrics) for side in (a, b)]
    return Differences(
        *(a.label, b.label),
        settings=settings,
        inputs=_differing(a.digests, b.digests),
        code=_differing(*code),
        metrics={
            name: (metrics[0].get(name), metrics[1].get(name))
            for name in sorted(metrics[0].keys() | metrics[1].keys())
        },
    )


def _line(name: str, *pair: object) -> str:
    a, b = ("-" if value in (None, "") else str(value)[:WIDTH] for value in pair)
    return f"  {name:<32} {a:<{WIDTH}} {b}"


# ---------------------------------------------------------------- a trial computed twice


@dataclass
class Reproduction:
    """Comparison of a past trial with a second computation. Pairs are past and current values."""

    run: str
    key: str
    verdict: Verdict = "inputs differ"
    inputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    code: dict[str, tuple[str, str]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)  # digests of the result files
    predictions: tuple[int, int] | None = None  # changed predictions, test images
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.verdict in ("bit-equal", "within tolerance")

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The verdict and all differences, for the screen."""
        lines = [f"{self.run}: {self.verdict}"]
        for word, pairs in (("input", self.inputs), ("code", self.code), ("bytes", self.files)):
            lines += [
                f"  {word:<6} {name}: {_short(past)} then, {_short(now)} now"
                for name, (past, now) in pairs.items()
            ]
        lines += [
            f"  metric {name}: {past:.6g} then, {now:.6g} now"
            for name, (past, now) in self.metrics.items()
        ]
        if self.predictions is not None and self.predictions[0]:
            lines.append("  {} of {} test images have another prediction".format(*self.predictions))
        return lines + [f"  note: {note}" for note in self.notes]


def repro(
    name: str,
    store: ArtifactStore,
    resolver: Resolver,
    uri: str | None,
    report: Callable[[str], None] = lambda line: None,
    allow_plugins: bool = False,
) -> Reproduction:
    """Compute a past trial again and compare the results.

    Args:
        name: the trial, as for `find_trial`.
        report: called with a message before each long step.
        allow_plugins: run the code of plugins also of a sweep of another user.

    Raises:
        Refused: another user recorded the plugins of the trial.
        ValueError: the name is not that of a finished trial, or an input must be prepared first.
    """
    past = find_trial(name, store, uri, to_run=True, allow_plugins=allow_plugins)
    spec = past.spec()
    if not past.has_current_key():  # MLflow has no code versions; they may be the present ones
        names = [ref.name for name, ref in refs_of(spec).items() if name.endswith("dataset")]
        spec = replace(spec, code=resolver.code_versions(names))
    result = Reproduction(past.label, past.key)
    code_then = str(past.provenance.get("code") or "unknown")
    code_now = part_version("trials")
    now = artifact_key(spec)
    if not now.digest.startswith(past.key):
        result.inputs["recipe"] = (past.key[:12], f"{now.stage}/v{now.recipe} {now.digest[:12]}")
        result.notes.append(
            f"the key of a trial contains the version of its code: {code_then} then, {code_now} "
            f"now; to repeat it, check out commit {past.provenance.get('commit') or 'unknown'}"
        )
    requirements = _requirements(resolver.with_scored_images(spec))
    for name, ref in refs_of(spec).items():
        current = _current_digest(name, ref.name, resolver)
        stored = all(
            _is_stored(requirement, store)
            for requirement in requirements
            if name in _read_by(requirement)
        )
        if current == UNAVAILABLE and name != "backbone" and stored:
            result.notes.append(
                f"{name} {ref.name} is {UNAVAILABLE}; its artifacts in the store are used"
            )
        elif current != ref.digest:
            result.inputs[f"{name} {ref.name}"] = (ref.digest, current)
    # Code and libraries can also explain a difference.
    after = {"commit": commit(), "dirty": diff_digest(uncommitted_diff())}
    after |= {"trials": code_now, **versions()}
    before = {
        **{name: past.provenance.get(name, "") for name in ("commit", "dirty")},
        "trials": code_then,
        **(past.provenance.get("versions") or {}),
    }
    code = _differing(before, {name: after.get(name) for name in before})
    result.code = {name: (a or "none", b or "none") for name, (a, b) in code.items()}
    if not result.inputs:
        with _recompute(spec, past, requirements, store, resolver, report) as record:
            _compare(result, past, spec, store, record)
    return result


# ---------------------------------------------------------------- inputs


def _requirements(spec: TrialSpec) -> list[Requirement]:
    """The artifacts that the trial reads, without the artifacts that those were made from."""
    read = {needed.spec for needed in spec.inputs((), 0)}
    return [requirement for requirement in requirements_of([spec]) if requirement.spec in read]


def _read_by(requirement: Requirement) -> tuple[str, ...]:
    """The settings that name the inputs of an artifact."""
    if isinstance(requirement.spec, SyntheticFeaturesSpec):
        return ("generator", "backbone")
    if isinstance(requirement.spec, EvidenceSpec):
        return ("generator", "dataset", "backbone")
    return ("dataset", "test_dataset", "backbone")


def _current_digest(setting: str, name: str, resolver: Resolver) -> str:
    try:
        if setting.endswith("dataset"):
            return resolver.dataset(get_dataset(name)).digest
        return resolver.weights(setting, name).digest
    except ValueError:
        return UNAVAILABLE


# ---------------------------------------------------------------- computing


def _is_stored(requirement: Requirement, store: ArtifactStore) -> bool:
    """Whether the store has an artifact. Of a row the features suffice: a trial reads no image."""
    if requirement.rows:
        return set(requirement.shards()) <= store.row(requirement.spec).existing_shards()
    return store.has(requirement.spec)


@contextmanager
def _recompute(
    spec: TrialSpec,
    past: PastTrial,
    requirements: list[Requirement],
    store: ArtifactStore,
    resolver: Resolver,
    report: Callable[[str], None],
) -> Iterator[TrialRecord]:
    """Compute the trial in a temporary store, which exists inside the `with` block."""
    import torch

    from orchestrator.stages.trial import run_trial

    past_device = past.provenance.get("device") or "cpu"
    device = "cuda" if past_device == "cuda" and torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="airsweep-") as folder:
        scratch = ArtifactStore(Path(folder))
        for requirement in requirements:
            if _is_stored(requirement, store):
                _link(requirement, store, scratch)
            else:
                _rebuild(requirement, store, scratch, resolver, device, report)
        report(f"computing {past.label} again on {device}")
        yield run_trial(spec, scratch, device)


def _link(requirement: Requirement, store: ArtifactStore, scratch: ArtifactStore) -> None:
    if requirement.rows:
        store.row(requirement.spec).pull(requirement.shards())
    else:
        store.get(requirement.spec)
    source = store.path(artifact_key(requirement.spec))
    link = scratch.artifacts / source.relative_to(store.artifacts)
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), link, target_is_directory=True)


def _rebuild(
    requirement: Requirement,
    store: ArtifactStore,
    scratch: ArtifactStore,
    resolver: Resolver,
    device: str,
    report: Callable[[str], None],
) -> None:
    """Build an artifact that takes little time.

    Raises:
        ValueError: the artifact takes long, so it must be prepared first.
    """
    from orchestrator.stages import stage_module
    from orchestrator.stages.context import WorkerContext

    spec, title = requirement.spec, artifact_title(requirement.key)
    if not spec.is_quick:
        raise ValueError(
            f"{title} is not in {store.name}, and images take long to draw; run "
            "`airsweep prepare SPEC` first, or give the --store that has them"
        )
    worker = WorkerContext(scratch, resolver.data_root, device)
    report(f"rebuilding {title}")
    stage = stage_module(spec)
    if requirement.rows:
        for index, block in requirement.shards():
            stage.build(spec, index, block, worker, lambda: stage.open_model(spec, worker))
    else:
        stage.build(spec, worker)


# ---------------------------------------------------------------- comparing


def _compare(
    result: Reproduction, past: PastTrial, spec: TrialSpec, store: ArtifactStore, now: TrialRecord
) -> None:
    metrics = _without_times(past.metrics)
    result.metrics = _differing(
        metrics, {name: now.metrics.get(name, math.nan) for name in metrics}
    )
    files = past.provenance.get("files") or {}
    result.files = _differing(
        files, {name: now.provenance["files"].get(name, "none") for name in files}
    )
    if not files:
        result.notes.append("MLflow has no digests of the predictions; only metrics are compared")
    if store.has(spec):  # compare the prediction of each image
        _, before, _ = read_trial(spec, store).predictions()
        _, after, _ = now.predictions()
        result.predictions = (int((before != after).sum()), len(before))
    if not result.metrics and not result.files:
        result.verdict = "bit-equal"
        return
    close = all(
        math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for value, other in result.metrics.values()
    )
    if result.predictions is not None:
        close = close and result.predictions[0] <= MAX_CHANGED * result.predictions[1]
    result.verdict = "within tolerance" if close else "different"
    if (past.provenance.get("device") or "cpu") != now.provenance["device"]:
        result.code["device"] = (past.provenance["device"], now.provenance["device"])


def _short(value: str) -> str:
    return value[:12] if len(value) > 20 and " " not in value else value
