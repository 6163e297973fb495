"""Compare trials: one with another, and one with itself computed again. Imports no torch at first.

A trial is computed again from tracking data alone, in a store of its own that is thrown away;
prepared artifacts of the store are read by key. Nothing of the store is written.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from air_core.datasets import get_dataset
from air_core.specs import FeaturesSpec, FolderImages, SyntheticFeaturesSpec, TrialSpec
from orchestrator.git import commit, diff_digest, uncommitted
from orchestrator.keys import artifact_key
from orchestrator.planning import Requirement, Resolver, name_of, refs_of, requirements_of
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, TrialRecord, read_trial
from orchestrator.store.artifacts import versions
from orchestrator.tracking.lookup import PastTrial, of_run

TOLERANCE = 0.01  # of a metric, absolute and relative: rounding differs between processors
TOLERATED = 0.02  # share of test images with another prediction
NOT_HERE = "not here"
CODE = ("commit", "dirty", "code", "device", "host", "user")
WIDTH = 22  # characters of a value
Verdict = Literal["bit-equal", "within tolerance", "different", "inputs differ"]


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs."""
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


# ---------------------------------------------------------------- one trial and another


@dataclass(frozen=True)
class Differences:
    """What differs between two trials, as pairs; of metrics all that either has, but for times."""

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]  # digests
    code: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[float | None, float | None]]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people, in three columns."""
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
    settings = _pairs(a.flat, b.flat)
    # Other settings reach other code: only of the same question does that say anything.
    names = [name for name in CODE if name != "code" or not settings]
    code = [
        {name: side.made.get(name) or None for name in names} | (side.made.get("versions") or {})
        for side in (a, b)
    ]
    metrics = [_timeless(side.metrics) for side in (a, b)]
    return Differences(
        *(a.label, b.label),
        settings=settings,
        inputs=_pairs(a.digests, b.digests),
        code=_pairs(*code),
        metrics={
            name: (metrics[0].get(name), metrics[1].get(name))
            for name in sorted(metrics[0].keys() | metrics[1].keys())
        },
    )


def _line(name: str, *pair: object) -> str:
    a, b = ("-" if value in (None, "") else str(value)[:WIDTH] for value in pair)
    return f"  {name:<32} {a:<{WIDTH}} {b}"


# ---------------------------------------------------------------- a trial computed again


@dataclass
class Repro:
    """How a trial compares with itself computed again. Pairs are then and now."""

    run: str
    key: str
    verdict: Verdict = "inputs differ"
    inputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    code: dict[str, tuple[str, str]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)  # bytes by digest
    predictions: tuple[int, int] | None = None  # images with another prediction, of how many
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.verdict in ("bit-equal", "within tolerance")

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: the verdict, then all that differs, inputs first."""
        found = [f"{self.run}: {self.verdict}"]
        for word, pairs in (("input", self.inputs), ("code", self.code), ("bytes", self.files)):
            found += [
                f"  {word:<6} {name}: {_short(then)} then, {_short(now)} now"
                for name, (then, now) in pairs.items()
            ]
        found += [
            f"  metric {name}: {then:.6g} then, {now:.6g} now"
            for name, (then, now) in self.metrics.items()
        ]
        if self.predictions is not None and self.predictions[0]:
            found.append("  {} of {} test images have another prediction".format(*self.predictions))
        return found + [f"  note: {note}" for note in self.notes]


def repro(
    run_id: str,
    store: ArtifactStore,
    resolver: Resolver,
    uri: str | None,
    say: Callable[[str], None] = lambda line: None,
) -> Repro:
    """Compute the trial of a run again.

    Args:
        say: gets a line before each step that takes long.

    Raises:
        ValueError: no such run, no done trial, or an input that must be prepared first.
    """
    then = of_run(run_id, store.root, uri)
    spec = then.spec()
    found = Repro(then.label, then.key)
    if not then.same_key():
        now = artifact_key(spec)
        found.inputs["recipe"] = (then.key[:12], f"{now.stage}/v{now.recipe} {now.digest[:12]}")
        found.notes.append("this version computes these settings in another way")
    wanted = _wanted(spec)
    for name, ref in refs_of(spec).items():
        here = _digest_here(name, ref.name, resolver)
        stored = all(
            _is_there(requirement, store) for requirement in wanted if name in _read_by(requirement)
        )
        if here == NOT_HERE and name != "backbone" and stored:
            found.notes.append(
                f"{name} {ref.name} is {NOT_HERE}; what was made of it is in the store"
            )
        elif here != ref.digest:
            found.inputs[f"{name} {ref.name}"] = (ref.digest, here)
    # What else may explain a difference: code and libraries.
    here_now = {"commit": commit(), "dirty": diff_digest(uncommitted()), **versions()}
    before = {
        **{name: then.made.get(name, "") for name in ("commit", "dirty")},
        **(then.made.get("versions") or {}),
    }
    code = _pairs(before, {name: here_now.get(name) for name in before})
    found.code = {name: (a or "none", b or "none") for name, (a, b) in code.items()}
    if not found.inputs:
        with _again(spec, then, wanted, store, resolver, say) as record:
            _compare(found, then, spec, store, record)
    return found


