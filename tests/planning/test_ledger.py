"""The ledger that a run writes is what later commands read."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.planning import Plan, plan_of
from orchestrator.planning.ledger import LEDGER, Ledger, lines_of, read_ledger
from orchestrator.planning.plan import slots_of, write_ledger
from orchestrator.planning.resolve import resolver_of
from orchestrator.spec import load_sweep
from orchestrator.spec.space import study_name
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.sweeps import write_sweep

SEARCH = """
fixed: {method: air, precision: bf16}
search: {points: 4, width: 2, sampler: random, space: {fusion_weight: {min: 0, max: 1}}}
seeds: {vary: [split_seed, seed], values: [[1, 1], [2, 2]]}
"""


GRID = """
grid: {method: [fpl, air], prompt.length: [4, 2]}
fixed: {generation.template: ["a {}", "the {}"]}
seeds: [2, 1]
"""


@pytest.fixture
def location(tmp_path: Path) -> SweepLocation:
    location = SweepLocation(ArtifactStore(tmp_path / "runs"), "default", "mine", None)
    location.event_log().folder.mkdir(parents=True)
    return location


def started(location: SweepLocation, body: str) -> Plan:
    """The plan of a sweep whose run has begun."""
    sweep = load_sweep(write_sweep(location.store.root.parent, "mine", body))
    plan = plan_of(sweep, location)
    write_ledger(location, plan)
    location.event_log().append("sweep_started", total=plan.total)
    return plan


def same(ledger: Ledger, plan: Ledger) -> bool:
    """Whether a ledger has all that it has of a plan."""
    names = ("about", "cells", "points", "studies", "data")
    return lines_of(ledger.slots) == lines_of(plan.slots) and all(
        getattr(ledger, name) == getattr(plan, name) for name in names
    )


def test_a_ledger_is_what_the_run_planned(location):
    plan = started(location, GRID)
    ledger = read_ledger(location)
    assert same(ledger, plan)
    assert [slot.settings for slot in ledger.slots] == [slot.settings for slot in plan.slots]
    assert [*ledger.about.grid] == ["method", "prompt.length"]


def test_points_of_the_last_run_are_in_the_event_log(location):
    plan, event_log = started(location, SEARCH), location.event_log()
    (cell,), search = plan.cells, plan.sweep.search
    assert read_ledger(location).slots == ()
    resolver = resolver_of(location)
    for number, weight in enumerate((0.5, 0.25)):
        params = {"fusion_weight": weight}
        slots = slots_of(cell, number, params, plan.sweep.seeds.assignments(), resolver)
        fields = {"study": study_name(cell, search), "point": number, "params": params}
        event_log.append("point_asked", cell=cell.id, **fields, slots=lines_of(slots))
    ledger = read_ledger(location)
    assert same(ledger, plan_of(plan.sweep, location))
    assert [slot.point for slot in ledger.slots] == [0, 0, 1, 1]
    assert [*ledger.slots[0].seeds] == ["split_seed", "seed"]
    started(location, SEARCH.replace("[2, 2]", "[3, 3]"))
    assert {tuple(slot.seeds.values()) for slot in read_ledger(location).slots} == {(1, 1), (3, 3)}


def test_a_damaged_ledger_is_refused(location):
    started(location, "fixed: {method: fpl}\n")
    file = location.folder / LEDGER
    for content in (file.read_bytes().replace(b"fpl", b"cpl"), b"{", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"ledger\.json is damaged: .*; run `airsweep run`"):
            read_ledger(location)
    file.unlink()
    with pytest.raises(ValueError, match=r"ledger\.json is missing; run `airsweep run`"):
        read_ledger(location)
