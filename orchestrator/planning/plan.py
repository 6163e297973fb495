"""What a sweep needs, what is there, what is left to do. Imports no torch and starts nothing.

What runs is what was planned: the driver walks the same slots and needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

from air_core.flat import trial_keys
from air_core.normal import normalised
from air_core.paradigms import seen_unseen
from air_core.specs import (
    CodeVersions,
    FeaturesSpec,
    GeneratedImages,
    LabelsSpec,
    LoraSpec,
    SyntheticFeaturesSpec,
    TrialSpec,
)
from orchestrator.keys import ArtifactKey, artifact_key
from orchestrator.planning.estimate import Estimate, Work, estimate, stage_work, trial_work
from orchestrator.planning.resolve import Resolver
from orchestrator.planning.studies import (
    Edit,
    Opening,
    Pruned,
    Searches,
    edit_of,
    opening,
    request_digest,
    searches,
)
from orchestrator.spec import Cell, Dimension, SweepSpec, cells_of
from orchestrator.spec.space import default_params, grid_points, study_name
from orchestrator.store import ArtifactStore, EventLog, SweepLocation, read_resolved
from orchestrator.store.checkpoints import learned_by, rungs_of

BASE_PER_CLASS = 8  # images without LoRA, drawn to show what LoRA changed
# Settings that decide whether synthetic images are read, and how many.
READS_IMAGES = (
    "images_per_class",
    "fusion_weight",
    "synthetic_weight",
    "auxiliary.source",
    "iterations",
)


@dataclass(frozen=True)
class Slot:
    """One trial that a sweep asks for: a cell, a point, a seed. Several slots may share a key."""

    id: str
    cell: Cell
    point: int
    params: Mapping[str, Any]
    seeds: Mapping[str, int]
    spec: TrialSpec
    key: ArtifactKey


@dataclass(frozen=True)
class Requirement:
    """An artifact that slots read; a row is needed up to a count of images per class."""

    spec: FeaturesSpec | LabelsSpec | LoraSpec | SyntheticFeaturesSpec
    images_per_class: int = 0
    classes: tuple[int, ...] = ()  # of a row

    @property
    def stage(self) -> str:
        return "images" if isinstance(self.spec, SyntheticFeaturesSpec) else self.key.stage

    @property
    def key(self) -> ArtifactKey:
        spec = self.spec
        return artifact_key(spec.images if isinstance(spec, SyntheticFeaturesSpec) else spec)

    def shards(self) -> list[tuple[int, int]]:
        """(class, block) of a row, class by class."""
        assert isinstance(self.spec, SyntheticFeaturesSpec)
        blocks = range(self.spec.blocks(self.images_per_class))
        return list(itertools.product(self.classes, blocks))

    def missing(self, store: ArtifactStore) -> list[tuple[int, int]]:
        """Shards that are not whole yet: images and their features."""
        assert isinstance(self.spec, SyntheticFeaturesSpec)
        images = store.row(self.spec.images).present(".parquet")
        features = store.row(self.spec).present(".safetensors")
        return [shard for shard in self.shards() if shard not in images or shard not in features]

    def have(self, store: ArtifactStore) -> int:
        if isinstance(self.spec, SyntheticFeaturesSpec):
            return len(self.shards()) - len(self.missing(store))
        return int(store.has(self.spec))

    def bytes(self, store: ArtifactStore) -> int:
        """On disk, of what is there: of a row with all that was ever drawn of it."""
        specs: list[Any] = [self.spec]
        if isinstance(self.spec, SyntheticFeaturesSpec):
            specs.append(self.spec.images)
        return sum(store.bytes(spec) for spec in specs)

    def total(self) -> int:
        return len(self.shards()) if isinstance(self.spec, SyntheticFeaturesSpec) else 1


# What people call the stages.
WORDS = {
    "features": "CLIP features",
    "labels": "pseudo-labels",
    "lora": "LoRA",
    "images": "image blocks",
}


def name_of(key: ArtifactKey) -> str:
    """An artifact for people, on a screen."""
    return f"{WORDS[key.stage]} {key.slug}"


@dataclass(frozen=True)
class Plan:
    """All of it. `slots` are those whose point is known; a search asks the rest later."""

    sweep: SweepSpec
    cells: tuple[Cell, ...]
    points: int
    slots: tuple[Slot, ...]
    total: int
    left: Mapping[str, int]  # by cell: trials that are not there yet
    done: int
    reused: int
    pruned: Mapping[str, Pruned]  # by slot: those of points that a search stopped early
    requirements: tuple[Requirement, ...]
    work: tuple[Work, ...]  # what is left to do
    estimate: Estimate
    openings: Mapping[str, Opening]  # by cell: studies that start, with what they take over
    asks: str  # digest of what is asked for
    edit: Edit | None  # None: the file asks for what it asked for before

    @property
    def to_run(self) -> int:
        return self.total - self.done - self.reused - len(self.pruned)

    def json(self, store: ArtifactStore) -> dict[str, Any]:
        """The contract of `plan --json`."""
        return {
            "cells": len(self.cells),
            "points": self.points,
            "trials": {
                "total": self.total,
                "done": self.done,
                "reused": self.reused,
                "pruned": len(self.pruned),
                "to_run": self.to_run,
            },
            "artifacts": [_artifact(requirement, store) for requirement in self.requirements],
            "estimate": self.estimate.json(),
            "edit": self.edit and asdict(self.edit),
        }


def _artifact(requirement: Requirement, store: ArtifactStore) -> dict[str, Any]:
    have, total = requirement.have(store), requirement.total()
    state = "present" if have == total else "partial" if have else "missing"
    return {
        "stage": requirement.stage,
        "key": str(requirement.key),
        "state": state,
        "have": have,
        "need": total,
        "bytes": requirement.bytes(store),
    }


def plan_sweep(
    sweep: SweepSpec, store: ArtifactStore, resolver: Resolver, event_log: EventLog
) -> Plan:
    """Everything that `sweep` asks for, against what the store and the ledger say."""
    cells = cells_of(sweep)
    assignments = sweep.seeds.assignments()
    found = searches(event_log)
    openings = _openings(sweep, cells, found, resolver, store)
    finished, moved = finished_slots(event_log), moved_slots(event_log)
    slots: list[Slot] = []
    left: dict[str, int] = {}  # trials by cell
    stopped: dict[str, Pruned] = {}
    points = 0
    uncompared: dict[str, list[int]] = {}  # by slot: rungs at which its point is still compared
    for cell in cells:
        count = found.points(cell, sweep.search)
        points += count
        left[cell.id] = count * len(assignments)
        params_of = known_points(sweep, cell, found, openings.get(cell.id))
        early = found.pruned_of(cell, sweep.search)
        carried = found.carried_into(cell, sweep.search, openings.get(cell.id))
        for number, params in sorted(params_of.items())[:count]:
            of_point = slots_of(cell, number, params, assignments, resolver, moved)
            slots += of_point
            if number in early:
                stopped |= {slot.id: early[number] for slot in of_point}
            elif sweep.search is not None and sweep.search.rungs and params not in carried:
                last = iterations_of(of_point)
                rungs = found.rungs_left(cell, sweep.search, number, last)
                uncompared |= {slot.id: rungs for slot in of_point}
    store.survey(slot.spec for slot in slots)
    there = [_is_there(slot.spec, uncompared.get(slot.id, ()), store) for slot in slots]
    done = reused = 0
    to_run: set[str] = set()
    for slot, present in zip(slots, there, strict=True):
        if slot.id in stopped:
            left[slot.cell.id] -= 1
            continue
        if present and finished.get(slot.id, ("", ""))[0] == slot.key.digest:
            done += 1
            left[slot.cell.id] -= 1
        elif present or slot.key.digest in to_run:
            reused += 1
            left[slot.cell.id] -= 1
        else:  # although it may be there for another cell, which compares it at no rung
            to_run.add(slot.key.digest)
    total = points * len(assignments)
    asks = request_digest(sweep, cells)
    known = [slot.key.digest for slot, present in zip(slots, there, strict=True) if present]
    edit = edit_of(asks, known, done + reused, total - len(stopped), openings.values(), event_log)
    asked_for = possible_trials(cells, assignments, resolver)
    requirements = tuple(requirements_of(itertools.chain(asked_for, moved_trials(slots, moved))))
    work = tuple(_work(requirements, left, cells, slots, assignments, resolver, store))
    resolver.save()
    return Plan(
        sweep=sweep,
        cells=cells,
        points=points,
        slots=tuple(slots),
        total=total,
        left=left,
        done=done,
        reused=reused,
        pruned=stopped,
        requirements=requirements,
        work=work,
        estimate=estimate(work, store, sweep.resources),
        openings=openings,
        asks=asks,
        edit=edit,
    )


def _is_there(spec: TrialSpec, rungs: Iterable[int], store: ArtifactStore) -> bool:
    """Whether a trial need not run: not even to the rungs at which it is compared, which another
    sweep may have passed without looking."""
    if not store.has(spec):
        return False
    passed = rungs_of(spec, store)[0] if rungs else {}
    return all(rung in passed for rung in rungs)


def _work(
    requirements: Sequence[Requirement],
    left: Mapping[str, int],
    cells: Sequence[Cell],
    slots: Sequence[Slot],
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> Iterator[Work]:
    """What is left to do: trials by cell, each like the cell's first; and what they lack."""
    if not any(left.values()):
        return
    for requirement in requirements:
        missing = requirement.total() - requirement.have(store)
        if missing:
            yield stage_work(requirement.spec, missing)
    points: dict[str, list[Slot]] = {}  # of each cell its first
    for slot in slots:
        known = points.setdefault(slot.cell.id, [])
        if not known or known[0].point == slot.point:
            known.append(slot)
    for cell in cells:
        if left[cell.id]:
            # A search that was not begun has no slot yet; its first point is the default.
            default = default_params(cell)
            point = points.get(cell.id) or slots_of(cell, 0, default, assignments, resolver)
            yield trial_work(point[0].spec, left[cell.id], len(point))


