"""Trackers: what people see of a sweep, whatever happened to the driver or to the server.

One contract for all of them, then what only MLflow can get wrong. The server is a real one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.children import FilesOnDemand
from orchestrator.tracking import (
    MAX_ARTIFACT,
    Numbers,
    PointRun,
    SweepRun,
    Tracker,
    TrialRun,
    image,
    link,
    make_tracker,
)
from tests.servers import MlflowServer, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def a_sweep(name: str = "quickstart", **changes: Any) -> SweepRun:
    values: dict[str, Any] = {
        "sweep": name,
        "project": "default",
        "spec_hash": "5f3a9c",
        "note": "How many images are enough?",
        "user": "ada",
        "commit": "0123abc",
        "source": "airsweep",
        "params": {"points": "12"},
    }
    return SweepRun(**values | changes)


def a_trial(cell: str = "digits-ul-text-air", seed: int = 1, **changes: Any) -> TrialRun:
    values: dict[str, Any] = {
        "slot": f"{cell}/0/seed={seed}",
        "name": f"{cell}-s{seed}-0a1b2c3d",
        "state": "done",
        "tags": {"air.trial_key": f"trials/v1/{cell}{seed}", "air.dataset": "digits"},
        "params": {"images_per_class": "25"},
        "metrics": {"time/train_s": 4.5, "test/accuracy": 0.75},
        "curves": {"test/accuracy": [0.5, 0.7, 0.75], "train/loss": [1.5, 1.0, 0.5]},
        "started": 1_700_000_000_000 + seed,
        "ended": 1_700_000_009_000 + seed,
    }
    return TrialRun(**values | changes)


def a_failed_trial(**changes: Any) -> TrialRun:
    values: dict[str, Any] = {
        "state": "failed",
        "failure_class": "nan",
        "metrics": {},
        "curves": {},
        "started": 1_600_000_000_000,
        "ended": 1_600_000_001_000,
    }
    return a_trial(**values | changes)


def a_point(
    seeds: tuple[int, ...] = (1, 2), asked: list[int] | None = None, **changes: Any
) -> PointRun:
    """A setting over seeds; `asked` counts how often its numbers were computed."""

    def numbers() -> Numbers:
        if asked is not None:
            asked.append(len(seeds))
        mean = 0.75 + len(seeds) / 100
        spread = {"test/accuracy_std": 0.02} if len(seeds) > 1 else {}
        bounds = {"test/accuracy_low": 0.7, "test/accuracy_high": 0.8, "n": float(len(seeds))}
        return Numbers(
            metrics={"test/accuracy": mean, **bounds, **spread},
            curves={"test/accuracy": [0.5, 0.7, mean]},
            interval="95 % bootstrap over images and seeds",
        )

    links = ", ".join(link(f"seed {seed}", "trial", a_trial(seed=seed).slot) for seed in seeds)
    values: dict[str, Any] = {
        "point": "digits-ul-text-air/0",
        "name": "digits-ul-text-air",
        "content": f"of {seeds}",
        "tags": {"air.dataset": "digits", "air.method": "air", "air.runs": f"{len(seeds)} of 3"},
        "params": {"images_per_class": "25"},
        "note": f"The seeds: {links}.",
        "numbers": numbers,
        "started": 1_700_000_000_001,
        "ended": 1_700_000_009_000 + max(seeds),
    }
    return PointRun(**values | changes)


# What a tracker shows, in one form for all of them.


@dataclass
class SeenTrial:
    """Or a setting."""

    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]  # (step, value), the whole history
    id: str
    note: str


@dataclass
class Seen:
    id: str
    status: str
    note: str
    trials: dict[str, SeenTrial]  # by slot
    points: dict[str, SeenTrial]  # settings


@dataclass
class Backend:
    uri: str
    project: str
    look: Callable[[str, str, str], Seen]  # uri, project, sweep

    def tracker(self) -> Tracker:
        """What another start of the driver would get."""
        return make_tracker(self.uri, store=Path("unused"), project=self.project)

    def seen(self, sweep: str = "quickstart") -> Seen:
        return self.look(self.uri, self.project, sweep)


def look_at_jsonl(uri: str, project: str, sweep: str) -> Seen:
    from orchestrator.tracking.jsonl import read

    told = read(Path(uri.removeprefix("jsonl:")))[f"{project}/{sweep}"]

    def seen(line: dict[str, Any], tags: dict[str, str]) -> SeenTrial:
        single = {k: [(0, v)] for k, v in line["metrics"].items() if k not in line["curves"]}
        curves = {k: [(step, v) for step, v in c] for k, c in line["curves"].items()}
        return SeenTrial(
            *(line["name"], line.get("status", "FINISHED"), line["tags"] | tags, line["params"]),
            *(line["metrics"], single | curves, line.get("slot", ""), line.get("note", "")),
        )

    trials = {}
    for slot, line in told.trials.items():
        failed = {"air.failure_class": line["failure_class"]} if line["failure_class"] else {}
        trials[slot] = seen(line, {"air.state": line["state"], **failed})
    points = {
        name: seen(line, {"air.interval": line["interval"], "air.point": line["point"]})
        for name, line in told.points.items()
    }
    return Seen(told.sweep["id"], told.sweep["status"], told.sweep["note"], trials, points)


def look_at_mlflow(uri: str, project: str, sweep: str) -> Seen:
    client = mlflow_client(uri)
    runs = runs_of(uri, project)
    (parent,) = [r for r in runs if is_sweep(r) and r.data.tags["air.sweep"] == sweep]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    found: dict[str, dict[str, SeenTrial]] = {"trial": {}, "point": {}}
    for run in children:
        history = {k: client.get_metric_history(run.info.run_id, k) for k in run.data.metrics}
        curves = {k: sorted((m.step, m.value) for m in h) for k, h in history.items()}
        of_kind = found[run.data.tags["air.kind"]]
        name = run.data.tags["air.point" if of_kind is found["point"] else "air.slot"]
        assert name not in of_kind, f"two children for {name}"
        of_kind[name] = SeenTrial(
            *(run.info.run_name, run.info.status),
            *(run.data.tags, run.data.params, run.data.metrics, curves),
            *(run.info.run_id, run.data.tags.get("mlflow.note.content", "")),
        )
    note = parent.data.tags["mlflow.note.content"]
    return Seen(parent.info.run_id, parent.info.status, note, found["trial"], found["point"])


def mlflow_client(uri: str) -> Any:
    import orchestrator.tracking.mlflow as product  # its settings come before the import of mlflow

    return product.MlflowClient(uri)


def runs_of(uri: str, project: str) -> list[Any]:
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(f"air/{project}")
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def is_sweep(run: Any) -> bool:
    return run.data.tags.get("air.kind") == "sweep"


# A store with a fresh database, copied where one is needed: MLflow takes seconds to make one.


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("fresh") / "runs"
    make_tracker(f"sqlite:///{store}/mlflow.db", store=store, project="fresh").start(a_sweep())
    return store


@pytest.fixture(scope="module")
def shared_store(fresh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(fresh_store, tmp_path_factory.mktemp("sqlite") / "runs")


@dataclass
class Server:
    url: str
    moved: SweepRun  # a sweep that was tracked before the store's folder was moved
    files: dict[str, bytes]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def server(fresh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server, as `airsweep ui` starts it, over a store that was filled and then moved."""
    folder = tmp_path_factory.mktemp("server")
    sweep, files = (
        a_sweep("moved", project="moved"),
        {"confusion.png": b"\x89PNG?", "a/b.txt": b"b"},
    )
    home = shutil.copytree(fresh_store, folder / "before")
    sources = {name: folder / name.replace("/", "-") for name in files}
    for name, path in sources.items():
        path.write_bytes(files[name])
    tracker = make_tracker(f"sqlite:///{home}/mlflow.db", store=home, project="moved")
    tracker.start(sweep)
    tracker.trial(a_trial(artifacts=sources))
    tracker.finish("FINISHED", "", {"contact_sheet.png": sources["confusion.png"]})
    shutil.move(home, folder / "after" / "runs")

    process = MlflowServer(folder / "after" / "runs", folder / "log")
    try:
        process.start()
        yield Server(process.url, sweep, files)
    finally:
        process.stop()


