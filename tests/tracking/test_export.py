"""The export of recorded sweeps to MLflow. No cluster."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.environment import environment
from orchestrator.errors import FAILED, TERMINATED
from orchestrator.planning import Outcome, plan_of, resolver_of
from orchestrator.planning.ledger import LEDGER, ledger_json
from orchestrator.planning.plan import about, plan_sweep
from orchestrator.reporting.results import results_of
from orchestrator.spec import SweepSpec, load_sweep
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, SweepLocation, read_trial
from orchestrator.tracking import Publisher
from orchestrator.tracking import export as export_module
from tests.helpers.features import digit_features, store_with
from tests.helpers.inputs import build_inputs
from tests.helpers.servers import MlflowServer, failing_server

IMAGES = 240  # of the dataset digits: every class is among them
SWEEP = """version: 1
name: small
grid: {{method: [zero_shot, fpl, air_fpl]}}
fixed: {{train.steps: 2, prompt.length: 2, images_per_class: 4, generation.block: 2,
        generator: "folder:{folder}"}}
seeds: [1, 2]
"""
STATES = ("done", "reused", "done", "failed", "done", "done")
MADE = {"user": "ada", "commit": "0123abc"}
TAGS = {  # names of air.* tags, which other tools read
    "sweep": "artifacts best_classifier done failed kind project reused spec_hash sweep user",
    "point": "cell dataset digest interval kind method modality paradigm point runs seed "
    "split_seed sweep user",
    "trial": "artifacts backbone_digest cell code commit dataset dataset_digest device digest "
    "files host kind method modality paradigm point seed seeds slot split_seed state sweep "
    "trial_key user versions",
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, drawn_digits: Path) -> SweepSpec:
    file = tmp_path_factory.mktemp("spec") / "small.yaml"
    file.write_text(SWEEP.format(folder=drawn_digits))
    return load_sweep(file)


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Any, sweep: SweepSpec
) -> SweepLocation:
    """A sweep that ran without a tracker, with outcomes as in STATES."""
    store = ArtifactStore(tmp_path_factory.mktemp("ended") / "runs")
    location = SweepLocation(store, "default", "small", None)
    resolver, event_log = resolver_of(location), location.event_log()
    event_log.lock()
    slots = plan_sweep(sweep, store, resolver, event_log).slots
    arrays = digit_features(tiny_clip.encode_images, IMAGES)
    store_with(store.root, slots[0].spec.features, arrays)
    build_inputs(slots[-1].spec, WorkerContext(store))
    names = {"AIRSWEEP_USER": "ada", "AIRSWEEP_COMMIT": "0123abc"}
    event_log.append("sweep_started", spec="s", total=6, to_run=6, pid=1, **MADE)
    with environment(names):
        for slot, state in zip(slots, STATES, strict=True):
            fields = {"slot": slot.id, "cell": slot.cell.id, "key": slot.key.digest}
            if state == "failed":
                fields |= {"failure_class": "oom", "message": "MemoryError: out of memory"}
            else:
                run_trial(slot.spec, store)
            event_log.append(f"trial_{state}", **fields)
    event_log.append("sweep_ended", exit_code=1, seconds=3.0)
    event_log.unlock()
    location.write(LEDGER, ledger_json(plan_of(sweep, location), {}))
    return location


def copy_of(ended: SweepLocation, folder: Path) -> SweepLocation:
    root = shutil.copytree(ended.store.root, folder / "runs")
    return SweepLocation(ArtifactStore(root), ended.project, ended.name, None)


def export(sweep: SweepSpec, location: SweepLocation, uri: str | None = None) -> int:
    """Export an ended sweep; return how many runs were written."""
    publisher = Publisher(about(sweep), location, uri)
    publisher.export()
    return publisher._tracker.sent if publisher._tracker else 0


def mlflow_client(uri: str) -> Any:
    from orchestrator.tracking._mlflow import MlflowClient

    return MlflowClient(uri)


def all_runs(uri: str, project: str = "default") -> list[Any]:
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(f"air/{project}")
    return list(client.search_runs([experiment.experiment_id], max_results=100))


@pytest.fixture(scope="module")
def tracked(
    ended: SweepLocation, sweep: SweepSpec, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The URI of the store's MLflow database, to which the sweep was exported."""
    assert export(sweep, ended) == 9
    return f"sqlite:///{ended.store.root}/mlflow.db"


