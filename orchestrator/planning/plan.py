"""The plan of a sweep: its trials, the artifacts they read, and what is missing of both.

The driver runs the slots and builds the requirements of this plan. This module imports no torch
and starts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from air_core.methods import EMBEDDED
from air_core.settings.components import is_component
from air_core.settings.conditions import uses_evidence
from air_core.settings.normal import normalised, used_components
from orchestrator.keys import ArtifactKey, artifact_key, key_of_normal
from orchestrator.planning.estimate import Estimate, Work, estimate, stage_work, trial_work
from orchestrator.planning.history import History, read_history
from orchestrator.planning.ledger import (
    LEDGER,
    About,
    Data,
    Ledger,
    Needs,
    Slot,
    ledger_json,
    read_file,
    results_in,
)
from orchestrator.planning.requirements import Requirement, requirements_of
from orchestrator.planning.resolve import Resolver, text_digest, with_model_defaults
from orchestrator.planning.resources import trial_memory
from orchestrator.planning.trial_checks import InvalidSetting
from orchestrator.plugins import use_plugins
from orchestrator.spec import Cell, Dimension, SweepSpec, cells_of
from orchestrator.spec.space import default_params, grid_points, point_count, study_name
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore, EventLog, SweepLocation, read_resolved

# Settings that determine whether a trial reads synthetic images, and how many.
READS_IMAGES = (
    "images_per_class",
    "fusion_weight",
    "synthetic_weight",
    "auxiliary.source",
    "iterations",
    "evidence.draws",
)


@dataclass(frozen=True)
class PlannedSlot(Slot):
    """A slot with the spec of its trial."""

    spec: TrialSpec


@dataclass(frozen=True, kw_only=True)
class Plan(Ledger):
    """The ledger of a run before it starts, and the artifacts that its trials read.

    Its states are those of an earlier run.
    """

    sweep: SweepSpec
    slots: tuple[PlannedSlot, ...]
    trials: Mapping[str, tuple[TrialSpec, ...]]  # that need the most artifacts, by cell
    requirements: tuple[Requirement, ...]
    work: tuple[Work, ...]  # that is left
    estimate: Estimate

    def inputs(self, cells: Iterable[Cell]) -> list[Requirement]:
        """The distinct artifacts that the trials of some cells read."""
        return requirements_of(trial for cell in cells for trial in self.trials[cell.id])

    def json(self, store: ArtifactStore) -> dict[str, Any]:
        """The output of `plan --json`; its keys are a contract."""
        return {
            "cells": len(self.cells),
            "points": sum(self.points.values()),
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
    history = read_history(event_log)
    if sweep.search is not None and sweep.search.objective == "validation_accuracy":
        for name in dict.fromkeys(str(cell.flat["dataset"]) for cell in cells):
            resolver.check_validation(name)
    points = {cell.id: point_count(cell, sweep.search) for cell in cells}
    slots = [
        slot
        for cell in cells
        for number, params in sorted(known_points(sweep, cell, history).items())
        if number < points[cell.id]
        for slot in slots_of(cell, number, params, assignments, resolver)
    ]
    trials = {cell.id: [*possible_trials(cell, assignments, resolver)] for cell in cells}
    every = [*itertools.chain(*trials.values())]
    ledger = Ledger(
        about=about(sweep, every),
        cells=cells,
        points=points,
        studies={cell.id: study_name(cell, sweep.search) for cell in cells if sweep.search},
        slots=tuple(slots),
        data=_data(cells, trials, resolver),
        history=history,
        alive=False,
        has_result=results_in(store, slots),
    )
    requirements = tuple(each for each in requirements_of(every) if not each.is_replaced(store))
    if ledger.to_run:
        sweep = _with_trial_memory(sweep, every, resolver)
    work = tuple(_remaining_work(requirements, ledger, slots, assignments, resolver, store))
    resolver.save()
    return Plan(
        **{f.name: getattr(ledger, f.name) for f in fields(Ledger)},
        sweep=sweep,
        trials={cell: tuple(of_cell) for cell, of_cell in trials.items()},
        requirements=requirements,
        work=work,
        estimate=estimate(work, store, sweep.resources),
    )


def _remaining_work(
    requirements: Sequence[Requirement],
    ledger: Ledger,
    slots: Sequence[PlannedSlot],
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
    store: ArtifactStore,
) -> Iterator[Work]:
    """The work that is left: missing artifacts, and the trials of each cell.

    All trials of a cell count like its first one.
    """
    if not ledger.to_run:
        return
    for requirement in requirements:
        missing = requirement.total() - requirement.have(store)
        if missing:
            yield stage_work(requirement.spec, missing)
    first_trials = {slot.cell.id: slot.spec for slot in reversed(slots)}
    for cell in ledger.cells:
        if left := ledger.left[cell.id]:
            # A search that has not started has no slots yet; its first point is the default.
            default = {**cell.flat, **default_params(cell), **assignments[0]}
            spec = first_trials.get(cell.id) or resolver.trial(default)
            pool = None if spec.train.steps else resolver.pool_size(spec)
            yield trial_work(spec, left, len(assignments), pool)


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


def about(sweep: SweepSpec, trials: Iterable[TrialSpec] = ()) -> About:
    """What tables and screens say of a sweep."""
    return About(
        name=sweep.name,
        question=sweep.question,
        options=sweep.options,
        source=sweep.source,
        digest=text_digest(sweep.text),
        objective=sweep.search.objective if sweep.search else None,
        runs=len(sweep.seeds.values),
        vary=sweep.seeds.vary,
        grid=sweep.grid,
        space=tuple(dimension.key for dimension in sweep.space),
        is_smoke=sweep.is_smoke,
        reads_images=any(trial.synthetic_features for trial in trials),
    )


def known_points(sweep: SweepSpec, cell: Cell, history: History) -> Mapping[int, dict[str, Any]]:
    """The points of a cell whose settings are known, by number: all of a grid, and those that a
    search has suggested."""
    if sweep.search is None or not cell.space:
        return {0: {}}
    if sweep.search.sampler == "grid":
        return dict(enumerate(grid_points(cell)))
    return history.suggested.get(study_name(cell, sweep.search), {})


def slots_of(
    cell: Cell,
    point: int,
    params: Mapping[str, Any],
    assignments: Sequence[Mapping[str, int]],
    resolver: Resolver,
) -> list[PlannedSlot]:
    """The slots of one point: one for each assignment of seeds."""
    slots, trials = [], dict[Any, tuple[TrialSpec, bool]]()
    for seeds in assignments:
        others = _without_seed(seeds)
        if others not in trials:
            spec = resolver.trial({**cell.flat, **params, **seeds}).normal
            trials[others] = spec, normalised(replace(spec, seed=1)).seed == 1
        spec, uses_seed = trials[others]
        if uses_seed and "seed" in seeds:
            spec = replace(spec, seed=seeds["seed"])
        words = ",".join(f"{name}={value}" for name, value in seeds.items())
        slot_id = f"{cell.id}/{point}/{words}"
        key = key_of_normal(spec)
        slots.append(PlannedSlot(slot_id, cell, point, params, seeds, key, uses_seed, spec))
    return slots


def _without_seed(seeds: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The seeds on which inputs of trials depend: all but `seed`."""
    return tuple(item for item in seeds.items() if item[0] != "seed")


