"""`airsweep usage`, owners on records, and projects with sweeps of the same name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from air_core.seal import sealed_json
from air_core.specs import SyntheticFeaturesSpec, TrialSpec
from orchestrator.keys import artifact_key
from orchestrator.store import ArtifactStore, SweepLocation, open_store
from orchestrator.store.artifacts import DEVICES
from orchestrator.store.inventory import take_inventory
from tests.helpers.sweeps import airsweep, events, write_sweep

HOUR = 3600.0
TWO_CELLS = "grid: {method: [zero_shot, cpl]}\nseeds: [1, 2]\n"


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "runs")


@pytest.fixture
def usage(store, command):
    """Run `airsweep usage` in this process; returns exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        options = () if "--store" in words else ("--store", store.root)
        return command("usage", *words, *options)

    return run


def rows(usage, by: str, *more: str) -> dict[str, dict]:
    """The rows of the JSON output by their name, without zeros."""
    code, out, err = usage("--by", by, "--json", *more)
    assert code == 0, err
    each = json.loads(out)["rows"]
    return {row.pop(by): {name: value for name, value in row.items() if value} for row in each}


def store_artifact(store: ArtifactStore, spec, hours: float, content: bytes = b"x") -> Path:
    """Store an artifact whose build took `hours` hours."""
    with store.building(spec) as building:
        (building.folder / "content").write_bytes(content)
        building.earlier_seconds = hours * HOUR
        building.info = {"device": "cuda"} if isinstance(spec, TrialSpec) else {}
    return store.get(spec).path


def with_record(folder: Path, **changes: object) -> None:
    """Rewrite a record as an earlier version wrote it; None removes a key."""
    record = json.loads((folder / "record.json").read_text()) | changes
    kept = {name: value for name, value in record.items() if value is not None and name != "seal"}
    (folder / "record.json").write_bytes(sealed_json(kept))


def of_user(monkeypatch, user: str, **devices: float) -> None:
    monkeypatch.setenv("AIRSWEEP_USER", user)
    monkeypatch.setenv(DEVICES, json.dumps(devices))


# ---------------------------------------------------------------- hours and bytes


def test_device_hours_count_for_the_user_who_built_the_artifact(store, usage, trial, monkeypatch):
    one = trial("cpl")
    of_user(monkeypatch, "mina", cpu=4, gpu=0.25)
    store_artifact(store, one.features, 2)
    store_artifact(store, one, 1)
    of_user(monkeypatch, "tom", cpu=2, gpu=0)
    store_artifact(store, replace(one, seed=7), 3, b"x" * 5000)
    found = rows(usage, "user")
    assert found["mina"]["gpu_hours"] == pytest.approx(0.75, abs=0.1)
    assert "cpu_hours" not in found["mina"]
    assert found["tom"]["cpu_hours"] == pytest.approx(6, abs=0.1)
    assert [found[user]["made"] for user in ("mina", "tom")] == [2, 1]
    inside = sum(f.stat().st_size for f in store.artifacts.rglob("*") if f.is_file())
    assert sum(row["bytes"] for row in found.values()) == inside
    stages = rows(usage, "stage")
    assert stages["features"]["gpu_hours"] == pytest.approx(0.5, abs=0.1)
    assert stages["trials"]["cpu_hours"] == pytest.approx(6, abs=0.1)


def test_reuse_of_an_artifact_does_not_count(store, usage, trial, monkeypatch):
    of_user(monkeypatch, "mina", cpu=1)
    store_artifact(store, trial("cpl"), 1)
    before = rows(usage, "user")
    of_user(monkeypatch, "tom", cpu=1)
    store.get_or_build(trial("cpl"), lambda folder: pytest.fail("the store has it"))
    assert rows(usage, "user") == before