def trial_run_of(uri: str, method: str, status: str = "FINISHED") -> Any:
    runs = [run for run in all_runs(uri) if run.data.tags["air.kind"] == "trial"]
    runs = [run for run in runs if run.data.tags["air.method"] == method]
    return min((r for r in runs if r.info.status == status), key=lambda r: r.data.tags["air.seed"])


def sweep_run(uri: str) -> Any:
    return next(run for run in all_runs(uri) if run.data.tags["air.kind"] == "sweep")


def setting_run_of(uri: str, method: str) -> Any:
    runs = [run for run in all_runs(uri) if run.data.tags["air.kind"] == "point"]
    return next(run for run in runs if run.data.tags["air.method"] == method)


def test_setting_runs_have_the_numbers_of_the_table(ended, sweep, tracked):
    plan = plan_of(sweep, ended)
    expected = {row.method: row for row in results_of(plan, ended.store).points()}
    for method, row in expected.items():
        data = setting_run_of(tracked, method).data
        metrics, tags = data.metrics, data.tags
        assert metrics["test/accuracy"] == round(row.mean, 4)
        assert metrics["test/accuracy_low"] == round(row.low, 4)
        assert metrics["test/accuracy_high"] == round(row.high, 4)
        assert metrics.get("test/accuracy_std") == (row.std and round(row.std, 4))
        assert metrics["n"] == row.n
        assert tags["air.interval"] == row.interval
    # One seed of fpl has failed, and zero_shot has one trial for both.
    assert {method: row.n for method, row in expected.items()} == {
        "zero_shot": 1,
        "fpl": 1,
        "air_fpl": 2,
    }
    fpl, air = setting_run_of(tracked, "fpl").data, setting_run_of(tracked, "air_fpl").data
    assert (fpl.tags["air.runs"], air.tags["air.runs"]) == ("1 of 2", "2 of 2")
    settings = {"method": "air_fpl", "images_per_class": "4", "train.steps": "2"}
    assert settings.items() <= air.params.items()
    assert air.params["lora.rank"]  # a setting that the file does not mention
    assert "seed" not in air.params  # a setting has several
    trials = [r for r in all_runs(tracked) if r.data.tags.get("air.method") == "air_fpl"]
    trials = [run for run in trials if run.data.tags["air.kind"] == "trial"]
    assert {run.data.tags["air.point"] for run in trials} == {air.tags["air.point"]}
    right = [run.data.metrics["pseudo/accuracy"] for run in trials]
    assert air.metrics["pseudo/accuracy"] == round(sum(right) / 2, 4)


def test_a_sweep_run_has_a_note_with_the_result_the_closing_screen_and_the_report(ended, tracked):
    parent = sweep_run(tracked)
    note = parent.data.tags["mlflow.note.content"]
    assert "Best classifier: * " in note.splitlines()[0]
    assert "Does air_fpl beat fpl?" in note
    assert "6: 4 done, 1 shared with another trial, 1 failed" in note
    folder = ended.store.root / "mlartifacts" / "air" / "default" / parent.info.run_id
    assert (folder / "artifacts" / "report.html").read_text().startswith("<!doctype html>")