def _openings(
    sweep: SweepSpec,
    cells: Sequence[Cell],
    found: Searches,
    resolver: Resolver,
    store: ArtifactStore,
) -> dict[str, Opening]:
    """Studies that start, by cell. A grid has its points without a study before it."""
    search, assignments = sweep.search, sweep.seeds.assignments()
    if search is None or search.sampler == "grid":
        return {}
    searched = [cell for cell in cells if cell.space]
    current = {study_name(cell, search) for cell in searched}
    each = {
        cell.id: opening(cell, search, current, found, assignments, resolver, store)
        for cell in searched
    }
    return {cell: starts for cell, starts in each.items() if starts is not None}


def known_points(
    sweep: SweepSpec, cell: Cell, found: Searches, starts: Opening | None
) -> Mapping[int, dict[str, Any]]:
    """Points of a cell whose settings are known: all of a grid, of a search what was asked or is
    carried into it."""
    if sweep.search is None or not cell.space:
        return {0: {}}
    if sweep.search.sampler == "grid":
        return dict(enumerate(grid_points(cell)))
    return found.known(cell, sweep.search, starts)


def slots_of(
    cell: Cell,
    point: int,
    params: Mapping[str, Any],
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    moved: Mapping[str, str] = MappingProxyType({}),
) -> list[Slot]:
    """The slots of one point: one for each assignment of seeds.

    Args:
        moved: slots whose trial of that key became another one, in fp32.
    """
    slots = []
    for seeds in assignments:
        spec = resolver.trial({**cell.flat, **params, **seeds})
        words = ",".join(f"{name}={value}" for name, value in seeds.items())
        slot_id = f"{cell.id}/{point}/{words}"
        key = artifact_key(spec)
        if moved.get(slot_id) == key.digest:
            spec = replace(spec, precision="fp32")
            key = artifact_key(spec)
        slots.append(Slot(slot_id, cell, point, params, seeds, spec, key))
    return slots