@pytest.fixture(params=["jsonl", "sqlite", "http"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return make_backend(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "http"])
def mlflow_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return make_backend(request.param, request, tmp_path)


def make_backend(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    project = request.node.name.translate(str.maketrans("[]", "--"))  # a world of its own
    if kind == "jsonl":
        return Backend(f"jsonl:{tmp_path}/sub/tracked.jsonl", project, look_at_jsonl)
    if kind == "http":
        return Backend(request.getfixturevalue("server").url, project, look_at_mlflow)
    store = request.getfixturevalue("shared_store")
    return Backend(f"sqlite:///{store}/mlflow.db", project, look_at_mlflow)


# The contract.


def test_an_outcome_is_a_child_of_its_sweep(backend: Backend) -> None:
    tracker = backend.tracker()
    parent = tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.trial(a_trial(seed=2, state="reused"))
    tracker.trial(a_failed_trial(seed=3))
    tracker.finish("FINISHED", "25 are enough.", {})

    seen = backend.seen()
    assert (seen.id, seen.status, seen.note) == (parent, "FINISHED", "25 are enough.")
    done, reused, failed = (seen.trials[a_trial(seed=s).slot] for s in (1, 2, 3))
    assert done.name == "digits-ul-text-air-s1-0a1b2c3d"
    assert [t.status for t in (done, reused, failed)] == ["FINISHED", "FINISHED", "FAILED"]
    assert [t.tags["air.state"] for t in (done, reused, failed)] == ["done", "reused", "failed"]
    assert failed.tags["air.failure_class"] == "nan"
    assert "air.failure_class" not in done.tags
    assert done.params == {"images_per_class": "25"}
    assert done.metrics == {"test/accuracy": 0.75, "time/train_s": 4.5, "train/loss": 0.5}
    assert reused.metrics == done.metrics


def test_a_curve_has_a_step_per_iteration(backend: Backend) -> None:
    tracker = backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(a_trial())

    (trial,) = backend.seen().trials.values()
    assert trial.curves["test/accuracy"] == [(0, 0.5), (1, 0.7), (2, 0.75)]
    assert trial.curves["time/train_s"] == [(0, 4.5)]


def test_what_is_not_a_number_is_left_out(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    tracker = backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(
        a_trial(metrics={"a": nan, "b": inf}, curves={"c": [nan, 1.0], "d": [nan], "e": []})
    )

    (trial,) = backend.seen().trials.values()
    assert trial.curves == {"c": [(1, 1.0)]}


def test_telling_twice_is_telling_once(backend: Backend) -> None:
    outcomes = [a_trial(), a_trial(seed=2, state="reused"), a_failed_trial(seed=3)]
    for _ in range(2):  # the second driver knows nothing of the first
        tracker = backend.tracker()
        tracker.start(a_sweep())
        for outcome in outcomes * 2:
            tracker.trial(outcome)
        tracker.finish("FINISHED", "done", {})

    seen = backend.seen()
    assert len(seen.trials) == 3
    assert len(seen.trials[a_trial().slot].curves["train/loss"]) == 3
    assert seen.trials[a_trial().slot].params == {"images_per_class": "25"}


def test_a_failed_trial_that_succeeds_later_is_the_same_child(backend: Backend) -> None:
    for outcome in (a_failed_trial(), a_trial()):
        tracker = backend.tracker()
        tracker.start(a_sweep())
        tracker.trial(outcome)
        tracker.finish("FINISHED", "", {})

    (trial,) = backend.seen().trials.values()
    assert (trial.status, trial.tags["air.state"]) == ("FINISHED", "done")
    assert "air.failure_class" not in trial.tags
    assert trial.metrics["test/accuracy"] == 0.75


def test_a_sweep_that_goes_on_keeps_its_parent(backend: Backend) -> None:
    first = backend.tracker()
    parent = first.start(a_sweep())
    first.trial(a_trial())
    first.finish("KILLED", "stopped", {})
    assert backend.seen().status == "KILLED"

    second = backend.tracker()
    assert second.start(a_sweep(note="going on", spec_hash="another")) == parent
    assert (backend.seen().status, backend.seen().note) == ("RUNNING", "going on")
    second.trial(a_trial(seed=2))
    second.finish("FINISHED", "complete", {})
    assert backend.seen().status == "FINISHED"
    assert len(backend.seen().trials) == 2


def test_sweeps_of_one_project_do_not_mix(backend: Backend) -> None:
    for name in ("one", "other"):
        tracker = backend.tracker()
        tracker.start(a_sweep(name))
        tracker.trial(a_trial())
        tracker.finish("FINISHED", name, {})
    for name in ("one", "other"):
        assert (len(backend.seen(name).trials), backend.seen(name).note) == (1, name)


def test_a_setting_is_a_child_beside_its_trials(backend: Backend) -> None:
    tracker = backend.tracker()
    tracker.start(a_sweep())
    for seed in (1, 2):
        tracker.trial(a_trial(seed=seed))
    tracker.point(a_point())
    told = tracker.finish("FINISHED", "", {})

    seen = backend.seen()
    assert len(seen.trials) == 2
    (point,) = seen.points.values()
    assert (point.name, point.status) == ("digits-ul-text-air", "FINISHED")
    assert point.metrics == a_point().numbers().metrics
    assert point.curves["test/accuracy"] == [(0, 0.5), (1, 0.7), (2, 0.77)]
    assert point.params == {"images_per_class": "25"}
    expected = {"air.point": "digits-ul-text-air/0", **a_point().tags}
    assert {**expected, "air.interval": a_point().numbers().interval}.items() <= point.tags.items()
    assert (told.told, told.points) == (2, 1)


def test_a_setting_names_its_seeds(backend: Backend) -> None:
    tracker = backend.tracker()
    parent = tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.point(a_point())  # the other seed has failed to arrive
    tracker.finish("FINISHED", f"Best: {link('air', 'point', a_point().point)}", {})

    seen = backend.seen()
    (trial,), (point,) = seen.trials.values(), seen.points.values()
    if backend.uri.startswith("jsonl"):
        assert point.note == a_point().note
        return
    experiment = mlflow_client(backend.uri).get_run(parent).info.experiment_id
    place = f"#/experiments/{experiment}/runs/{{}}?workflowType=machine_learning"
    assert point.note == f"The seeds: [seed 1]({place.format(trial.id)}), seed 2."
    assert seen.note == f"Best: [air]({place.format(point.id)})"


def test_a_setting_is_computed_once_and_told_once(backend: Backend) -> None:
    asked: list[int] = []
    for _ in range(2):
        tracker = backend.tracker()
        tracker.start(a_sweep())
        tracker.trial(a_trial())
        tracker.point(a_point((1,), asked))
        tracker.point(a_point((1,), asked))
        told = tracker.finish("FINISHED", "done", {})

    assert asked == [1]
    assert told.points == 0
    (point,) = backend.seen().points.values()
    assert point.curves["n"] == [(0, 1.0)]


def test_a_setting_with_another_seed_has_the_new_numbers_alone(backend: Backend) -> None:
    for seeds in ((1, 2, 3), (1,), (1, 2)):
        tracker = backend.tracker()
        tracker.start(a_sweep())
        for seed in seeds:
            tracker.trial(a_trial(seed=seed))
        tracker.point(a_point(seeds))
        tracker.finish("FINISHED", "", {})

    seen = backend.seen()
    (point,) = seen.points.values()
    assert len(seen.trials) == 3
    assert point.curves == {
        **{key: [(0, value)] for key, value in a_point().numbers().metrics.items()},
        "test/accuracy": [(0, 0.5), (1, 0.7), (2, 0.77)],
    }


def test_words_of_a_setting_change_without_its_numbers(backend: Backend) -> None:
    asked: list[int] = []
    for note in ("one word", "another"):
        tracker = backend.tracker()
        tracker.start(a_sweep())
        tracker.point(a_point(asked=asked, note=note))
        tracker.finish("FINISHED", "", {})

    (point,) = backend.seen().points.values()
    assert point.note == "another"
    assert point.metrics["n"] == 2
    if not backend.uri.startswith("jsonl"):  # a line of JSON holds all of it
        assert asked == [2]


def test_an_artifact_of_a_megabyte_is_refused_with_a_word(
    backend: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * MAX_ARTIFACT)
    tracker = backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(a_trial(artifacts={"large.png": large, "gone.png": tmp_path / "gone.png"}))
    tracker.finish("FINISHED", "", {})

    assert "large.png" in caplog.text
    assert "gone.png" in caplog.text
    assert backend.seen().trials[a_trial().slot].status == "FINISHED"


def test_more_than_thirty_metrics_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="31 metric keys"):
        a_trial(metrics={f"class/{i}": 0.5 for i in range(31)}, curves={})


def test_an_unknown_tracker_is_explained(tmp_path: Path) -> None:
    for uri in ("s3://bucket/x", "file:///x", "./mlruns", "mlruns", "sqlite:///", "jsonl:"):
        with pytest.raises(ValueError, match="known: "):
            make_tracker(uri, store=tmp_path, project="p")
    with pytest.raises(ValueError, match="mlflow server") as caught:
        make_tracker("postgresql://me:secret@db/x", store=tmp_path, project="p")
    assert "secret" not in str(caught.value)


def test_tracking_can_be_switched_off(tmp_path: Path) -> None:
    tracker = make_tracker("none", store=tmp_path, project="p")
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.finish("FINISHED", "", {})
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_it_is_not_imported() -> None:
    code = (
        "import sys; from pathlib import Path; import orchestrator.tracking as t;"
        "t.make_tracker('jsonl:x', store=Path('.'), project='p'); t.serve_command(Path('.'));"
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_half_a_line_is_not_an_outcome(tmp_path: Path) -> None:
    path = tmp_path / "tracked.jsonl"
    tracker = make_tracker(f"jsonl:{path}", store=tmp_path, project="p")
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    path.write_text(path.read_text()[:-40])  # killed while it wrote

    assert look_at_jsonl(f"jsonl:{path}", "p", "quickstart").trials == {}
    tracker = make_tracker(f"jsonl:{path}", store=tmp_path, project="p")
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    assert len(look_at_jsonl(f"jsonl:{path}", "p", "quickstart").trials) == 1


# MLflow.


def test_children_can_be_found_by_their_tags(mlflow_backend: Backend) -> None:
    tracker = mlflow_backend.tracker()
    parent = tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.finish("FINISHED", "", {})

    tags = mlflow_backend.seen().trials[a_trial().slot].tags
    expected = {
        "air.kind": "trial",
        "air.sweep": "quickstart",
        "air.dataset": "digits",
        "air.trial_key": a_trial().tags["air.trial_key"],
        "mlflow.parentRunId": parent,
        "mlflow.user": "ada",
        "mlflow.source.name": "airsweep",
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": "0123abc",
    }
    assert expected.items() <= tags.items()
    (sweep,) = [r for r in runs_of(mlflow_backend.uri, mlflow_backend.project) if is_sweep(r)]
    expected = {"air.sweep": "quickstart", "air.project": "default", "air.spec_hash": "5f3a9c"}
    expected["air.user"] = "ada"
    assert expected.items() <= sweep.data.tags.items()
    assert sweep.data.params == {"points": "12"}


def begun_by_a_killed_driver(backend: Backend, parent: str, trial: TrialRun) -> str:
    """A child as it is between its creation and its end."""
    client = mlflow_client(backend.uri)
    experiment = client.get_run(parent).info.experiment_id
    tags = {
        "air.kind": "trial",
        "air.slot": trial.slot,
        "air.trial_key": trial.tags["air.trial_key"],
        "mlflow.parentRunId": parent,
    }
    return str(client.create_run(experiment, trial.started, tags, trial.name).info.run_id)


@pytest.mark.parametrize("numbers", ["none", "all"])
def test_a_child_that_a_killed_driver_began_is_completed(
    mlflow_backend: Backend, numbers: str
) -> None:
    parent = mlflow_backend.tracker().start(a_sweep())
    begun = begun_by_a_killed_driver(mlflow_backend, parent, a_trial())
    if numbers == "all":  # killed just before the last call
        from mlflow.entities import Metric

        points = a_trial().points().items()
        metrics = [Metric(k, p.value, p.time, p.step) for k, series in points for p in series]
        mlflow_client(mlflow_backend.uri).log_batch(begun, metrics=metrics)

    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.finish("FINISHED", "", {})

    (trial,) = mlflow_backend.seen().trials.values()
    assert mlflow_client(mlflow_backend.uri).get_run(begun).info.status == "FINISHED"
    assert trial.curves["train/loss"] == [(0, 1.5), (1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_nothing_runs_after_the_finish(mlflow_backend: Backend, status: Any) -> None:
    parent = mlflow_backend.tracker().start(a_sweep())
    begun = begun_by_a_killed_driver(mlflow_backend, parent, a_trial(seed=7))

    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.finish(status, "", {})

    found = {
        r.info.run_id: r.info.status for r in runs_of(mlflow_backend.uri, mlflow_backend.project)
    }
    assert "RUNNING" not in found.values()
    assert (found[parent], found[begun]) == (status, "KILLED")

    tracker = mlflow_backend.tracker()  # the trial is run after all
    tracker.start(a_sweep())
    tracker.trial(a_trial(seed=7))
    assert mlflow_backend.seen().trials[a_trial(seed=7).slot].status == "FINISHED"
    assert mlflow_client(mlflow_backend.uri).get_run(begun).info.status == "FINISHED"


def test_a_request_that_arrived_twice_leaves_one_child(mlflow_backend: Backend) -> None:
    tracker = mlflow_backend.tracker()
    parent = tracker.start(a_sweep())
    tracker.trial(a_trial())
    begun_by_a_killed_driver(mlflow_backend, parent, a_trial())
    tracker.finish("FINISHED", "", {})
    assert len(mlflow_backend.seen().trials) == 1

    begun_by_a_killed_driver(mlflow_backend, parent, a_trial())
    mlflow_backend.tracker().start(a_sweep())
    (trial,) = mlflow_backend.seen().trials.values()
    assert trial.status == "FINISHED"


@pytest.mark.parametrize("numbers", ["none", "some", "of other seeds"])
def test_a_setting_that_a_killed_driver_began_is_completed(
    mlflow_backend: Backend, numbers: str
) -> None:
    from mlflow.entities import Metric

    parent = mlflow_backend.tracker().start(a_sweep())
    content = "of other seeds" if numbers == "of other seeds" else a_point().content
    begun = begun_point(mlflow_backend, parent, content)
    if numbers != "none":
        mean = a_point().numbers().metrics["test/accuracy"] if numbers == "some" else 0.1
        metrics = [Metric("test/accuracy", mean, a_point().ended, 2)]
        mlflow_client(mlflow_backend.uri).log_batch(begun, metrics=metrics)

    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep())
    tracker.point(a_point())
    tracker.finish("FINISHED", "", {})

    (point,) = mlflow_backend.seen().points.values()
    assert (point.id == begun) == (numbers != "of other seeds")
    assert point.status == "FINISHED"
    assert point.curves["test/accuracy"] == [(0, 0.5), (1, 0.7), (2, 0.77)]


def begun_point(backend: Backend, parent: str, content: str) -> str:
    client = mlflow_client(backend.uri)
    experiment = client.get_run(parent).info.experiment_id
    tags = {
        "air.kind": "point",
        "air.point": a_point().point,
        "air.content": content,
        "mlflow.parentRunId": parent,
    }
    begun = client.create_run(experiment, a_point().started, tags, a_point().name)
    return str(begun.info.run_id)


def test_a_setting_made_twice_or_left_behind_does_not_run_on(mlflow_backend: Backend) -> None:
    tracker = mlflow_backend.tracker()
    parent = tracker.start(a_sweep())
    tracker.point(a_point())
    begun_point(mlflow_backend, parent, a_point().content)  # a request that arrived twice
    tracker.finish("FINISHED", "", {})
    (point,) = mlflow_backend.seen().points.values()
    assert point.status == "FINISHED"

    client = mlflow_client(mlflow_backend.uri)
    client.set_tag(begun_point(mlflow_backend, parent, "x"), "air.point", "gone/0")
    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep())
    tracker.finish("FINISHED", "", {})
    assert mlflow_backend.seen().points["gone/0"].status == "KILLED"


def test_pictures_of_a_note_are_files_of_the_sweep(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"picture")
    tracker = make_tracker(server.url, store=tmp_path, project="pictures")
    parent = tracker.start(a_sweep())
    note = f"{image('there', 'a b.png')}{image('not there', 'c.png')}"
    tracker.finish("FINISHED", note, {"a b.png": tmp_path / "a b.png"})

    shown = look_at_mlflow(server.url, "pictures", "quickstart").note
    assert shown == f"![there](get-artifact?path=a%20b.png&run_uuid={parent})"
    assert server.get("/" + shown.partition("(")[2].rstrip(")")) == b"picture"


def test_a_run_id_in_the_environment_captures_nothing(
    mlflow_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    somebody = mlflow_backend.tracker().start(a_sweep("somebody"))
    monkeypatch.setenv("MLFLOW_RUN_ID", somebody)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    tracker = mlflow_backend.tracker()
    assert tracker.start(a_sweep()) != somebody
    tracker.trial(a_trial())
    tracker.finish("FINISHED", "", {})

    assert mlflow_backend.seen("somebody").trials == {}
    assert len(mlflow_backend.seen("quickstart").trials) == 1


def test_params_are_written_once(mlflow_backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    for params in ({"images_per_class": "25"}, {"images_per_class": "50", "new": "1"}):
        tracker = mlflow_backend.tracker()
        tracker.start(a_sweep(params=params))
        tracker.trial(a_trial(params=params))
        tracker.finish("FINISHED", "", {})

    (trial,) = mlflow_backend.seen().trials.values()
    assert trial.params == {"images_per_class": "25", "new": "1"}
    assert caplog.text == ""


LATER = {"started": 1_800_000_000_000, "ended": 1_800_000_001_000, "metrics": {}}
EDITED = {"tags": {"air.trial_key": "trials/v1/edited"}, "params": {"images_per_class": "50"}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (a_trial(), a_trial(**LATER, **EDITED, curves={"test/accuracy": [0.25, 0.5]})),
        (a_failed_trial(), a_trial(**LATER, **EDITED, curves={"test/accuracy": [0.25, 0.5]})),
        (a_trial(), a_trial(**LATER, curves={"test/accuracy": [0.25, 0.5]})),
    ],
    ids=["edited", "edited after a failure", "computed again"],
)
def test_another_computation_in_a_slot_is_another_child(
    mlflow_backend: Backend, before: TrialRun, after: TrialRun
) -> None:
    for outcome in (before, after, after):
        tracker = mlflow_backend.tracker()
        tracker.start(a_sweep())
        tracker.trial(outcome)
        tracker.finish("FINISHED", "", {})

    (trial,) = mlflow_backend.seen().trials.values()
    assert trial.params == after.params
    assert trial.curves == {"test/accuracy": [(0, 0.25), (1, 0.5)]}


def test_a_long_history_arrives_whole(mlflow_backend: Backend) -> None:
    long = {f"curve/{i}": [float(step) for step in range(450)] for i in range(5)}
    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep(note="a line\n" * 2000))
    tracker.trial(a_trial(metrics={}, curves=long))
    tracker.finish("FINISHED", "a line\n" * 2000, {})

    (trial,) = mlflow_backend.seen().trials.values()
    assert {key: len(curve) for key, curve in trial.curves.items()} == dict.fromkeys(long, 450)
    assert mlflow_backend.seen().note.endswith("a line\n\n*(cut)*")


def test_artifacts_are_found_after_the_store_has_moved(server: Server) -> None:
    runs = runs_of(server.url, "moved")
    (sweep,), (child,) = [r for r in runs if is_sweep(r)], [r for r in runs if not is_sweep(r)]
    for name, content in server.files.items():
        query = urllib.parse.urlencode({"path": name, "run_uuid": child.info.run_id})
        assert server.get(f"/get-artifact?{query}") == content
    listed = json.loads(server.get(f"/api/2.0/mlflow/artifacts/list?run_id={sweep.info.run_id}"))
    assert [file["path"] for file in listed["files"]] == ["contact_sheet.png"]
    assert child.data.tags["air.artifacts"] == "a/b.txt, confusion.png"


def test_a_server_takes_artifacts_too(server: Server, tmp_path: Path) -> None:
    source = tmp_path / "other name"
    source.write_bytes(b"spec")
    tracker = make_tracker(server.url, store=tmp_path, project="uploads")
    tracker.start(a_sweep())
    tracker.trial(a_trial(artifacts={"specs/resolved.json": source}))
    tracker.finish("FINISHED", "", {"resolved.json": source})

    for run in runs_of(server.url, "uploads"):
        name = "resolved.json" if is_sweep(run) else "specs/resolved.json"
        query = urllib.parse.urlencode({"path": name, "run_uuid": run.info.run_id})
        assert server.get(f"/get-artifact?{query}") == b"spec"


def test_artifacts_that_had_no_room_come_with_the_next_start(
    fresh_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = shutil.copytree(fresh_store, tmp_path / "runs")
    (tmp_path / "a.txt").write_text("a")
    blocked = store / "mlartifacts"
    blocked.write_text("a file where the folder should be")
    for _ in range(2):
        tracker = make_tracker(None, store=store, project="p")
        tracker.start(a_sweep())
        tracker.trial(a_trial(artifacts={"a.txt": tmp_path / "a.txt"}))
        tracker.finish("FINISHED", "", {})
        (trial,) = look_at_mlflow(f"sqlite:///{store}/mlflow.db", "p", "quickstart").trials.values()
        assert trial.status == "FINISHED"
        blocked.unlink() if blocked.is_file() else None

    assert caplog.text.count("takes no artifacts") == 1
    assert [path.name for path in blocked.rglob("*.txt")] == ["a.txt"]


# What a server answers whose pool of connections to its database is used up.
BUSY = json.dumps(
    {"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 1 overflow 0 reached"}
)


class Line:
    """The line to a server. It can be cut, lose the server's replies, and say that it is busy."""

    def __init__(self, url: str) -> None:
        self._server = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self._port = free_port()
        self._open: socketserver.ThreadingTCPServer | None = None
        self._calls: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._port}"
        self.loses_replies = self.busy = False

    def restore(self) -> None:
        line = self

        class Forward(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                line._calls.append(self.request)
                with socket.create_connection(line._server) as server:
                    threading.Thread(target=line._reply, args=(server, self.request)).start()
                    with contextlib.suppress(OSError):
                        while data := self.request.recv(65536):
                            server.sendall(data)
                        server.shutdown(socket.SHUT_RDWR)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._open = Server(("127.0.0.1", self._port), Forward)
        threading.Thread(target=self._open.serve_forever, daemon=True).start()

    def _reply(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not self.loses_replies:
                if self.busy:  # one answer, in however many pieces the server's comes
                    head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
                    head += f"Connection: close\r\nContent-Length: {len(BUSY)}\r\n\r\n"
                    client.sendall(f"{head}{BUSY}".encode())
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        assert self._open is not None
        self._open.shutdown()
        self._open.server_close()
        for call in self._calls:  # a client keeps its connections open
            with contextlib.suppress(OSError):
                call.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("cut", ["before the start", "in mid-sweep"])
def test_an_outage_is_survived_and_made_good(
    server: Server, cut: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = f"outage {cut}"
    line = Line(server.url)
    tracker = make_tracker(line.url, store=tmp_path, project=project)
    began = time.monotonic()
    if cut == "in mid-sweep":
        line.restore()
        assert tracker.start(a_sweep())
        tracker.trial(a_trial(seed=0))
        line.cut()
    else:
        assert tracker.start(a_sweep()) == ""
    for seed in range(1, 6):
        tracker.trial(a_trial(seed=seed))
    assert time.monotonic() - began < 60  # MLflow's defaults would wait for 20 minutes
    assert [r.name for r in caplog.records] == ["orchestrator.tracking.mlflow"]  # one line

    tracker.point(a_point())
    line.restore()
    tracker.finish("FINISHED", "made good", {})
    line.cut()
    seen = look_at_mlflow(server.url, project, "quickstart")
    assert (seen.status, seen.note) == ("FINISHED", "made good")
    assert len(seen.trials) == (6 if cut == "in mid-sweep" else 5)
    assert len(seen.points) == 1
    assert {trial.status for trial in seen.trials.values()} == {"FINISHED"}


@pytest.mark.parametrize("lost", ["sweep", "trial"])
def test_lost_replies_leave_no_second_run(server: Server, lost: str, tmp_path: Path) -> None:
    project = f"lost {lost}"
    line = Line(server.url)
    line.restore()
    tracker = make_tracker(line.url, store=tmp_path, project=project)
    make_tracker(server.url, store=tmp_path, project=project).start(a_sweep("other"))
    line.loses_replies = lost == "sweep"
    tracker.start(a_sweep())
    line.loses_replies = True
    tracker.trial(a_trial())
    line.loses_replies = False
    tracker.finish("FINISHED", "", {})
    line.cut()

    (trial,) = look_at_mlflow(server.url, project, "quickstart").trials.values()
    assert trial.status == "FINISHED"
    running = [run for run in runs_of(server.url, project) if run.info.status == "RUNNING"]
    assert [run.info.run_name for run in running] == ["other"]


def test_what_a_busy_server_did_not_take_is_told_again(server: Server, tmp_path: Path) -> None:
    line = Line(server.url)
    line.restore()
    tracker = make_tracker(line.url, store=tmp_path, project="busy")
    tracker.start(a_sweep())
    line.busy = True
    tracker.trial(a_trial())
    line.busy = False
    told = tracker.finish("FINISHED", "", {})
    line.cut()

    assert (told.told, told.missed) == (1, 0)
    (trial,) = look_at_mlflow(server.url, "busy", "quickstart").trials.values()
    assert trial.status == "FINISHED"


def test_an_outage_to_the_end_is_made_good_by_the_next_start(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.tracking.mlflow.MAX_UNTOLD", 1)  # the second is not kept
    nobody = make_tracker(f"http://127.0.0.1:{free_port()}", store=tmp_path, project="late")
    nobody.start(a_sweep())
    nobody.trial(a_trial())
    nobody.trial(a_trial(seed=2))
    told = nobody.finish("FINISHED", "", {})
    assert (told.missed, told.sweep) == (2, "missed")
    assert len(caplog.records) == 1

    tracker = make_tracker(server.url, store=tmp_path, project="late")
    tracker.start(a_sweep())
    tracker.trial(a_trial())
    tracker.finish("FINISHED", "", {})
    assert look_at_mlflow(server.url, "late", "quickstart").status == "FINISHED"


def test_a_refused_outcome_does_not_hold_up_the_others(
    mlflow_backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = mlflow_backend.tracker()
    tracker.start(a_sweep())
    tracker.trial(a_trial(metrics={"acc@1": 0.5}, curves={}))
    tracker.trial(a_trial(seed=2))
    tracker.finish("FINISHED", "", {})

    assert "refuses digits-ul-text-air-s1" in caplog.text
    statuses = [trial.status for trial in mlflow_backend.seen().trials.values()]
    assert sorted(statuses) == ["FINISHED", "KILLED"]


def test_a_broken_database_is_said_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    tracker = make_tracker(None, store=tmp_path, project="p")
    assert tracker.start(a_sweep()) == ""
    tracker.trial(a_trial())
    assert "file is not a database" in caplog.text


def test_a_deleted_experiment_comes_back(fresh_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(fresh_store, tmp_path / "runs")
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    client.delete_experiment(client.get_experiment_by_name("air/fresh").experiment_id)
    tracker = make_tracker(None, store=store, project="fresh")
    assert tracker.start(a_sweep())


DRIVER = """
import sys
from pathlib import Path
from tests.orchestrator.test_tracking import a_sweep, a_trial
from orchestrator.tracking import make_tracker
tracker = make_tracker(sys.argv[1] or None, store=Path(sys.argv[2]), project="drivers")
tracker.start(a_sweep(sys.argv[3]))
tracker.trial(a_trial())
tracker.finish("FINISHED", "", {})
"""


@pytest.mark.parametrize("kind", ["a new database", "http"])
def test_two_drivers_start_together_and_print_nothing(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = request.getfixturevalue("server").url if kind == "http" else ""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, uri, str(tmp_path / "runs"), name],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    for driver in drivers:
        assert driver.communicate(timeout=300) == ("", "")
        assert driver.returncode == 0
    for name in ("one", "other"):
        where = uri or f"sqlite:///{tmp_path}/runs/mlflow.db"
        assert len(look_at_mlflow(where, "drivers", name).trials) == 1


def test_a_driver_that_is_killed_while_mlflow_makes_its_tables_leaves_no_half_of_them(
    tmp_path: Path,
) -> None:
    code = (
        "from orchestrator.tracking import make_tracker; import pathlib, sys\n"
        "from tests.orchestrator.test_tracking import a_sweep\n"
        "make_tracker(None, store=pathlib.Path(sys.argv[1]), project='p').start(a_sweep())\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db-*")):
        assert driver.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    driver.kill()
    driver.wait()
    assert not (tmp_path / "mlflow.db").exists()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "mlflow.db").exists()
    assert not list(tmp_path.glob(".mlflow.db-*"))


def test_files_of_an_outcome_that_was_told_are_not_made_again(
    mlflow_backend: Backend, tmp_path: Path
) -> None:
    made = []

    def picture() -> bytes:
        made.append(1)
        return b"picture"

    for attempt in ("one", "other"):
        tracker = mlflow_backend.tracker()
        tracker.start(a_sweep())
        files = FilesOnDemand(tmp_path / attempt, {"a.png": picture})
        tracker.trial(a_trial(artifacts=files))
        tracker.finish("FINISHED", "", {})
    assert len(made) == 1


def test_many_children_told_twice_are_there_once(mlflow_backend: Backend) -> None:
    trials = [
        a_trial(f"digits-ul-text-air{cell}", seed, curves={f"c{i}": [0.5] * 10 for i in range(6)})
        for cell in range(12)
        for seed in range(5)
    ]
    trials = [dataclasses.replace(trial, metrics={}) for trial in trials]
    for _ in range(2):
        tracker = mlflow_backend.tracker()
        tracker.start(a_sweep())
        for trial in trials:
            tracker.trial(trial)
        tracker.finish("FINISHED", "", {})
    found = runs_of(mlflow_backend.uri, mlflow_backend.project)
    assert len(found) == 61
