"""A tracker that was off, away or half told ends with what ledger and store say. No cluster."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from air_core.datasets import get_dataset
from orchestrator.driver import Place, parent_of
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_sweep
from orchestrator.publish import Publisher
from orchestrator.reconcile import reconcile
from orchestrator.stages import PARTS
from orchestrator.store import ArtifactStore
from orchestrator.sweep import SweepSpec
from orchestrator.sweep_file import load_sweep
from orchestrator.tracking import Told, TrackerAway, make_tracker
from orchestrator.tracking.jsonl import read
from orchestrator.trial import run_trial

IMAGES = 240  # of the digits: enough for every class, and quick
SWEEP = """version: 1
name: small
grid: {method: [zero_shot, fpl]}
fixed: {train.steps: 2, prompt.length: 2}
seeds: [1, 2]
"""
MADE = {"user": "ada", "commit": "0123abc", "dirty": "feed"}


@pytest.fixture(autouse=True)
def _no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepSpec:
    file = tmp_path_factory.mktemp("spec") / "small.yaml"
    file.write_text(SWEEP)
    return load_sweep(file)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Any, sweep: SweepSpec) -> Place:
    """A sweep that ran without a tracker: zero_shot done and reused, fpl done and failed."""
    store = ArtifactStore(tmp_path_factory.mktemp("ended") / "runs")
    place = Place(store, "default", "small", None)
    resolver, ledger = place.resolver(), place.ledger()
    ledger.lock()
    slots = plan_sweep(sweep, store, resolver, ledger).slots

    def build(folder: Path) -> dict[str, Any]:
        examples = get_dataset("digits").load(None)
        arrays = {
            "features": tiny_clip.encode_images(examples.images[:IMAGES]).numpy(),
            "labels": examples.labels[:IMAGES],
            "parts": np.array([PARTS.index(p) for p in examples.parts[:IMAGES]], dtype=np.int8),
        }
        save_file(arrays, folder / "features.safetensors")
        return {}

    store.get_or_build(slots[0].spec.features, build)
    names = {"AIRSWEEP_USER": "ada", "AIRSWEEP_COMMIT": "0123abc", "AIRSWEEP_DIRTY": "feed"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    ledger.append("sweep_started", spec="s", total=4, to_run=4, pid=1, **MADE)
    for slot, state in zip(slots, ("done", "reused", "done", "failed"), strict=True):
        fields = {"slot": slot.id, "cell": slot.cell.id, "key": slot.key.digest}
        if state == "failed":
            fields |= {"failure_class": "oom", "message": "MemoryError: no room"}
        else:
            run_trial(slot.spec, store)
        ledger.append(f"trial_{state}", **fields)
    ledger.append("sweep_ended", exit_code=1, seconds=3.0)
    ledger.unlock()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    (place.folder / "spec.yaml").write_text(SWEEP)
    (place.folder / "uncommitted-feed.diff").write_text("+ a line\n")
    return place


def copy_of(ended: Place, folder: Path) -> Place:
    root = shutil.copytree(ended.store.root, folder / "runs")
    return Place(ArtifactStore(root), ended.project, ended.name, None)


def all_runs(uri: str) -> list[Any]:
    from orchestrator.tracking.mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("air/default")
    return list(client.search_runs([experiment.experiment_id], max_results=100))


def test_a_sweep_that_ran_without_a_tracker_is_told_whole_and_once(ended, sweep, tmp_path):
    place = copy_of(ended, tmp_path)
    uri = f"sqlite:///{tmp_path}/tracked/mlflow.db"
    first = reconcile(sweep, place, uri)
    assert (first.told, first.gone) == (Told(told=4, sweep="told"), 0)
    again = reconcile(sweep, place, uri)
    assert again.told == Told(there=4)
    assert "nothing to tell (4 outcomes are there)" in again.line()

    runs = all_runs(uri)
    assert len(runs) == 5
    parent = next(run for run in runs if run.data.tags["air.kind"] == "sweep")
    assert parent.info.status == "FAILED"
    assert {
        "air.done": "2",
        "air.reused": "1",
        "air.failed": "1",
    }.items() <= parent.data.tags.items()
    assert "| zero_shot" in parent.data.tags["mlflow.note.content"]
    states = {run.data.tags["air.slot"]: run for run in runs if run is not parent}
    failed = next(run for slot, run in states.items() if run.info.status == "FAILED")
    assert failed.data.tags["air.failure_class"] == "oom"
    assert failed.data.tags["air.message"] == "MemoryError: no room"

    # What a child says of its making is what the record says, and it can be computed from that.
    done = next(
        run
        for run in states.values()
        if run.data.tags["air.method"] == "fpl" and run.info.status == "FINISHED"
    )
    tags = done.data.tags
    assert (tags["air.user"], tags["air.commit"], tags["air.dirty"]) == ("ada", "0123abc", "feed")
    assert tags["mlflow.source.git.commit"] == "0123abc"
    assert json.loads(tags["air.versions"]).keys() >= {"torch", "numpy", "python"}
    assert json.loads(tags["air.seeds"])["seed"] == 1
    assert len(tags["air.dataset_digest"]) == len(tags["air.backbone_digest"]) == 40
    assert "air.generator_digest" not in tags  # fpl draws no images
    files = sorted(path.name for path in (tmp_path / "tracked" / "mlartifacts").rglob("*.*"))
    assert files.count("uncommitted-feed.diff") == 1
    assert files.count("spec.json") == 4
    assert files.count("confusion_matrix.png") == 3


def test_what_a_driver_told_and_what_is_told_later_is_the_same(ended, sweep, tmp_path):
    place = copy_of(ended, tmp_path)
    uri = f"jsonl:{tmp_path}/tracked.jsonl"
    reconcile(sweep, place, uri)
    lines = (tmp_path / "tracked.jsonl").read_text()
    assert reconcile(sweep, place, uri).told.nothing
    assert (tmp_path / "tracked.jsonl").read_text() == lines

    # Half of it: a driver was killed when it had told of one trial and begun with the sweep.
    half = [line for line in lines.splitlines(keepends=True) if '"kind": "trial"' in line][:1]
    (tmp_path / "tracked.jsonl").write_text(half[0])
    assert reconcile(sweep, place, uri).told == Told(told=3, there=1, sweep="told")
    told = read(tmp_path / "tracked.jsonl")["default/small"]
    assert (len(told.trials), told.sweep["status"]) == (4, "FAILED")


def test_records_that_are_gone_are_counted_and_leave_no_child(ended, sweep, tmp_path):
    place = copy_of(ended, tmp_path)
    slot = plan_sweep(sweep, place.store, place.resolver(), place.ledger()).slots[2]
    shutil.rmtree(place.store.path(slot.key))
    found = reconcile(sweep, place, f"jsonl:{tmp_path}/tracked.jsonl")
    assert (found.told.told, found.gone) == (3, 1)
    assert slot.id not in read(tmp_path / "tracked.jsonl")["default/small"].trials


def test_nobody_is_told_while_a_driver_runs_or_where_tracking_is_off(ended, sweep, tmp_path):
    from orchestrator.ledger import SweepBusy

    place = copy_of(ended, tmp_path)
    with pytest.raises(ValueError, match="--tracking-uri"):
        reconcile(sweep, place, "none")
    driver = Ledger(place.folder)
    driver.lock()
    with pytest.raises(SweepBusy):
        reconcile(sweep, place, f"jsonl:{tmp_path}/tracked.jsonl")
    driver.unlock()


def test_a_dead_server_is_refused_before_any_work_and_a_folder_is_bad_input(ended, sweep, tmp_path):
    from tests.orchestrator.test_tracking import free_port

    place = copy_of(ended, tmp_path)
    parent = parent_of(sweep, place, MADE)
    dead = f"http://me:secret@127.0.0.1:{free_port()}"
    with pytest.raises(TrackerAway, match="airsweep mlflow reconcile small") as caught:
        Publisher(sweep, parent, place.store, dead).check(reach=True)
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackerAway):
        reconcile(sweep, place, dead)
    Publisher(sweep, parent, place.store, dead).check(reach=False)  # it only prepares
    with pytest.raises(ValueError, match="known: "):
        Publisher(sweep, parent, place.store, "mlruns").check(reach=False)


def test_a_server_that_wants_a_password_is_bad_input(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Locked)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME"):
        make_tracker(url, store=tmp_path, project="p").check()
    server.shutdown()
    server.server_close()


def test_a_tracker_that_fails_costs_a_line_and_never_the_sweep(
    ended, sweep, tmp_path, caplog, monkeypatch
):
    from orchestrator.dispatch import Outcome
    from orchestrator.trial import read_trial

    place = copy_of(ended, tmp_path)
    slots = plan_sweep(sweep, place.store, place.resolver(), place.ledger()).slots
    (tmp_path / "file").write_text("")
    publisher = Publisher(
        sweep, parent_of(sweep, place, MADE), place.store, f"jsonl:{tmp_path}/file/no.jsonl"
    )
    for slot in slots[:3]:
        publisher.trial(Outcome(slot, "done", read_trial(slot.spec, place.store)), None)
    publisher.finish("FINISHED", lambda: "", {})
    last = caplog.records[-1].getMessage()
    assert "lacks 3 outcomes and the end of the sweep" in last
    assert f"airsweep mlflow reconcile small --store {place.store.root}" in last
    assert len(caplog.records) == 2
