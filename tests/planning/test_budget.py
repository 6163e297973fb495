"""What is reserved before something starts, and what is said when it does not start."""

from __future__ import annotations

import time
from typing import Any

import pytest

from air_core.specs import FeaturesSpec
from orchestrator.planning import Need
from orchestrator.planning.budget import Purse
from orchestrator.spec import Resources
from orchestrator.spec.sweep import Budget, GeneratorResources, TrialResources
from orchestrator.store import ArtifactStore

GPU = Resources(trial=TrialResources(gpu=0.5), generator=GeneratorResources(gpu=1))


def purse(spent: float = 0.0, history: dict[str, float] | None = None, **budget: Any) -> Purse:
    """A purse of a run that started `spent` seconds ago."""
    started = time.monotonic() - spent
    return Purse(Budget(**budget), GPU, history or {}, started=started)


def test_without_a_budget_everything_starts():
    assert purse(spent=1e9).affords([("a", 1000)])


@pytest.mark.parametrize(("trials", "fits"), [(1, True), (3, True), (5, False)])
def test_a_point_starts_only_if_the_wall_time_lasts_for_all_of_its_trials(trials, fits):
    found = purse(spent=50, wall=100, history={"trials": 12.0})
    assert found.affords([("a", trials)]) == fits


def test_jobs_beside_it_take_no_wall_time_from_a_job_but_gpu_hours():
    under_way = [("a", 3), ("a", 3)]
    assert purse(spent=50, wall=100, history={"trials": 12.0}).affords(under_way)
    share = 12.0 * 0.5 / 3600  # GPU-hours of a trial
    assert purse(gpu_hours=6.1 * share, history={"trials": 12.0}).affords(under_way)
    assert not purse(gpu_hours=5.9 * share, history={"trials": 12.0}).affords(under_way)


def test_what_has_ended_is_spent_and_tells_what_the_next_will_take():
    found = purse(gpu_hours=100 * 0.5 / 3600, history={"trials": 1.0})
    found.trial_ended("slow", 40.0)
    assert found.affords([("slow", 1)])
    assert not found.affords([("slow", 2)])
    found.trial_ended("quick", 2.0)
    assert found.affords([("quick", 2)])
    assert found.expected("unknown") == 21.0  # the mean of this run
    assert "gpu_hours" in found.refusal


def test_where_nothing_was_measured_only_what_is_spent_counts():
    assert purse(spent=99, wall=100).affords([("a", 9)])
    assert not purse(spent=101, wall=100).affords([("a", 1)])


def test_a_refusal_says_what_is_spent_what_is_needed_and_what_to_do():
    found = purse(spent=50, wall=100, history={"trials": 60.0})
    assert not found.affords([("a", 1)])
    assert found.refusal == (
        "budget.wall: 50 of 100 s are spent and the next point needs about 60 s more; "
        "run again to go on, or raise budget.wall"
    )


def test_making_images_and_lora_is_reserved_too(tmp_path, resolver):
    need = Need(resolver.trial({"images_per_class": 0}).features)
    assert isinstance(need.spec, FeaturesSpec)
    store = ArtifactStore(tmp_path)
    hour = {"features": 3600.0}
    assert purse(gpu_hours=1.1, history=hour).affords_preparing([need], store, 1)
    assert not purse(gpu_hours=0.9, history=hour).affords_preparing([need], store, 1)
    assert not purse(wall=3000, history=hour).affords_preparing([need], store, 1)
    assert purse(wall=3000, history=hour).affords_preparing([need], store, 2)
    store.get_or_build(need.spec, lambda folder: {})
    assert purse(gpu_hours=0.9, history=hour).affords_preparing([need], store, 1)