def test_records_without_owner_or_devices_have_a_separate_row(store, usage, trial, monkeypatch):
    of_user(monkeypatch, "mina", cpu=1, gpu=0.5)
    one = trial("cpl")
    with_record(store_artifact(store, one.features, 2), user=None, cpu=None, gpu=None)
    with_record(store_artifact(store, one, 3), user="unknown", cpu=None, gpu=None)
    found = rows(usage, "user")
    assert set(found) == {"(not recorded)"}
    # The record of a trial states its device, which counts in full.
    assert found["(not recorded)"]["gpu_hours"] == pytest.approx(3, abs=0.1)
    assert found["(not recorded)"]["unknown_hours"] == pytest.approx(2, abs=0.1)
    out = usage()[1]
    assert "unknown: hours of work whose record does not state the device" in out
    assert max(map(len, out.splitlines())) <= 80


def blocks(store: ArtifactStore, spec: SyntheticFeaturesSpec, name: str, user: str, *numbers: int):
    """Log blocks of one class that a sweep has drawn, each on half a GPU for an hour."""
    location = SweepLocation(store, "team", name, None)
    location.event_log().lock()
    location.event_log().append("sweep_started", total=1, user=user)
    for number in numbers:
        for one in (spec.images, spec):
            store.open_row(one).publish(0, number, b"x" * 1000)
        facts = {"class": 0, "block": number, "drawn": 8, "holes": 0, "cpu": 1.0, "gpu": 0.5}
        key = str(artifact_key(spec.images))
        location.event_log().append(
            "artifact_prepared", stage="images", key=key, seconds=HOUR, facts=facts
        )
    return location


def test_a_block_of_errors_that_needed_earlier_draws_counts_once(store, usage, trial):
    spec = trial("cpl_evidence").evidence_errors
    location = SweepLocation(store, "team", "one", None)
    log, key = location.event_log(), str(artifact_key(spec))
    log.lock()
    log.append("sweep_started", total=1, user="mina")
    for draw, pairs in ((2, 30), (3, 10)):
        facts = {"class": draw, "block": 0, "pairs": pairs, "cpu": 2.0, "gpu": 0.5}
        log.append("artifact_prepared", stage="evidence", key=key, seconds=HOUR, facts=facts)
    for draw in range(4):
        store.open_row(spec).publish(draw, 0, b"x" * 1000)
    assert rows(usage, "user")["mina"]["gpu_hours"] == 1
    assert rows(usage, "stage")["evidence"]["made"] == 2
    assert not json.loads(usage("--json")[1])["total"]["untimed"]


def test_each_block_of_a_row_counts_for_the_user_who_drew_it(store, usage, trial, monkeypatch):
    of_user(monkeypatch, "mina")
    spec = trial("air", images_per_class=16).synthetic_features
    blocks(store, spec, "first", "mina", 0)
    more = blocks(store, spec, "second", "tom", 1, 2)
    # The event of a block that another sweep drew.
    facts = {"class": 0, "block": 0, "drawn": 0, "holes": 0}
    key = str(artifact_key(spec.images))
    more.event_log().append("artifact_prepared", stage="images", key=key, seconds=HOUR, facts=facts)
    found = rows(usage, "user")
    assert (found["mina"]["gpu_hours"], found["tom"]["gpu_hours"]) == (0.5, 1.0)
    assert (found["mina"]["made"], found["tom"]["made"]) == (1, 2)
    assert "bytes" not in found["tom"]  # they count for the user who started the row
    assert rows(usage, "sweep")["team/second"]["gpu_hours"] == 1.0
    assert rows(usage, "project")["team"]["gpu_hours"] == 1.5
    # Without the sweep its events are missing; the row still names the user who started it.
    (store.root / "sweeps/team/second").rename(store.root / "gone")
    found = rows(usage, "user")
    assert found == {
        "mina": {"made": 3, "gpu_hours": 0.5, "untimed": 2, "bytes": found["mina"]["bytes"]}
    }
    assert "2 of these have no recorded time" in usage()[1]


def test_since_counts_only_later_artifacts(store, usage, trial, monkeypatch):
    of_user(monkeypatch, "mina", cpu=1)
    with_record(store_artifact(store, trial("cpl"), 1), started=1_700_000_000.0)  # November 2023
    store_artifact(store, trial("cpl", seed=7), 1)
    assert rows(usage, "user")["mina"]["made"] == 2
    assert rows(usage, "user", "--since", "2024-01-01")["mina"]["made"] == 1
    assert rows(usage, "user", "--since", "2023-11-14T00:00")["mina"]["made"] == 2
    assert rows(usage, "user", "--since", "2199-01-01") == {}
    for words, message in (
        (("--since", "may"), "is not a date"),
        (("--by", "team"), "allowed: user"),
    ):
        code, out, err = usage(*words)
        assert (code, out) == (2, "")
        assert message in err