def iterations_of(slots: Iterable[Slot]) -> int:
    """Of the trials of one point."""
    return min(learned_by(slot.spec).iterations for slot in slots)


def moved_trials(slots: Iterable[Slot], moved: Mapping[str, str]) -> list[TrialSpec]:
    """Trials that a sweep has come to need, beside those that it asks for."""
    return [slot.spec for slot in slots if slot.id in moved]


# ---------------------------------------------------------------- needs


def possible_trials(
    cells: Iterable[Cell], assignments: Sequence[Mapping[str, int]], resolver: Resolver
) -> Iterator[TrialSpec]:
    """The most demanding trials that each cell may come to ask for."""
    for cell in cells:
        ranges = [d for d in cell.space if d.key in (*READS_IMAGES, "prompt.length")]
        for ends in itertools.product(*[_ends(d) for d in ranges]):
            params = {d.key: end for d, end in zip(ranges, ends, strict=True)}
            for seeds in assignments:
                yield resolver.trial({**cell.flat, **params, **seeds})


def _ends(dimension: Dimension) -> Sequence[Any]:
    if dimension.values is None:
        high = dimension.max
        assert high is not None
        return [int(high) if trial_keys()[dimension.key].type is int else high]
    if all(isinstance(value, int | float) for value in dimension.values):
        return [max(dimension.values)]
    return dimension.values


