"""What Ray Tune asks of the driver."""

from __future__ import annotations

from types import SimpleNamespace

from orchestrator.execution._tuning import _JobSearcher


def test_preparation_goes_on_while_the_first_trial_waits_for_a_pool():
    """Until a trial runs, Tune calls nothing but `suggest`, once a second."""
    ticks: list[str] = []
    scheduler = SimpleNamespace(peek=lambda: "a job", running={})
    searcher = _JobSearcher(scheduler, lambda: 0, lambda: ticks.append("tick"))
    assert searcher.suggest("first") is None
    assert ticks == ["tick"]
    scheduler.running[1] = "a job"  # from now on Tune calls `_JobCallback`
    searcher.max_jobs = lambda: 1
    assert searcher.suggest("second") is None
    assert ticks == ["tick"]
