"""The budget of a run: which jobs may start, and the message when a job may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from air_core.specs import FeaturesSpec
from orchestrator.planning import Requirement, budget
from orchestrator.planning.budget import BudgetTracker
from orchestrator.spec import Resources
from orchestrator.spec.sweep import Budget, GeneratorResources, TrialResources
from orchestrator.store import ArtifactStore

NOW = 1e6


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: NOW))


GPU = Resources(trial=TrialResources(gpu=0.5), generator=GeneratorResources(gpu=1))


def budget_tracker(
    spent: float = 0.0, history: dict[str, float] | None = None, **limits: Any
) -> BudgetTracker:
    """The budget tracker of a run that started `spent` seconds ago."""
    return BudgetTracker(Budget(**limits), GPU, history or {}, started=NOW - spent)


def test_without_a_budget_every_job_starts():
    assert budget_tracker(spent=1e9).can_start([("a", 1000)])


@pytest.mark.parametrize(("trials", "fits"), [(1, True), (3, True), (5, False)])
def test_a_point_starts_only_if_all_its_trials_fit_into_the_wall_time(trials, fits):
    tracker = budget_tracker(spent=50, wall=100, history={"trials": 12.0})
    assert tracker.can_start([("a", trials)]) == fits


def test_parallel_jobs_share_gpu_hours_but_not_wall_time():
    under_way = [("a", 3), ("a", 3)]
    assert budget_tracker(spent=50, wall=100, history={"trials": 12.0}).can_start(under_way)
    share = 12.0 * 0.5 / 3600  # GPU-hours of a trial
    assert budget_tracker(gpu_hours=6.1 * share, history={"trials": 12.0}).can_start(under_way)
    assert not budget_tracker(gpu_hours=5.9 * share, history={"trials": 12.0}).can_start(under_way)


def test_ended_trials_are_spent_and_predict_the_next_trial():
    tracker = budget_tracker(gpu_hours=100 * 0.5 / 3600, history={"trials": 1.0})
    tracker.record_trial("slow", 40.0)
    assert tracker.can_start([("slow", 1)])
    assert not tracker.can_start([("slow", 2)])
    tracker.record_trial("quick", 2.0)
    assert tracker.can_start([("quick", 2)])
    assert tracker.expected_seconds("unknown") == 21.0  # the mean of this run
    assert "gpu_hours" in tracker.refusal


def test_without_measurements_only_spent_time_counts():
    assert budget_tracker(spent=99, wall=100).can_start([("a", 9)])
    assert not budget_tracker(spent=101, wall=100).can_start([("a", 1)])


def test_a_refusal_states_spent_and_needed_time_and_a_remedy():
    tracker = budget_tracker(spent=50, wall=100, history={"trials": 60.0})
    assert not tracker.can_start([("a", 1)])
    assert tracker.refusal == (
        "budget.wall: 50 of 100 s are spent, and the next point needs about 60 s; "
        "run the sweep again to resume, or raise budget.wall"
    )


def test_preparation_needs_budget_too(tmp_path, resolver):
    requirement = Requirement(resolver.trial({"precision": "fp32", "images_per_class": 0}).features)
    assert isinstance(requirement.spec, FeaturesSpec)
    store = ArtifactStore(tmp_path)
    hour = {"features": 3600.0}
    assert budget_tracker(gpu_hours=1.1, history=hour).can_prepare([requirement], store, 1)
    assert not budget_tracker(gpu_hours=0.9, history=hour).can_prepare([requirement], store, 1)
    assert not budget_tracker(wall=3000, history=hour).can_prepare([requirement], store, 1)
    assert budget_tracker(wall=3000, history=hour).can_prepare([requirement], store, 2)
    store.get_or_build(requirement.spec, lambda folder: {})
    assert budget_tracker(gpu_hours=0.9, history=hour).can_prepare([requirement], store, 1)