def _data(
    cells: Iterable[Cell], trials: Mapping[str, Iterable[TrialSpec]], resolver: Resolver
) -> dict[str, Data]:
    """The datasets of cells, by the names that these have."""
    read: dict[str, dict[ArtifactKey, None]] = {}
    for cell in cells:
        for trial in trials[cell.id]:
            features = {"dataset": trial.features, "test_dataset": trial.test_features}
            for key, spec in features.items():
                if spec is not None:
                    read.setdefault(cell.flat[key], {})[artifact_key(spec)] = None
    inputs = {name: resolver.dataset_by_name(name) for name in read}
    return {
        name: Data(inputs[name].ref, inputs[name].classnames, tuple(keys))
        for name, keys in read.items()
    }


# ---------------------------------------------------------------- requirements


def possible_trials(
    cell: Cell, assignments: Sequence[Mapping[str, int]], resolver: Resolver
) -> Iterator[TrialSpec]:
    """The trials of a cell that need the most artifacts, over its whole search space.

    Of assignments that differ in `seed` alone, which no artifact depends on, it takes the first.
    """
    distinct: dict[tuple[Any, ...], Mapping[str, int]] = {}
    for seeds in assignments:
        distinct.setdefault(_without_seed(seeds), seeds)
    ranges = [d for d in cell.space if d.key in (*READS_IMAGES, "prompt.length")]
    for ends in itertools.product(*[_ends(d) for d in ranges]):
        params = {d.key: end for d, end in zip(ranges, ends, strict=True)}
        for seeds in distinct.values():
            yield resolver.trial({**cell.flat, **params, **seeds})


def _ends(dimension: Dimension) -> Sequence[Any]:
    """The largest number of a dimension; all its values if they are not numbers."""
    values: Sequence[Any] = dimension.values or (dimension.max,)
    return [max(values)] if all(isinstance(each, int | float) for each in values) else values


def needs_of(plan: Plan) -> dict[str, Needs]:
    """The artifacts that the cells of a plan read, over their whole search space, by cell."""
    needs: dict[str, Needs] = {cell.id: {} for cell in plan.cells}
    for cell in plan.cells:
        for each in plan.inputs([cell]):
            whole = artifact_key(each.spec.whole) if each.spec.whole else None
            for spec in each.rows or (each.spec,):
                needs[cell.id][artifact_key(spec).digest[:12]] = whole
    for slot in plan.slots:
        if slot.spec.test_dataset:  # it reads the prompt of the trial without it
            trained = artifact_key(replace(slot.spec, test_dataset=None))
            needs[slot.cell.id][trained.digest[:12]] = None
    return needs


def write_ledger(location: SweepLocation, plan: Plan) -> None:
    """Write the ledger of a plan, with the needs of the cells that `--only` leaves out."""
    axes, needs = plan.sweep.axes, dict[str, Needs]()
    with suppress(ValueError):
        every = {cell.id for cell in (cells_of(replace(plan.sweep, grid=axes)) if axes else ())}
        needs = {cell: need for cell, need in read_file(location).needs.items() if cell in every}
    location.write(LEDGER, ledger_json(plan, needs | needs_of(plan)))


# ---------------------------------------------------------------- changes since the last run


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
    except ValueError:  # the file is damaged and rewritten
        return {}
    before = inputs["datasets"] | inputs["weights"]
    versions = inputs.get("code", {})
    earlier: dict[tuple[str, str], int] = {}
    for slot in plan.slots:
        event = plan.history.outcomes.get(slot.id, {"event": "trial_failed"})
        outdated = event["event"] != "trial_failed" and event["key"] != slot.key.digest
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


def _inputs_of(slot: PlannedSlot) -> Iterator[tuple[str, str]]:
    """Inputs of a slot by the names of `Resolver.inputs`, with their digests."""
    spec = slot.spec
    yield slot.cell.flat["dataset"], spec.dataset.digest
    if spec.test_dataset is not None:
        yield slot.cell.flat["test_dataset"], spec.test_dataset.digest
    for role in ("backbone", "generator"):
        ref = getattr(spec, role)
        yield f"{role} {slot.cell.flat.get(role, ref.name)}", ref.digest