def test_a_sweep_run_has_the_best_classifier_with_its_interval_and_the_gain(ended, sweep, tracked):
    results = results_of(plan_of(sweep, ended), ended.store)
    [best] = results.best_classifiers.values()
    [gain] = [c.difference for c in results.comparisons if c.methods == ("air_fpl", "fpl")]
    parent = sweep_run(tracked)
    assert gain.reason_not_tested  # so it has no interval
    ends = {"best/test/accuracy_low": best.test.low, "best/test/accuracy_high": best.test.high}
    shown = {"best/test/accuracy": best.test.mean, "gain": gain.mean, **ends}
    assert parent.data.metrics == {name: round(value, 4) for name, value in shown.items()}
    settings = {m: setting_run_of(tracked, m).data for m in ("zero_shot", "fpl", "air_fpl")}
    marked = {m: data.tags.get("air.best_classifier") for m, data in settings.items()}
    assert marked == dict.fromkeys(settings) | {best.row.method: f"* {best.classifier}"}
    assert settings[best.row.method].tags["air.classifier"] == best.classifier
    assert settings[best.row.method].metrics["best/test/accuracy"] == round(best.test.mean, 4)


def test_a_trial_run_has_its_settings_and_a_telling_name(tracked, drawn_digits):
    air = trial_run_of(tracked, "air_fpl")
    assert air.info.run_name == "air_fpl seed=1 digits-ul-text"
    assert air.data.params["generator"] == f"folder:{drawn_digits}"
    assert air.data.params["seed"] == "1"


def test_an_untracked_sweep_is_sent_completely_and_once(ended, sweep, tracked):
    uri = tracked
    assert export(sweep, ended) == 0

    runs = all_runs(uri)
    kinds = Counter(run.data.tags["air.kind"] for run in runs)
    assert kinds == {"sweep": 1, "trial": 6, "point": 3}
    parent = next(run for run in runs if run.data.tags["air.kind"] == "sweep")
    assert parent.info.status == "FAILED"
    assert {
        "air.done": "4",
        "air.reused": "1",
        "air.failed": "1",
    }.items() <= parent.data.tags.items()
    failed = trial_run_of(uri, "fpl", "FAILED")
    assert failed.data.tags["air.failure_class"] == "oom"
    assert failed.data.tags["air.message"] == "MemoryError: out of memory"

    shown = {run.data.tags["air.kind"]: run.data.tags for run in runs}
    shown["trial"] = trial_run_of(uri, "fpl").data.tags
    for kind, names in TAGS.items():
        assert {f"air.{name}" for name in names.split()} <= shown[kind].keys()
    assert {run.data.tags["mlflow.parentRunId"] for run in runs if run is not parent} == {
        parent.info.run_id
    }

    # Lineage tags come from the record.
    tags = trial_run_of(uri, "fpl").data.tags
    assert (tags["air.user"], tags["air.commit"]) == ("ada", "0123abc")
    assert (tags["mlflow.user"], tags["mlflow.source.git.commit"]) == ("ada", "0123abc")
    source = (tags["mlflow.source.name"], tags["mlflow.source.type"])
    assert source == (f"airsweep run {sweep.source}", "JOB")
    assert json.loads(tags["air.versions"]).keys() >= {"torch", "numpy", "python"}
    assert json.loads(tags["air.seeds"])["seed"] == 1
    assert len(tags["air.dataset_digest"]) == len(tags["air.backbone_digest"]) == 40
    assert "air.generator_digest" not in tags  # fpl draws no images
    assert len(trial_run_of(uri, "air_fpl").data.tags["air.generator_digest"]) == 40
    sent = ended.store.root / "mlartifacts"
    matrices = [*sent.rglob("confusion_matrix.csv")]
    assert len(matrices) == len([*sent.rglob("spec.json")]) == 5
    header, *rows = csv.reader(matrices[0].read_text().splitlines())
    assert header == ["true class", *(row[0] for row in rows)]


def outcomes(sweep: SweepSpec, location: SweepLocation) -> list[Outcome]:
    """The first three outcomes of the sweep."""
    slots = plan_of(sweep, location).slots[:3]
    return [Outcome(slot, "done", read_trial(slot.spec, location.store)) for slot in slots]