def requirements_of(trials: Iterable[TrialSpec]) -> list[Requirement]:
    """Distinct artifacts that trials read, in the order in which they can be made.

    A row is needed up to the largest count that any of them asks for.
    """
    found: dict[str, Requirement] = {}
    seen: set[str] = set()
    for trial in trials:
        trial = replace(normalised(trial), seed=0)
        key = artifact_key(trial).digest
        if key in seen:
            continue
        seen.add(key)
        for requirement in _requirements(trial):
            identity = f"{requirement.key}/{artifact_key(requirement.spec).digest}"
            known = found.get(identity, requirement)
            found[identity] = replace(
                requirement,
                images_per_class=max(requirement.images_per_class, known.images_per_class),
                classes=tuple(sorted({*requirement.classes, *known.classes})),
            )
    return list(found.values())


def _requirements(trial: TrialSpec) -> Iterator[Requirement]:
    read = (trial.features, trial.tokens, trial.test_features, trial.test_tokens)
    yield from (Requirement(spec) for spec in read if spec is not None)
    classes = tuple(range(len(trial.classnames)))
    if trial.paradigm == "trzsl" and len(classes) > 1:
        _, classes = seen_unseen(len(classes), trial.class_seed)  # all that the trial reads
    row = trial.synthetic_features
    if row is not None:
        yield from _row_needs(row, trial.images_per_class, classes)
    if trial.synthetic_tokens is not None:
        yield Requirement(trial.synthetic_tokens, trial.images_per_class, classes)
    base = trial.base_images
    if base is not None:
        spec = SyntheticFeaturesSpec(
            images=base, backbone=trial.backbone, precision=trial.precision
        )
        yield Requirement(spec, BASE_PER_CLASS, classes)


def _row_needs(
    row: SyntheticFeaturesSpec, images_per_class: int, classes: tuple[int, ...]
) -> Iterator[Requirement]:
    images = row.images
    if isinstance(images, GeneratedImages) and images.lora is not None:
        labels = images.lora.labels
        yield Requirement(labels.features)
        if labels.images is not None:
            yield from _row_needs(labels.images, labels.settings.images_per_class, classes)
        yield Requirement(labels)
        yield Requirement(images.lora)
    yield Requirement(row, images_per_class, classes)


def holds(spec: Any, part: Any) -> bool:
    """Is `part` what a spec is, or anything that it is made from?"""
    if spec == part:
        return True
    if not is_dataclass(spec):
        return False
    return any(holds(getattr(spec, f.name), part) for f in fields(spec))


