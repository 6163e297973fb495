"""Finds damaged inputs and results of a sweep before a run and sets them aside, so that the run
makes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from air_core.settings.normal import normalised
from orchestrator.errors import DamagedArtifact
from orchestrator.execution.screen import Screen
from orchestrator.keys import StageSpec
from orchestrator.planning import (
    Plan,
    Requirement,
    Resolver,
    contains_spec,
    requirements_of,
)
from orchestrator.planning.plan import plan_sweep
from orchestrator.spec import SweepSpec
from orchestrator.store import ArtifactStore, SweepLocation


def plan_and_repair(
    sweep: SweepSpec, location: SweepLocation, resolver: Resolver, screen: Screen
) -> Plan:
    """Plan a sweep, with damaged artifacts set aside so that this run makes them again."""
    while True:
        try:
            plan = plan_sweep(sweep, location.store, resolver, location.event_log())
            damaged = _set_damaged_aside(plan, location.store)
        except DamagedArtifact as problem:  # planning itself reads some records
            location.store.set_aside(problem)
            damaged = [problem]
        for artifact in damaged:
            screen.message(
                f"{artifact.name} was damaged ({artifact.reason}) and will be made again"
            )
        if not damaged:
            return plan


def _set_damaged_aside(plan: Plan, store: ArtifactStore) -> list[DamagedArtifact]:
    """Check the trials of a plan and the inputs of its missing trials, on this machine.

    The features and images of finished trials are not checked, since nothing will read them.

    Returns:
        The damaged artifacts, which count as missing from now on.

    Raises:
        PermissionError: this user may not rename a damaged artifact.
    """
    with ThreadPoolExecutor() as threads:
        results = threads.map(
            lambda check: _run_check(check[0], check[1], store),
            list(_checks(plan, store)),
        )
        return [damaged for damaged in results if damaged is not None]


def _run_check(
    check: Callable[[], object], lock: str, store: ArtifactStore
) -> DamagedArtifact | None:
    try:
        check()
        return None
    except DamagedArtifact:
        # Another driver may have found the same damage, and repaired it by now.
        with store.locks.exclusive(lock):
            try:
                check()
                return None
            except DamagedArtifact as damaged:
                store.set_aside(damaged)
                return damaged


def _checks(plan: Plan, store: ArtifactStore) -> Iterator[tuple[Callable[[], object], str]]:
    """Checks that raise DamagedArtifact, each with the lock under which the artifact is made."""
    trials = {slot.key.digest: slot.spec for slot in plan.slots}
    for digest, trial in trials.items():
        yield partial(store.check, trial), digest
    unfinished = [cell for cell in plan.cells if plan.left[cell.id]]
    possible = [trial for cell in unfinished for trial in plan.trials[cell.id]]
    read = {needed.spec for trial in map(normalised, possible) for needed in trial.inputs(())}
    requirements = requirements_of(possible)
    for requirement in requirements:
        if requirement.rows:
            row = store.row(requirement.spec)
            for c, block in requirement.shards():
                lock = f"{requirement.key.digest}-{c}-{block}"
                yield partial(row.check, c, block), lock
        # Labels and LoRA are read only while images are drawn. A damaged LoRA whose images are
        # complete is not trained again.
        elif requirement.spec in read or _is_needed_to_draw(requirement.spec, requirements, store):
            yield partial(store.check, requirement.spec), requirement.key.digest


def _is_needed_to_draw(
    spec: StageSpec, requirements: Sequence[Requirement], store: ArtifactStore
) -> bool:
    """Whether images are missing that are drawn with this LoRA, or one trained on these labels."""
    rows = (requirement for requirement in requirements if requirement.rows)
    return any(contains_spec(row.spec, spec) and not row.is_complete(store) for row in rows)
