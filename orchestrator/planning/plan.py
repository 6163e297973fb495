"""The plan of a sweep: its trials, the artifacts they read, and what is missing of both.

The driver runs the slots and builds the requirements of this plan. This module imports no torch
and starts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from air_core.components import is_component
from air_core.methods import EMBEDDED
from air_core.paradigms import seen_unseen
from air_core.specs.conditions import uses_evidence
from air_core.specs.flat import trial_keys
from air_core.specs.normal import used_components
from orchestrator.keys import ArtifactKey, RowSpec, StageSpec, artifact_key
from orchestrator.planning.estimate import Estimate, Work, estimate, stage_work, trial_work
from orchestrator.planning.resolve import Resolver, with_model_defaults
from orchestrator.planning.resources import trial_memory
from orchestrator.planning.trial_checks import InvalidSetting
from orchestrator.plugins import use_plugins
from orchestrator.spec import Cell, Dimension, SweepSpec, cells_of
from orchestrator.spec.space import default_params, grid_points, point_count, study_name
from orchestrator.stages import STAGES, SyntheticFeaturesSpec, TrialSpec
from orchestrator.store import ArtifactStore, EventLog, SweepLocation, read_resolved

BASE_PER_CLASS = 8  # images without LoRA, drawn to measure what LoRA changes
# Settings that determine whether a trial reads synthetic images, and how many.
READS_IMAGES = (
    "images_per_class",
    "fusion_weight",
    "synthetic_weight",
    "auxiliary.source",
    "iterations",
    "evidence.draws",
)


# Where the result of a trial comes from: this sweep computed it; another sweep did; another trial
# of this sweep has the same key; this sweep computed it and was stopped before it recorded that.
ResultState = Literal["done", "reused", "shared", "recovered"]
RESULT_STATES: dict[ResultState, str] = {
    "done": "done",
    "reused": "reused from another sweep",
    "shared": "shared with another trial",
    "recovered": "recovered after a stop",
}


def results_text(results: Mapping[Any, int]) -> str:
    """Numbers of results by state in words.

    >>> results_text({"done": 3, "reused": 0, "shared": 2, "recovered": 0})
    '3 done, 2 shared with another trial'
    """
    return ", ".join(
        f"{results[state]} {words}"
        for state, words in RESULT_STATES.items()
        if results[state] or state == "done"
    )


@dataclass(frozen=True)
class Slot:
    """One trial of a sweep: a cell, a point and seeds. Several slots may share a key."""

    id: str
    cell: Cell
    point: int
    params: Mapping[str, Any]
    seeds: Mapping[str, int]
    spec: TrialSpec
    key: ArtifactKey


@dataclass(frozen=True)
class Requirement:
    """An artifact that trials read; of a row, a number of images of some classes or draws."""

    spec: StageSpec
    images: int = 0  # per class or draw; 0 except for a row
    classes: tuple[int, ...] = ()  # label indices, or numbers of draws; empty except for a row
    # Of a row without LoRA that no trial reads: the rows that it is compared with.
    compared_with: tuple[StageSpec, ...] = field(default=(), compare=False)

    @property
    def rows(self) -> tuple[StageSpec, ...]:
        """The specs of the rows in the store; empty for other artifacts."""
        return self.spec.rows

    @property
    def key(self) -> ArtifactKey:
        return artifact_key(self.spec.maker)

    @property
    def stage(self) -> str:
        return self.spec.maker.stage

    def shards(self) -> list[tuple[int, int]]:
        """The shards of a row as (class or draw, block), in the order in which they are made."""
        assert isinstance(self.spec, RowSpec)
        return self.spec.shards(self.images, self.classes)

    def missing(self, store: ArtifactStore) -> list[tuple[int, int]]:
        """The shards of a row of which images, features or errors are missing."""
        present = self._present(store)
        return [shard for shard in self.shards() if shard not in present]

    def is_replaced(self, store: ArtifactStore) -> bool:
        """Whether the store has the artifact that replaces this row."""
        return self.spec.whole is not None and store.has(self.spec.whole)

    def _present(self, store: ArtifactStore) -> frozenset[tuple[int, int]]:
        """The shards of a row that are complete in the store, or no longer needed."""
        if self.is_replaced(store):
            return frozenset(self.shards())
        shards = (store.row(spec).existing_shards() for spec in self.rows)
        return frozenset.intersection(*shards)

    def have(self, store: ArtifactStore) -> int:
        """Number of parts in the store: shards of a row; 0 or 1 for any other artifact."""
        if isinstance(self.spec, RowSpec):
            classes, blocks = {*self.classes}, self.spec.blocks(self.images)
            return sum(c in classes and block < blocks for c, block in self._present(store))
        return int(store.has(self.spec))

    def bytes(self, store: ArtifactStore) -> int:
        """Bytes in the store; of a row, all its shards, even those that are not required here."""
        return sum(store.bytes(spec) for spec in self.rows or (self.spec,))

    def total(self) -> int:
        """Number of required parts, as `have` counts them."""
        if isinstance(self.spec, RowSpec):
            return len(self.classes) * self.spec.blocks(self.images)
        return 1

    def is_complete(self, store: ArtifactStore) -> bool:
        """Whether the store has all parts."""
        return self.have(store) == self.total()


STAGE_TITLES = {spec.stage: spec.title for spec in STAGES.values()}  # in messages and on screens


def artifact_title(key: ArtifactKey) -> str:
    """Name of an artifact in messages and on screens."""
    return f"{STAGE_TITLES[key.stage]} {key.slug}"


@dataclass(frozen=True)
class Plan:
    """The trials and artifacts of a sweep, and how many of them are left.

    `slots` has the trials whose point is known; a search suggests further points during the run.
    """

    sweep: SweepSpec
    cells: tuple[Cell, ...]
    points: int
    slots: tuple[Slot, ...]
    total: int
    left: Mapping[str, int]  # number of trials to run, by cell
    results: Mapping[ResultState, int]  # number of trials that need not run, by state
    unlogged: int  # results that the event log does not have yet
    requirements: tuple[Requirement, ...]
    work: tuple[Work, ...]  # that is left
    estimate: Estimate

    @property
    def to_run(self) -> int:
        return self.total - sum(self.results.values())

    @property
    def ended(self) -> int:
        """Number of trials whose end the event log has."""
        return self.total - self.to_run - self.unlogged

    def json(self, store: ArtifactStore) -> dict[str, Any]:
        """The output of `plan --json`; its keys are a contract."""
        return {
            "cells": len(self.cells),
            "points": self.points,
            "trials": {"total": self.total, **self.results, "to_run": self.to_run},
            "artifacts": [_artifact(requirement, store) for requirement in self.requirements],
            "estimate": self.estimate.json(),
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
    """Compare what a sweep needs with its store and its event log.

    Raises:
        SpecError: an input is missing or does not fit; the message has the position of its name.
    """
    use_plugins(sweep.plugins)  # another sweep may have been read meanwhile
    try:
        return _plan_sweep(sweep, store, resolver, event_log)
    except InvalidSetting as problem:
        raise sweep.error(problem.key, problem.value, str(problem)) from problem


def _plan_sweep(
    sweep: SweepSpec, store: ArtifactStore, resolver: Resolver, event_log: EventLog
) -> Plan:
    sweep = with_model_defaults(sweep, resolver)
    cells, assignments = cells_of(sweep), sweep.seeds.assignments()
    suggested = suggested_points(event_log)
    moved = fp32_slots(event_log)
    slots: list[Slot] = []
    left: dict[str, int] = {}  # trials by cell
    points = 0
    if sweep.search is not None and sweep.search.objective == "validation_accuracy":
        for name in dict.fromkeys(str(cell.flat["dataset"]) for cell in cells):
            resolver.check_validation(name)
    for cell in cells:
        count = point_count(cell, sweep.search)
        points += count
        left[cell.id] = count * len(assignments)
        for number, params in sorted(known_points(sweep, cell, suggested).items())[:count]:
            slots += slots_of(cell, number, params, assignments, resolver, moved)
    store.survey(slot.spec for slot in slots)
    present = [store.has(slot.spec) for slot in slots]
    logged = logged_results(event_log)
    logged.assign({slot.id: slot.key.digest for slot in slots})
    results: dict[ResultState, int] = dict.fromkeys(RESULT_STATES, 0)
    unlogged = 0
    to_run: set[str] = set()  # keys
    for slot, is_present in zip(slots, present, strict=True):
        if is_present or slot.key.digest in to_run:
            result = logged.state(slot.id, slot.key.digest) if is_present else "shared"
            results[result] += 1
            is_logged = is_present and logged.keys.get(slot.id) == slot.key.digest
            unlogged += not is_logged
            left[slot.cell.id] -= 1
        else:
            to_run.add(slot.key.digest)
    total = points * len(assignments)
    # The file of a sweep does not list the trials that are repeated in fp32.
    repeated = [slot.spec for slot in slots if slot.id in moved]
    trials = [*possible_trials(cells, assignments, resolver)]
    requirements = tuple(
        requirement
        for requirement in requirements_of(itertools.chain(trials, repeated))
        if not requirement.is_replaced(store)
    )
    if any(left.values()):
        sweep = _with_trial_memory(sweep, trials, resolver)
    work = tuple(_remaining_work(requirements, left, cells, slots, assignments, resolver, store))
    resolver.save()
    return Plan(
        sweep=sweep,
        cells=cells,
        points=points,
        slots=tuple(slots),
        total=total,
        left=left,
        results=results,
        unlogged=unlogged,
        requirements=requirements,
        work=work,
        estimate=estimate(work, store, sweep.resources),
    )


def _remaining_work(
    requirements: Sequence[Requirement],
    left: Mapping[str, int],
    cells: Sequence[Cell],
    slots: Sequence[Slot],
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> Iterator[Work]:
    """The work that is left: missing artifacts, and the trials of each cell.

    All trials of a cell count like its first one.
    """
    if not any(left.values()):
        return
    for requirement in requirements:
        missing = requirement.total() - requirement.have(store)
        if missing:
            yield stage_work(requirement.spec, missing)
    first_trials = {slot.cell.id: slot.spec for slot in reversed(slots)}
    for cell in cells:
        if left[cell.id]:
            # A search that has not started has no slots yet; its first point is the default.
            default = {**cell.flat, **default_params(cell), **assignments[0]}
            spec = first_trials.get(cell.id) or resolver.trial(default)
            pool = None if spec.train.steps else resolver.pool_size(spec)
            yield trial_work(spec, left[cell.id], len(assignments), pool)


def _with_trial_memory(
    sweep: SweepSpec, trials: Sequence[TrialSpec], resolver: Resolver
) -> SweepSpec:
    """The sweep with the memory of its largest trial, unless its file sets the memory of trials."""
    resources, seeds = sweep.resources, len(sweep.seeds.values)
    if resources.trial.memory is not None:
        return sweep
    device = "cuda" if resources.trial.gpu else "cpu"
    # The embedded digits are few, and reading them takes longer than the rest of a plan.
    large = [spec for spec in trials if spec.dataset.name != EMBEDDED["dataset"]]
    memory = max(
        (trial_memory(spec, resolver.pool_size(spec) or 0, seeds, device) for spec in large),
        default=0,
    )
    if not memory:
        return sweep
    trial = replace(resources.trial, memory=memory)
    return replace(sweep, resources=replace(resources, trial=trial))


def known_points(
    sweep: SweepSpec, cell: Cell, suggested: Mapping[str, Mapping[int, dict[str, Any]]]
) -> Mapping[int, dict[str, Any]]:
    """The points of a cell whose settings are known, by number: all of a grid, and those that a
    search has suggested.

    Args:
        suggested: from `suggested_points`.
    """
    if sweep.search is None or not cell.space:
        return {0: {}}
    if sweep.search.sampler == "grid":
        return dict(enumerate(grid_points(cell)))
    return suggested.get(study_name(cell, sweep.search), {})


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
        moved: from `fp32_slots`; slots whose trial is repeated in fp32, with that trial's key.
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


# ---------------------------------------------------------------- requirements


def possible_trials(
    cells: Iterable[Cell], assignments: Sequence[Mapping[str, int]], resolver: Resolver
) -> Iterator[TrialSpec]:
    """The trials of each cell that need the most artifacts, over its whole search space.

    Of assignments that differ in `seed` alone, which no artifact depends on, it takes the first.
    """
    distinct: dict[tuple[Any, ...], Mapping[str, int]] = {}
    for seeds in assignments:
        distinct.setdefault(tuple(item for item in seeds.items() if item[0] != "seed"), seeds)
    for cell in cells:
        ranges = [d for d in cell.space if d.key in (*READS_IMAGES, "prompt.length")]
        for ends in itertools.product(*[_ends(d) for d in ranges]):
            params = {d.key: end for d, end in zip(ranges, ends, strict=True)}
            for seeds in distinct.values():
                yield resolver.trial({**cell.flat, **params, **seeds})


def _ends(dimension: Dimension) -> Sequence[Any]:
    """The largest number of a dimension; all its values if they are not numbers."""
    if dimension.values is None:
        high = dimension.max
        assert high is not None
        return [int(high) if trial_keys()[dimension.key].type is int else high]
    if all(isinstance(value, int | float) for value in dimension.values):
        return [max(dimension.values)]
    return dimension.values


def requirements_of(trials: Iterable[TrialSpec]) -> list[Requirement]:
    """List the distinct artifacts that trials read, each after those that it is built from.

    A row of images is required up to the largest count and all classes that any trial reads.
    """
    distinct = dict.fromkeys(replace(trial, seed=0) for trial in trials)
    return merge(requirement for trial in distinct for requirement in _requirements(trial))


def merge(requirements: Iterable[Requirement]) -> list[Requirement]:
    """The distinct artifacts of some requirements, of a row the largest count and all classes."""
    merged: dict[str, Requirement] = {}
    for requirement in requirements:
        identity = f"{requirement.key}/{artifact_key(requirement.spec).digest}"
        earlier = merged.get(identity, requirement)
        merged[identity] = replace(
            requirement,
            images=max(requirement.images, earlier.images),
            classes=tuple(sorted({*requirement.classes, *earlier.classes})),
            compared_with=(
                (*earlier.compared_with, *requirement.compared_with)
                if earlier.compared_with and requirement.compared_with
                else ()
            ),
        )
    return list(merged.values())


def _requirements(trial: TrialSpec) -> Iterator[Requirement]:
    classes = tuple(range(len(trial.classnames)))
    if trial.paradigm == "trzsl" and len(classes) > 1:
        _, classes = seen_unseen(len(classes), trial.class_seed)  # images of unseen classes only
    yield from _inputs(trial, classes)
    base, row = trial.base_features, trial.synthetic_features
    if base is not None and row is not None:
        yield Requirement(base, BASE_PER_CLASS, classes, (row,))


def _inputs(spec: StageSpec, classes: tuple[int, ...]) -> Iterator[Requirement]:
    """The artifacts that a spec is made from, each after its own inputs."""
    for needed in spec.inputs(classes):
        yield from _inputs(needed.spec, classes)
        yield Requirement(*needed)


def contains_spec(spec: Any, part: Any) -> bool:
    """Whether `part` equals `spec` or one of the specs nested in it."""
    if spec == part:
        return True
    if not is_dataclass(spec):
        return False
    return any(contains_spec(getattr(spec, f.name), part) for f in fields(spec))


def independent_of(
    failed: Iterable[Requirement], requirements: Iterable[Requirement]
) -> list[Requirement]:
    """The requirements that contain none of those that failed.

    A row without LoRA is left out with the rows that it is compared with.
    """
    missing = [spec for each in failed for spec in (each.spec, *each.rows, each.spec.whole) if spec]

    def is_stopped(spec: Any) -> bool:
        return any(contains_spec(spec, part) for part in missing)

    return [
        each
        for each in requirements
        if not is_stopped(each.spec)
        and not (each.compared_with and all(map(is_stopped, each.compared_with)))
    ]


def build_level(spec: StageSpec) -> int:
    """Depth of an artifact in the build order, from 1; artifacts of one level are independent."""
    if isinstance(spec, SyntheticFeaturesSpec) and spec.level == "tokens":
        # After the images, which would otherwise be drawn twice.
        return 1 + build_level(replace(spec, level="features"))
    return 1 + max((build_level(needed.spec) for needed in spec.inputs(())), default=0)


# ---------------------------------------------------------------- state in the event log


@dataclass
class LoggedResults:
    """The results in an event log, and where each comes from."""

    keys: dict[str, str] = field(default_factory=dict)  # of trials whose last outcome is a result
    started: set[str] = field(default_factory=set)  # slots of trials without an outcome
    first: dict[str, tuple[str, ResultState]] = field(default_factory=dict)  # slot, state; by key

    def read(self, event: Mapping[str, Any]) -> ResultState | None:
        """Process the next event; returns the state of the result, if it is one."""
        match event["event"]:
            case "trials_started":
                self.started.update(event["slots"])
            case "trial_failed":
                self.started.discard(event["slot"])
                self.keys.pop(event["slot"], None)
            case "trial_done" | "trial_reused" as name:
                slot, key = event["slot"], event["key"]
                self.keys[slot] = key
                if name == "trial_done":
                    self.first[key] = (slot, "done")
                state = self.state(slot, key)
                self.started.discard(slot)
                return state
        return None

    def state(self, slot: str, key: str) -> ResultState:
        """State of a result that the store has."""
        found: ResultState = "recovered" if slot in self.started else "reused"
        owner, state = self.first.setdefault(key, (slot, found))
        return state if owner == slot else "shared"

    def assign(self, planned: Mapping[str, str]) -> None:
        """Assign results to the slots of a plan, if an edit moved them to other slots.

        Args:
            planned: keys of the planned trials, by slot.
        """
        for slot, key in planned.items():
            if key in self.first and planned.get(self.first[key][0]) != key:
                self.first[key] = (slot, self.first[key][1])


def logged_results(event_log: EventLog) -> LoggedResults:
    """Read the results of an event log."""
    results = LoggedResults()
    for event in event_log.events():
        results.read(event)
    return results


def ended_slots(event_log: EventLog) -> dict[str, tuple[str, str]]:
    """Trial key and state (done or reused) by slot, without failed slots."""
    ended: dict[str, tuple[str, str]] = {}
    for event in event_log.events():
        if event["event"] in ("trial_done", "trial_reused"):
            ended[event["slot"]] = (event["key"], event["event"].removeprefix("trial_"))
        elif event["event"] == "trial_failed":
            ended.pop(event["slot"], None)
    return ended


def suggested_points(event_log: EventLog) -> dict[str, dict[int, dict[str, Any]]]:
    """Settings of the points that searches have suggested, by study and number."""
    suggested: dict[str, dict[int, dict[str, Any]]] = {}
    for event in event_log.events():
        if event["event"] == "point_asked":
            suggested.setdefault(event["study"], {})[event["point"]] = event["params"]
    return suggested


def fp32_slots(event_log: EventLog) -> dict[str, str]:
    """Slots whose trial had NaN or infinite values below fp32, with the key of that trial."""
    return {
        event["slot"]: event["key"]
        for event in event_log.events()
        if event["event"] == "trial_moved"
    }


def changed_inputs(earlier: Mapping[tuple[str, str], int]) -> list[str]:
    """Describe each result of `earlier_results` in a sentence."""
    return [
        f"{name}: the {kind} changed since: {count} "
        f"{'result is' if count == 1 else 'results are'} of the earlier "
        f"{'code' if kind == 'code' else 'content'}"
        for (name, kind), count in earlier.items()
    ]


def earlier_results(plan: Plan, location: SweepLocation) -> dict[tuple[str, str], int]:
    """Count the results of a plan's slots that were computed from inputs or code that changed.

    Returns:
        Number of results by name and kind of the change: `folder`, `content` or `code`.
    """
    try:
        inputs = read_resolved(location).get("inputs") or {"datasets": {}, "weights": {}}
    except (FileNotFoundError, ValueError):  # never run, or the file is damaged and rewritten
        return {}
    before = {name: entry["ref"]["digest"] for name, entry in inputs["datasets"].items()}
    before |= {words: ref["digest"] for words, ref in inputs["weights"].items()}
    versions = inputs.get("code", {})
    finished = logged_results(location.event_log()).keys
    earlier: dict[tuple[str, str], int] = {}
    for slot in plan.slots:
        outdated = finished.get(slot.id, slot.key.digest) != slot.key.digest
        changed = [
            (name, "folder" if "folder:" in name else "content")
            for name, now in _inputs_of(slot)
            if now and before.get(name, now) != now
        ]
        if outdated:
            changed += [(part, "code") for part in _changed_parts(slot.spec, versions)]
        for change in changed:
            earlier[change] = earlier.get(change, 0) + outdated
    return earlier


def _changed_parts(spec: TrialSpec, before: Mapping[str, str]) -> list[str]:
    versions = dict(spec.versions)
    components = {registry.part(name) for registry, name in used_components(spec)}
    return sorted(
        part
        for part in {*versions, *before}
        if versions.get(part) != before.get(part)
        and (
            part in components if is_component(part) else uses_evidence(spec) or part != "evidence"
        )
    )


def _inputs_of(slot: Slot) -> Iterator[tuple[str, str]]:
    """Inputs of a slot by the names of `Resolver.inputs`, with their digests."""
    spec = slot.spec
    yield slot.cell.flat["dataset"], spec.dataset.digest
    if spec.test_dataset is not None:
        yield slot.cell.flat["test_dataset"], spec.test_dataset.digest
    for role in ("backbone", "generator"):
        ref = getattr(spec, role)
        yield f"{role} {slot.cell.flat.get(role, ref.name)}", ref.digest
