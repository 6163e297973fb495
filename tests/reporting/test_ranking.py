"""Rank correlation of an objective with test accuracy, checked against scipy and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from orchestrator.reporting.rows import ranking


def noisy(points: int, noise: float, seed: int = 0):
    """Objectives, and accuracies that follow them up to noise."""
    rng = np.random.default_rng(seed)
    objectives = rng.standard_normal(points)
    return objectives, objectives + noise * rng.standard_normal(points)


def test_one_cell_has_spearmans_correlation_ties_included():
    objectives, accuracies = noisy(30, 1.0)
    rounded = np.round(accuracies)
    found, turned = ranking(objectives, rounded), ranking(objectives, -rounded)
    assert found.rho == pytest.approx(spearmanr(objectives, rounded).statistic)
    assert found.low < found.rho < found.high
    assert (found.points, found.predicts_accuracy) == (30, True)
    assert turned.high < 0
    assert not turned.predicts_accuracy
    assert ranking(np.ones(30), accuracies).rho is None  # of equal points


@pytest.mark.parametrize("points", [5, 12])
def test_a_random_objective_is_seldom_trusted(points):
    """A 95 % interval is above 0 in 2.5 % of all cases; this one in slightly more."""
    rankings = [
        ranking(noisy(points, 1.0, s)[0], noisy(points, 1.0, s + 5000)[0], samples=400)
        for s in range(300)
    ]
    assert np.mean([found.predicts_accuracy for found in rankings]) < 0.08
    assert np.mean([found.low > 0 or found.high < 0 for found in rankings]) < 0.13
