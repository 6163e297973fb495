"""Damaged inputs and results of a sweep: found before a run and set aside, to be made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec
from orchestrator.errors import DamagedArtifact
from orchestrator.keys import Stage
from orchestrator.planning import (
    Plan,
    Requirement,
    Resolver,
    holds,
    possible_trials,
    requirements_of,
)
from orchestrator.store import ArtifactStore


def set_damaged_aside(
    plan: Plan, store: ArtifactStore, resolver: Resolver
) -> list[DamagedArtifact]:
    """Read the trials of a plan and what its missing trials will read, on this machine.

    Features and images of trials that are done are not read, since nothing will use them.

    Returns:
        What was damaged, and now counts as missing.

    Raises:
        PermissionError: something is damaged that this user may not rename.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        checks = list(_checks(plan, store, resolver))
        found = threads.map(lambda one: _set_aside(one[0], one[1], store), checks)
        return [damaged for damaged in found if damaged is not None]


def _set_aside(
    check: Callable[[], object], lock: str, store: ArtifactStore
) -> DamagedArtifact | None:
    try:
        check()
        return None
    except DamagedArtifact:
        # Another driver may have found the same, and made it again by now.
        with store.locks.exclusive(lock):
            try:
                check()
                return None
            except DamagedArtifact as damaged:
                store.set_aside(damaged)
                return damaged


def _checks(
    plan: Plan, store: ArtifactStore, resolver: Resolver
) -> Iterator[tuple[Callable[[], object], str]]:
    """Checks that raise DamagedArtifact, each with the lock of those who make what it reads."""
    trials = {slot.key.digest: slot.spec for slot in plan.slots}
    for digest, trial in trials.items():
        yield partial(store.check, trial), digest
    left = [cell for cell in plan.cells if plan.left[cell.id]]
    requirements = requirements_of(possible_trials(left, plan.sweep.seeds.assignments(), resolver))
    for requirement in requirements:
        if isinstance(requirement.spec, SyntheticFeaturesSpec):
            row = store.row(requirement.spec)
            for c, block in requirement.shards():
                lock = f"{requirement.key.digest}-{c}-{block}"
                yield partial(row.check, c, block, ".safetensors"), lock
        # Labels and LoRA are read only while images are drawn; a LoRA is not trained anew for
        # images that are there.
        elif isinstance(requirement.spec, FeaturesSpec) or _draws_from(
            requirement.spec, requirements, store
        ):
            yield partial(store.check, requirement.spec), requirement.key.digest


def _draws_from(spec: Stage, requirements: Sequence[Requirement], store: ArtifactStore) -> bool:
    """Are images missing that are drawn with this LoRA, or with one trained on these labels?"""
    rows = (
        requirement
        for requirement in requirements
        if isinstance(requirement.spec, SyntheticFeaturesSpec)
    )
    return any(holds(row.spec, spec) and row.have(store) < row.total() for row in rows)
