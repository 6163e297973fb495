"""What is reserved before something starts, and what is said when it does not start."""

from __future__ import annotations

import time
from typing import Any

import pytest

from air_core.specs import FeaturesSpec
from orchestrator.planning import Requirement
from orchestrator.planning.budget import BudgetTracker
from orchestrator.spec import Resources
from orchestrator.spec.sweep import Budget, GeneratorResources, TrialResources
from orchestrator.store import ArtifactStore

GPU = Resources(trial=TrialResources(gpu=0.5), generator=GeneratorResources(gpu=1))


def budget_tracker(
    spent: float = 0.0, history: dict[str, float] | None = None, **budget: Any
) -> BudgetTracker:
    """A purse of a run that started `spent` seconds ago."""
    started = time.monotonic() - spent
    return BudgetTracker(Budget(**budget), GPU, history or {}, started=started)


def test_without_a_budget_everything_starts():
    assert budget_tracker(spent=1e9).can_start([("a", 1000)])


@pytest.mark.parametrize(("trials", "fits"), [(1, True), (3, True), (5, False)])
def test_a_point_starts_only_if_the_wall_time_lasts_for_all_of_its_trials(trials, fits):
    found = budget_tracker(spent=50, wall=100, history={"trials": 12.0})
    assert found.can_start([("a", trials)]) == fits


def test_jobs_beside_it_take_no_wall_time_from_a_job_but_gpu_hours():
    under_way = [("a", 3), ("a", 3)]
    assert budget_tracker(spent=50, wall=100, history={"trials": 12.0}).can_start(under_way)
    share = 12.0 * 0.5 / 3600  # GPU-hours of a trial
    assert budget_tracker(gpu_hours=6.1 * share, history={"trials": 12.0}).can_start(under_way)
    assert not budget_tracker(gpu_hours=5.9 * share, history={"trials": 12.0}).can_start(under_way)


def test_what_has_ended_is_spent_and_tells_what_the_next_will_take():
    found = budget_tracker(gpu_hours=100 * 0.5 / 3600, history={"trials": 1.0})
    found.trial_ended("slow", 40.0)
    assert found.can_start([("slow", 1)])
    assert not found.can_start([("slow", 2)])
    found.trial_ended("quick", 2.0)
    assert found.can_start([("quick", 2)])
    assert found.expected("unknown") == 21.0  # the mean of this run
    assert "gpu_hours" in found.refusal


def test_where_nothing_was_measured_only_what_is_spent_counts():
    assert budget_tracker(spent=99, wall=100).can_start([("a", 9)])
    assert not budget_tracker(spent=101, wall=100).can_start([("a", 1)])


def test_a_refusal_says_what_is_spent_what_is_needed_and_what_to_do():
    found = budget_tracker(spent=50, wall=100, history={"trials": 60.0})
    assert not found.can_start([("a", 1)])
    assert found.refusal == (
        "budget.wall: 50 of 100 s are spent and the next point needs about 60 s more; "
        "run again to go on, or raise budget.wall"
    )


def test_making_images_and_lora_is_reserved_too(tmp_path, resolver):
    requirement = Requirement(resolver.trial({"images_per_class": 0}).features)
    assert isinstance(requirement.spec, FeaturesSpec)
    store = ArtifactStore(tmp_path)
    hour = {"features": 3600.0}
    assert budget_tracker(gpu_hours=1.1, history=hour).affords_preparing([requirement], store, 1)
    assert not budget_tracker(gpu_hours=0.9, history=hour).affords_preparing(
        [requirement], store, 1
    )
    assert not budget_tracker(wall=3000, history=hour).affords_preparing([requirement], store, 1)
    assert budget_tracker(wall=3000, history=hour).affords_preparing([requirement], store, 2)
    store.get_or_build(requirement.spec, lambda folder: {})
    assert budget_tracker(gpu_hours=0.9, history=hour).affords_preparing([requirement], store, 1)