# ---------------------------------------------------------------- real sweeps, two users


def trivial(spec: Path, store: Path | str, user: str, project: str, **more: str) -> None:
    variables = {"AIRSWEEP_USER": user, "AIRSWEEP_PROJECT": project, **more}
    airsweep("run", spec, "--store", store, module="tests.helpers.trivial", **variables)


def test_equal_names_in_two_projects_share_artifacts_but_not_events_or_experiments(
    store, usage, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    spec = write_sweep(tmp_path, "same", TWO_CELLS)
    monkeypatch.chdir(tmp_path)
    for user, project in (("mina", "birds"), ("tom", "cars")):
        trivial(spec, store.root, user, project)
    built = (store.root / "built.log").read_text().splitlines()
    assert len(built) == len(set(built)) == 4  # features and three trials, each once
    logs = {
        project: [
            json.loads(line)
            for line in (store.root / "sweeps" / project / "same/events.jsonl").open()
        ]
        for project in ("birds", "cars")
    }
    assert {e["user"] for e in logs["birds"] if "user" in e} == {"mina"}
    assert {e["user"] for e in logs["cars"] if "user" in e} == {"tom"}
    assert sum(e["event"] == "trial_done" for e in logs["birds"]) == 3
    assert sum(e["event"] == "trial_reused" for e in logs["cars"]) == 4
    client = MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    for project, user in (("birds", "mina"), ("cars", "tom")):
        experiment = client.get_experiment_by_name(f"air/{project}")
        runs = client.search_runs([experiment.experiment_id])
        tags = {(run.data.tags["air.kind"], run.data.tags["air.user"]) for run in runs}
        # Both projects show the trials with the user who computed them.
        assert tags == {("sweep", user), ("trial", "mina"), ("point", "mina")}
    assert set(rows(usage, "user")) == {"mina"}
    assert set(rows(usage, "project")) == {"birds"}
    assert set(rows(usage, "sweep")) == {"birds/same"}


@pytest.mark.integration
@pytest.mark.ray
def test_a_real_run_records_the_devices_of_each_worker(
    tmp_path, drawn_digits, ray_session, monkeypatch
):
    text = "grid: {{method: [fpl, air_fpl]}}\nfixed: {{generator: 'folder:{folder}', "
    text += "images_per_class: {count}, generation.block: 8, train.steps: 2}}\nseeds: [1]\n"
    runs = tmp_path / "runs"
    for user, name, count in (("mina", "few", 8), ("tom", "more", 16)):
        spec = write_sweep(tmp_path, name, text.format(folder=drawn_digits, count=count))
        monkeypatch.setenv("AIRSWEEP_USER", user)
        airsweep("run", spec, "--store", runs, "--quiet")
    for holding in take_inventory(open_store(runs)).holdings:
        if holding.stage not in ("images", "synthetic"):
            assert (holding.record["cpu"], holding.record["gpu"]) == (1.0, 0.0), holding.name
    drawn = [
        event["facts"]
        for name in ("few", "more")
        for event in events(runs, name)
        if event["event"] == "artifact_prepared" and event["stage"] == "images"
    ]
    assert len({(facts["class"], facts["block"]) for facts in drawn}) == 20
    found = json.loads(airsweep("usage", "--by", "user", "--json", "--store", runs).stdout)
    each = {row["user"]: row for row in found["rows"]}
    assert set(each) == {"mina", "tom"}
    assert found["total"]["gpu_hours"] == found["total"]["unknown_hours"] == 0
    assert found["total"]["untimed"] == 0
    # Ten blocks each; mina also built the features and two trials, tom one trial.
    assert (each["mina"]["made"], each["tom"]["made"]) == (13, 11)
