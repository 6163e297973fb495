"""Damaged inputs and results of a sweep: found before a run and set aside, to be made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from air_core.specs import FeaturesSpec, SyntheticFeaturesSpec
from orchestrator.keys import Stage
from orchestrator.plan import Need, Plan, holds, needs_of, possible_trials
from orchestrator.resolve import Resolver
from orchestrator.rows import Row
from orchestrator.store import ArtifactStore
from orchestrator.verification import DamagedArtifact

Check = Callable[[], Sequence[DamagedArtifact]]


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
        found = list(threads.map(lambda check: check(), _checks(plan, store, resolver)))
    damaged = [one for each in found for one in each]
    for one in damaged:
        store.set_aside(one)
    return damaged


def _checks(plan: Plan, store: ArtifactStore, resolver: Resolver) -> Iterator[Check]:
    trials = {slot.key.digest: slot.spec for slot in plan.slots}
    for trial in trials.values():
        yield partial(_artifact, trial, store)
    left = [cell for cell in plan.cells if plan.left[cell.id]]
    needs = needs_of(possible_trials(left, plan.sweep.seeds.assignments(), resolver))
    for need in needs:
        if isinstance(need.spec, SyntheticFeaturesSpec):
            yield partial(_shards, store.row(need.spec), need)
        # Labels and LoRA are read only while images are drawn; a LoRA is not trained anew for
        # images that are there.
        elif isinstance(need.spec, FeaturesSpec) or _draws_from(need.spec, needs, store):
            yield partial(_artifact, need.spec, store)


def _draws_from(spec: Stage, needs: Sequence[Need], store: ArtifactStore) -> bool:
    """Are images missing that are drawn with this LoRA, or with one trained on these labels?"""
    rows = (need for need in needs if isinstance(need.spec, SyntheticFeaturesSpec))
    return any(holds(row.spec, spec) and row.have(store) < row.total() for row in rows)


def _artifact(spec: Stage, store: ArtifactStore) -> Sequence[DamagedArtifact]:
    try:
        store.check(spec)
    except DamagedArtifact as damaged:
        return [damaged]
    return []


def _shards(row: Row, need: Need) -> Sequence[DamagedArtifact]:
    return list(row.damaged(need.shards(), ".safetensors"))