def level(spec: Any) -> int:
    """How many stages lie above: needs of one level do not wait for each other."""
    match spec:
        case LabelsSpec():
            above: list[Any] = [spec.features, spec.images]
        case LoraSpec():
            above = [spec.labels]
        case SyntheticFeaturesSpec():
            images = spec.images
            if spec.level == "tokens":  # after the images are there: two must not draw the same
                return 1 + level(replace(spec, level="features"))
            above = [images.lora] if isinstance(images, GeneratedImages) else []
        case _:
            above = []
    return 1 + max((level(one) for one in above if one is not None), default=0)


# ---------------------------------------------------------------- the ledger, folded


def finished_slots(event_log: EventLog) -> dict[str, tuple[str, str]]:
    """Trial key and state (done or reused) by slot, of slots whose last outcome was one of them."""
    ended = ended_slots(event_log)
    return {slot: end for slot, end in ended.items() if end[1] != "pruned"}


def ended_slots(event_log: EventLog) -> dict[str, tuple[str, str]]:
    """Trial key and state (done, reused or pruned) by slot; failed ones are left out."""
    found: dict[str, tuple[str, str]] = {}
    for event in event_log.events():
        if event["event"] in ("trial_done", "trial_reused", "trial_pruned"):
            found[event["slot"]] = (event["key"], event["event"].removeprefix("trial_"))
        elif event["event"] == "trial_failed":
            found.pop(event["slot"], None)
    return found


def moved_slots(event_log: EventLog) -> dict[str, str]:
    """Slots whose trial became not a number below fp32, with the key of that trial."""
    return {
        event["slot"]: event["key"]
        for event in event_log.events()
        if event["event"] == "trial_moved"
    }


def changed_inputs(earlier: Mapping[tuple[str, str], int]) -> list[str]:
    """What `earlier_results` found, one sentence each."""
    return [
        f"{name}: the {what} changed since: {count} "
        f"{'result is' if count == 1 else 'results are'} of the earlier "
        f"{'code' if what == 'code' else 'content'}"
        for (name, what), count in earlier.items()
    ]


def earlier_results(plan: Plan, location: SweepLocation) -> dict[tuple[str, str], int]:
    """What changed since the last run, as name and kind (folder, content or code), with the number
    of finished results of these slots that are of the earlier one."""
    try:
        inputs = read_resolved(location).get("inputs") or {"datasets": {}, "weights": {}}
    except (FileNotFoundError, ValueError):  # it was not run, or this run writes the file anew
        return {}
    before = {name: of["ref"]["digest"] for name, of in inputs["datasets"].items()}
    before |= inputs["weights"]
    versions = inputs.get("code", {})
    finished = finished_slots(location.event_log())
    earlier: dict[tuple[str, str], int] = {}
    for slot in plan.slots:
        had = finished.get(slot.id, (slot.key.digest, ""))[0] != slot.key.digest
        changed = [
            (name, "folder" if "folder:" in name else "content")
            for name, now in _inputs_of(slot)
            if now and before.get(name, now) != now
        ]
        if had:
            changed += [(part, "code") for part in _changed_parts(slot.spec.code, versions)]
        for one in changed:
            earlier[one] = earlier.get(one, 0) + had
    return earlier


def _changed_parts(now: CodeVersions, before: Mapping[str, str]) -> list[str]:
    versions = dict(now)
    return sorted(p for p in {*versions, *before} if versions.get(p) != before.get(p))


def _inputs_of(slot: Slot) -> Iterator[tuple[str, str]]:
    """Names as `Resolver.inputs` has them, and digests."""
    spec = slot.spec
    yield slot.cell.flat["dataset"], spec.dataset.digest
    if spec.test_dataset is not None:
        yield slot.cell.flat["test_dataset"], spec.test_dataset.digest
    for role in ("backbone", "generator"):
        ref = getattr(spec, role)
        yield f"{role} {ref.name}", ref.digest
