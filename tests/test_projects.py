"""Users and projects: records name who computed what, and on which devices."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.store import open_store
from orchestrator.store.gc import contents
from tests.helpers.sweeps import airsweep, write_sweep

TWO_CELLS = "grid: {method: [zero_shot, cpl]}\nseeds: [1, 2]\n"


def trivial(spec: Path, store: Path | str, user: str, project: str, **more: str) -> None:
    variables = {"AIRSWEEP_USER": user, "AIRSWEEP_PROJECT": project, **more}
    run = airsweep("run", spec, "--store", store, trivial=True, **variables)
    assert "lacks part of this sweep" not in run.stderr


def test_equal_names_in_two_projects_share_artifacts_but_not_events_or_experiments(
    tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    spec, store = write_sweep(tmp_path, "same", TWO_CELLS), tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    for user, project in (("mina", "birds"), ("tom", "cars")):
        trivial(spec, store, user, project)
    built = (store / "built.log").read_text().splitlines()
    assert len(built) == len(set(built)) == 4  # features and three trials, each once
    logs = {
        project: [
            json.loads(line) for line in (store / "sweeps" / project / "same/events.jsonl").open()
        ]
        for project in ("birds", "cars")
    }
    assert {e["user"] for e in logs["birds"] if "user" in e} == {"mina"}
    assert {e["user"] for e in logs["cars"] if "user" in e} == {"tom"}
    assert sum(e["event"] == "trial_done" for e in logs["birds"]) == 3
    assert sum(e["event"] == "trial_reused" for e in logs["cars"]) == 4
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    for project, user in (("birds", "mina"), ("cars", "tom")):
        experiment = client.get_experiment_by_name(f"air/{project}")
        runs = client.search_runs([experiment.experiment_id])
        tags = {(run.data.tags["air.kind"], run.data.tags["air.user"]) for run in runs}
        # Both projects show the trials with the user who computed them.
        assert tags == {("sweep", user), ("trial", "mina"), ("point", "mina")}
    assert {item.user for item in contents(open_store(store)).artifacts} == {"mina"}
