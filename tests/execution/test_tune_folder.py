"""The Tune folder has all trials of a sweep, over its runs, for `ray.tune.ExperimentAnalysis`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from ray.tune import ExperimentAnalysis, Tuner

from orchestrator.execution._tune_folder import write_tune_folder
from orchestrator.planning.requests import location_named
from orchestrator.spec.sweep_file import load_sweep
from tests.helpers.sweeps import airsweep, write_sweep

# Four points and two seeds.
SWEEP = """
fixed: {method: cpl, train.steps: 1, iterations: 3}
search:
  sampler: random
  points: 4
  width: 4
  space: {train.learning_rate: {min: 0.001, max: 0.1, log: true}}
seeds: [1, 2]
"""


def trials(spec: Path, store: Path) -> pd.DataFrame:
    """The trials of the sweep by id, as a user of Ray Tune reads them."""
    location = location_named(spec.stem, store)
    write_tune_folder(load_sweep(spec), location)
    folder = str(location.folder / "tune")
    assert not Tuner.can_restore(folder)
    return ExperimentAnalysis(folder).dataframe().set_index("trial_id")


def test_the_tune_folder_has_settings_seeds_objectives_and_test_metrics_of_all_runs(tmp_path):
    spec, store = write_sweep(tmp_path, "rates", SWEEP), tmp_path / "runs"

    def run(**environment: str) -> pd.DataFrame:
        words = ("run", spec, "--store", store, "--tracking-uri", "none")
        airsweep(*words, module="tests.helpers.trivial", check=False, **environment)
        return trials(spec, store)

    killed = run(AIRSWEEP_CRASH_AT="trial_done:1")
    assert {*killed["state"]} == {"done"}
    failed = run(AIRSWEEP_SAID="out of luck")
    assert {*failed.loc[failed["state"] == "failed", "message"]} == {"out of luck"}

    found = run()
    assert {*killed.index} < {*failed.index} <= {*found.index}
    assert len(found) == 4 * 2
    assert {*found["state"]} <= {"done", "reused", "shared", "recovered"}
    assert found["objective/mutual_information"].notna().all()
    assert found["test/accuracy"].notna().all()
    settings = found.groupby("point")["config/train.learning_rate"].nunique()
    assert settings.to_dict() == dict.fromkeys(range(4), 1)
    assert {*found["seed"]} == {1, 2}