# ---------------------------------------------------------------- inputs


def _wanted(spec: TrialSpec) -> list[Requirement]:
    """What the trial itself reads; not what that was made from."""
    read = (spec.features, spec.tokens, spec.test_features, spec.test_tokens)
    rows = (spec.synthetic_features, spec.synthetic_tokens)
    return [
        requirement for requirement in requirements_of([spec]) if requirement.spec in (*read, *rows)
    ]


def _read_by(requirement: Requirement) -> tuple[str, ...]:
    """Settings of the outside things that an artifact was made from."""
    if isinstance(requirement.spec, SyntheticFeaturesSpec):
        return ("generator", "backbone")
    return ("dataset", "test_dataset", "backbone")


def _digest_here(name: str, of: str, resolver: Resolver) -> str:
    try:
        if name.endswith("dataset"):
            return resolver.dataset(get_dataset(of)).digest
        return resolver.weights(name, of).digest
    except ValueError:
        return NOT_HERE


# ---------------------------------------------------------------- computing


def _is_there(requirement: Requirement, store: ArtifactStore) -> bool:
    """Of a row the features are enough: a trial opens no image."""
    if isinstance(requirement.spec, SyntheticFeaturesSpec):
        return set(requirement.shards()) <= store.row(requirement.spec).present(".safetensors")
    return store.has(requirement.spec)


@contextmanager
def _again(
    spec: TrialSpec,
    then: PastTrial,
    wanted: list[Requirement],
    store: ArtifactStore,
    resolver: Resolver,
    say: Callable[[str], None],
) -> Iterator[TrialRecord]:
    """The trial's record, in a store that is thrown away."""
    import torch

    there = then.made.get("device") or "cpu"
    device = "cuda" if there == "cuda" and torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="airsweep-") as folder:
        bench = ArtifactStore(Path(folder))
        for requirement in wanted:
            if _is_there(requirement, store):
                _link(requirement, store, bench)
            else:
                _make(requirement, store, bench, resolver, device, say)
        say(f"computing {then.label} again on {device}")
        yield run_trial(spec, bench, device)


def _link(requirement: Requirement, store: ArtifactStore, bench: ArtifactStore) -> None:
    if isinstance(requirement.spec, SyntheticFeaturesSpec):
        store.row(requirement.spec).pull(requirement.shards(), ".safetensors")
    else:
        store.get(requirement.spec)
    real = store.path(artifact_key(requirement.spec))
    place = bench.artifacts / real.relative_to(store.artifacts)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(real.resolve(), place, target_is_directory=True)


def _make(
    requirement: Requirement,
    store: ArtifactStore,
    bench: ArtifactStore,
    resolver: Resolver,
    device: str,
    say: Callable[[str], None],
) -> None:
    """What needs no GPU-hours is made again; the rest has to be prepared."""
    from orchestrator.stages.build import build_features
    from orchestrator.stages.context import WorkerContext
    from orchestrator.stages.image_rows import build_image_block, open_generator

    worker = WorkerContext(bench, resolver.data_root, device)
    match requirement.spec:
        case FeaturesSpec():
            say(f"making {name_of(requirement.key)} again")
            build_features(requirement.spec, worker)
        case SyntheticFeaturesSpec(images=FolderImages() as images):
            say(f"reading {name_of(requirement.key)} again")
            for c, block in requirement.shards():
                build_image_block(
                    requirement.spec, c, block, worker, lambda: open_generator(images, worker)
                )
        case _:
            raise ValueError(
                f"{name_of(requirement.key)} is not in {store.name}, and drawing images takes "
                "long; run `airsweep prepare SPEC` of the sweep first, or give the --store that "
                "has them"
            )


# ---------------------------------------------------------------- comparing


def _compare(
    found: Repro, then: PastTrial, spec: TrialSpec, store: ArtifactStore, now: TrialRecord
) -> None:
    metrics = _timeless(then.metrics)
    found.metrics = _pairs(metrics, {name: now.metrics.get(name, math.nan) for name in metrics})
    files = then.made.get("files") or {}
    found.files = _pairs(files, {name: now.made["files"].get(name, "none") for name in files})
    if not files:
        found.notes.append("the tracker has no digests of predictions; metrics alone are compared")
    if store.has(spec):  # then image for image
        _, before, _ = read_trial(spec, store).predictions()
        _, after, _ = now.predictions()
        found.predictions = (int((before != after).sum()), len(before))
    if not found.metrics and not found.files:
        found.verdict = "bit-equal"
        return
    close = all(
        math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for value, other in found.metrics.values()
    )
    if found.predictions is not None:
        close = close and found.predictions[0] <= TOLERATED * found.predictions[1]
    found.verdict = "within tolerance" if close else "different"
    if (then.made.get("device") or "cpu") != now.made["device"]:
        found.code["device"] = (then.made["device"], now.made["device"])


def _short(value: str) -> str:
    return value[:12] if len(value) > 20 and " " not in value else value