def test_a_run_and_a_later_export_send_the_same_runs(ended, sweep, tracked, tmp_path):
    location = copy_of(ended, tmp_path)
    parent = sweep_run(tracked)
    client = mlflow_client(f"sqlite:///{location.store.root}/mlflow.db")
    client.delete_run(parent.info.run_id)  # in the copy, so that everything is sent again
    driver = Publisher(about(sweep), location, None)
    first = outcomes(sweep, location)[2]
    driver.running(first.slot, {"train/loss": first.record.curves["train/loss"][:1]}, 1.0)
    driver._call(driver._send_queue)
    driver.trial(first, time.time())
    driver._call(driver._send_queue)
    driver.finish(TERMINATED)
    assert export(sweep, location) == 8
    assert export(sweep, location) == 0

    def shown(uri: str) -> dict[str, Any]:
        kept = [run for run in all_runs(uri) if run.data.tags["air.kind"] != "sweep"]
        return {
            run.info.run_name: (
                *(run.info.status, run.info.end_time, run.data.metrics, run.data.params),
                {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"},
            )
            for run in kept
            if run.data.tags["mlflow.parentRunId"] != parent.info.run_id or uri == tracked
        }

    assert shown(f"sqlite:///{location.store.root}/mlflow.db") == shown(tracked)


def test_removed_records_get_no_run(ended, sweep, tracked, tmp_path):
    location = copy_of(ended, tmp_path)
    slot = plan_of(sweep, location).slots[2]
    shutil.rmtree(location.store.path(slot.key))
    project = replace(location, project="other")  # has no runs yet
    shutil.copytree(location.folder, project.folder)
    export(sweep, project)
    runs = all_runs(f"sqlite:///{location.store.root}/mlflow.db", "other")
    assert slot.id not in {run.data.tags.get("air.slot") for run in runs}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    server = MlflowServer(folder / "served", folder / "log")
    server.start()
    yield server
    server.stop()


def test_an_outage_gives_one_warning_and_the_rest_is_sent_afterwards(
    ended, sweep, server, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    location, trouble = copy_of(ended, tmp_path), []
    done = outcomes(sweep, location)
    with failing_server(server.url, trouble) as url:
        driver = Publisher(about(sweep), location, url)
        driver.check(reach=True)
        monkeypatch.setenv("AIRSWEEP_COMMIT", "0123abc")  # as the driver after its checks
        assert driver.tags["mlflow.source.git.commit"] == "0123abc"
        driver.trial(done[0], time.time())
        driver._call(driver._send_queue)
        trouble.append("away")
        driver.check(reach=False)  # as for `airsweep run --prepare`
        for outcome in done[1:]:
            driver.trial(outcome, time.time())
        driver._call(driver._send_queue)
        driver.finish(FAILED)
    outage, incomplete = (record.getMessage() for record in caplog.records)
    assert "does not answer" in outage
    assert "sends the rest" in incomplete
    assert export(sweep, location, server.url) == 8
    assert export(sweep, location, server.url) == 0
    slots = Counter(run.data.tags.get("air.slot") for run in all_runs(server.url))
    assert {slots[slot] for slot in slots if slot} == {1}


def test_training_does_not_wait_for_a_server_that_never_replies(
    ended, sweep, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    location = copy_of(ended, tmp_path)
    done = outcomes(sweep, location)
    monkeypatch.setattr(export_module, "INTERVAL", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts requests and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        driver = Publisher(about(sweep), location, url)
        driver.start()
        for outcome in done:
            driver.trial(outcome, time.time())
        assert not caplog.records  # all three outcomes are queued during the first call
    driver.finish(TERMINATED)  # the server is gone, so the call fails
    assert len(caplog.records) == 2
    assert "sends the rest" in caplog.records[-1].getMessage()
