"""The runs in MLflow after normal sweeps, killed drivers and failing servers.

Most tests use an sqlite file; the others start an MLflow server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from orchestrator.tracking._child_runs import COMMIT, NOTE, USER, ChildRun, Numbers
from tests.helpers.servers import MlflowServer, failing_server
from tests.helpers.sweeps import TIMEOUT, python, write_sweep

ROOT = Path(__file__).parents[2]


def a_sweep(name: str = "quickstart") -> dict[str, str]:
    return {
        **{"air.sweep": name, "air.project": "default", "air.spec_hash": "5f3a9c"},
        **{"air.user": "ada", USER: "ada", COMMIT: "0123abc", NOTE: "How many images are enough?"},
        **{"mlflow.source.name": "airsweep", "mlflow.source.type": "JOB"},
    }


def a_trial(cell: str = "digits-ul-text-air", seed: int = 1, **changes: Any) -> ChildRun:
    metrics = {"time/train_s": 4.5, "test/accuracy": 0.75}
    curves = {"test/accuracy": [0.5, 0.7, 0.75], "train/loss": [1.5, 1.0, 0.5]}
    numbers = Numbers(metrics=changes.pop("metrics", metrics), curves=changes.pop("curves", curves))
    values: dict[str, Any] = {
        "kind": "trial",
        "id": f"{cell}/0/seed={seed}",
        "content": f"{cell}{seed}",
        "name": f"{cell}-s{seed}-0a1b2c3d",
        "params": {"images_per_class": "25"},
        "numbers": lambda: numbers,
        "started": 1_700_000_000_000 + seed,
        "ended": 1_700_000_009_000 + seed,
    }
    tags = {"air.dataset": "digits", "air.state": "done"} | changes.pop("tags", {})
    return ChildRun(**values | {"tags": tags} | changes)


def a_failed_trial(**changes: Any) -> ChildRun:
    tags = {"air.state": "failed", "air.failure_class": "nan"}
    return a_trial(**{"status": "FAILED", "tags": tags, "metrics": {}, "curves": {}} | changes)


def a_setting(**changes: Any) -> ChildRun:
    own = {"kind": "point", "id": "digits-ul-text-air/0", "name": "digits-ul-text-air"}
    return replace(a_trial(), **own | changes)


# ---------------------------------------------------------------- what MLflow shows


def tracker_of(*arguments: Any) -> Any:
    from orchestrator.tracking._mlflow import MlflowTracker  # takes seconds

    return MlflowTracker(*arguments)


@dataclass
class SeenRun:
    id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]  # (step, value), the whole history


@dataclass
class Seen:
    run: SeenRun
    trials: dict[str, SeenRun]  # by slot
    settings: dict[str, SeenRun]  # by point


@dataclass
class World:
    """A separate project in MLflow."""

    uri: str
    project: str

    def send(self, *runs: ChildRun, sweep: Any = None, status: Any = "FINISHED") -> int:
        """Send runs as a driver does, from start to end; return how many were written."""
        tracker = self.open(sweep)
        for run in runs:
            tracker.send(run)
        tracker.finish(status, "25 are enough.", {})
        return int(tracker.sent)

    def open(self, sweep: Any = None, **how: Any) -> Any:
        return tracker_of(self.uri, Path("unused"), self.project).open(sweep or a_sweep(), **how)

    @property
    def client(self) -> Any:
        import orchestrator.tracking._mlflow as product  # configures MLflow before its import

        return product.MlflowClient(self.uri)

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name(f"air/{self.project}")
        return list(self.client.search_runs([experiment.experiment_id], max_results=1000))

    def seen(self, sweep: str = "quickstart") -> Seen:
        runs = self.runs()
        (parent,) = [
            run
            for run in runs
            if run.data.tags["air.kind"] == "sweep" and run.data.tags["air.sweep"] == sweep
        ]
        by_kind: dict[str, dict[str, SeenRun]] = {"trial": {}, "point": {}}
        for run in runs:
            tags = run.data.tags
            if tags.get("mlflow.parentRunId") != parent.info.run_id:
                continue
            of_kind = by_kind[tags["air.kind"]]
            name = tags["air.slot" if tags["air.kind"] == "trial" else "air.point"]
            assert name not in of_kind, f"two runs for {name}"
            of_kind[name] = self._seen(run)
        return Seen(self._seen(parent), by_kind["trial"], by_kind["point"])

    def _seen(self, run: Any) -> SeenRun:
        history = {k: self.client.get_metric_history(run.info.run_id, k) for k in run.data.metrics}
        return SeenRun(
            *(run.info.run_id, run.info.run_name, run.info.status, run.data.tags, run.data.params),
            curves={k: sorted((m.step, m.value) for m in h) for k, h in history.items()},
        )


# Tests copy a store with an empty database, which takes MLflow seconds to create.


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("fresh") / "runs"
    World(f"sqlite:///{store}/mlflow.db", "fresh").open()
    return store


@pytest.fixture(scope="module")
def shared_store(fresh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(fresh_store, tmp_path_factory.mktemp("sqlite") / "runs")


@pytest.fixture(scope="module")
def server(fresh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server as `airsweep ui` starts it."""
    folder = tmp_path_factory.mktemp("server")
    process = MlflowServer(shutil.copytree(fresh_store, folder / "runs"), folder / "log")
    try:
        process.start()
        yield process
    finally:
        process.stop()


@pytest.fixture
def file(request: pytest.FixtureRequest, shared_store: Path) -> World:
    """MLflow in a file."""
    return World(f"sqlite:///{shared_store}/mlflow.db", request.node.name)


@pytest.fixture(params=["sqlite", pytest.param("http", marks=pytest.mark.integration)])
def world(request: pytest.FixtureRequest) -> World:
    """MLflow in a file, and behind a server."""
    if request.param == "http":
        return World(request.getfixturevalue("server").url, request.node.name)
    return request.getfixturevalue("file")


# ---------------------------------------------------------------- sending


def a_running_trial(loss: list[float], **changes: Any) -> ChildRun:
    now = {"status": "RUNNING", "tags": {"air.state": ""}, "started": 1_699_999_999_000}
    curves = {"train/loss": loss}
    return a_trial(**now | {"ended": 1_700_000_005_000} | changes, metrics={}, curves=curves)


def test_a_running_trial_shows_its_curves_and_ends_with_each_value_once(world: World) -> None:
    tracker = world.open()
    for loss in ([1.5], [1.5], [1.5, 1.0]):
        tracker.send(a_running_trial(loss))
        (trial,) = world.seen().trials.values()
        assert (trial.status, trial.curves) == ("RUNNING", {"train/loss": [*enumerate(loss)]})
        assert trial.params == {"images_per_class": "25"}
    for _ in range(2):
        tracker.send(a_trial())
    tracker.finish("FINISHED", "", {})
    world.send(a_trial())
    assert world.seen().trials == {
        a_trial().id: replace(trial, status="FINISHED", curves=ANY, tags=ANY)
    }
    (trial,) = world.seen().trials.values()
    assert trial.curves == {
        "test/accuracy": [(0, 0.5), (1, 0.7), (2, 0.75)],
        "train/loss": [(0, 1.5), (1, 1.0), (2, 0.5)],
        "time/train_s": [(0, 4.5)],
    }


def test_a_trial_that_starts_again_gets_a_new_run(file: World) -> None:
    file.open().send(a_running_trial([1.5, 1.0]))  # then the driver was killed
    tracker = file.open()
    for loss in ([1.5], [1.25], [1.25, 0.75]):  # the second is another attempt
        tracker.send(a_running_trial(loss))
    tracker.send(a_failed_trial())
    tracker.finish("FINISHED", "", {})
    (trial,) = file.seen().trials.values()
    assert (trial.status, trial.curves) == ("FAILED", {"train/loss": [(0, 1.25), (1, 0.75)]})
    file.send(a_trial())
    (trial,) = file.seen().trials.values()
    assert trial.curves["train/loss"] == [(0, 1.5), (1, 1.0), (2, 0.5)]


def test_runs_that_are_sent_twice_are_stored_once(world: World) -> None:
    drawn: list[str] = []
    computed: list[str] = []

    def picture() -> bytes:
        drawn.append("a picture")
        return b"picture"

    def numbers() -> Numbers:
        computed.append("a setting")
        return Numbers()

    counts = []
    for _ in range(2):  # two drivers, one after the other
        runs = [
            a_trial(files={"a.png": picture}),
            a_failed_trial(seed=3),
            a_setting(numbers=numbers),
        ]
        counts.append(world.send(*runs * 2))

    assert counts == [3, 0]
    seen = world.seen()
    assert (len(seen.trials), len(seen.settings)) == (2, 1)
    assert len(seen.trials[a_trial().id].curves["train/loss"]) == 3
    assert (drawn, computed) == (["a picture"], ["a setting"])


def test_a_later_run_of_fewer_cells_leaves_no_mark_and_no_gain(file: World) -> None:
    best = a_setting(tags={"air.best_classifier": "* text"})
    for runs, metrics in (((best, a_trial()), {"gain": 0.5}), ((a_trial(),), {})):
        tracker = file.open()
        for run in runs:
            tracker.send(run)
        tracker.finish("FINISHED", "", {}, metrics)
    seen = file.seen()
    assert "air.best_classifier" not in seen.settings[best.id].tags
    assert str(seen.run.curves["gain"][-1][1]) == "nan"
    file.send(best, a_trial())
    assert file.seen().settings[best.id].tags["air.best_classifier"] == "* text"


def test_a_resumed_sweep_keeps_its_run(file: World) -> None:
    file.send(a_trial(), status="KILLED")
    before = file.seen().run
    assert before.status == "KILLED"
    later = a_sweep() | {NOTE: "resumed", "air.spec_hash": "another"}
    file.open(later, live=False)  # an ended sweep keeps its status
    assert file.seen().run.status == "KILLED"

    tracker = file.open(later)
    assert tracker.run.run_id == before.id
    running = file.seen().run
    assert (running.status, running.tags["mlflow.note.content"]) == ("RUNNING", "resumed")


def test_a_long_history_is_complete_and_a_long_note_is_cut(world: World) -> None:
    long = {f"curve/{i}": [float(step) for step in range(450)] for i in range(5)}
    tracker = world.open()
    tracker.send(a_trial(metrics={}, curves=long))
    tracker.finish("FINISHED", "a" * 9000, {})

    seen = world.seen()
    (trial,) = seen.trials.values()
    assert {key: len(curve) for key, curve in trial.curves.items()} == dict.fromkeys(long, 450)
    assert seen.run.tags["mlflow.note.content"] == "a" * 8000


# ---------------------------------------------------------------- files


def test_any_client_finds_artifacts_of_a_moved_store(fresh_store: Path, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts

    before = shutil.copytree(fresh_store, tmp_path / "before #1")
    World(f"sqlite:///{before}/mlflow.db", "p").send(a_trial(files={"a.txt": lambda: b"a"}))
    after = Path(shutil.move(before, tmp_path / "after"))
    world = World(f"sqlite:///{after}/mlflow.db", "p")
    world.open()
    (trial,) = world.seen().trials.values()
    path = download_artifacts(run_id=trial.id, artifact_path="a.txt", tracking_uri=world.uri)
    assert Path(path).read_bytes() == b"a"


def test_artifacts_that_failed_to_upload_are_sent_by_the_next_run(
    fresh_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = shutil.copytree(fresh_store, tmp_path / "runs")
    blocked = store / "mlartifacts"
    blocked.write_text("a file where the folder should be")
    world = World(f"sqlite:///{store}/mlflow.db", "p")
    for _ in range(2):
        world.send(a_trial(files={"a.txt": lambda: b"a"}))
        assert world.seen().trials[a_trial().id].status == "FINISHED"
        blocked.unlink() if blocked.is_file() else None
    assert caplog.text.count("does not accept artifacts") == 1
    assert [path.name for path in blocked.rglob("*.txt")] == ["a.txt"]


# ---------------------------------------------------------------- which MLflow


def test_an_unsupported_tracking_uri_is_explained(tmp_path: Path) -> None:
    local = ("s3://bucket/x", "file:///x", "./mlruns", "mlruns", "sqlite:///")
    for uri in (*local, "postgresql://me:secret@db/x"):
        with pytest.raises(ValueError, match="another database is used through an") as caught:
            tracker_of(uri, tmp_path, "p")
        assert "secret" not in str(caught.value)


def test_a_run_that_mlflow_denies_is_refused_before_it_starts(
    tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-this-one")
    spec = write_sweep(tmp_path, "x", "fixed: {method: zero_shot}\n")
    with failing_server("", ["denied"]) as url:
        code, out, err = command("run", spec, "--store", tmp_path / "runs", "--tracking-uri", url)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "You are not authenticated" in err
    assert "MLFLOW_TRACKING_USERNAME" in err
    assert "not-this-one" not in err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- kills and repeated requests


def create_unfinished(world: World, parent: str, run: ChildRun) -> str:
    """Create a run as a driver that is killed before it writes the status."""
    name = {"trial": "air.slot", "point": "air.point"}[run.kind]
    tags = {"air.kind": run.kind, name: run.id, "mlflow.parentRunId": parent}
    tags |= {"air.digest": run.digest}
    experiment = world.client.get_run(parent).info.experiment_id
    return str(world.client.create_run(experiment, run.started, tags, run.name).info.run_id)


RUNS = pytest.mark.parametrize("run", [a_trial(), a_setting()], ids=["trial", "setting"])


@RUNS
@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_no_run_is_running_after_the_end(file: World, run: ChildRun, status: Any) -> None:
    unfinished = create_unfinished(file, file.open().run.run_id, run)
    file.send(a_trial(seed=7), status=status)
    runs = {each.info.run_id: each.info.status for each in file.runs()}
    assert "RUNNING" not in runs.values()
    assert (runs[file.seen().run.id], runs[unfinished]) == (status, "KILLED")

    file.send(run)  # the trial runs after all
    seen = file.seen()
    assert (seen.trials | seen.settings)[run.id].status == "FINISHED"


@RUNS
def test_a_repeated_request_leaves_one_run(file: World, run: ChildRun) -> None:
    tracker = file.open()
    tracker.send(run)
    create_unfinished(file, tracker.run.run_id, run)
    tags = {"air.kind": "sweep", "air.sweep": "quickstart"}
    file.client.create_run(tracker.experiment, tags=tags)  # as after a lost reply
    file.send(run)
    assert len(file.runs()) == 2
    seen = file.seen()
    (remaining,) = (seen.trials | seen.settings).values()
    assert remaining.status == "FINISHED"


DRIVER = """
import sys
from tests.tracking.test_tracking import World, a_sweep, a_trial
World(sys.argv[1], "drivers").send(a_trial(), sweep=a_sweep(sys.argv[2]))
"""


def test_two_drivers_start_at_the_same_time_and_print_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, uri, name],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    for driver in drivers:
        assert driver.communicate(timeout=TIMEOUT) == ("", "")
        assert driver.returncode == 0
    for name in ("one", "other"):
        assert len(World(uri, "drivers").seen(name).trials) == 1


# Kills the process when it opens a database that has some tables.
KILLED = """
import os, signal, sys
def kill(event, arguments):
    if event == "sqlite3.connect" and os.path.exists(arguments[0]):
        if os.path.getsize(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


def test_a_kill_while_mlflow_creates_its_tables_leaves_no_partial_database(
    tmp_path: Path,
) -> None:
    arguments = (f"sqlite:///{tmp_path}/mlflow.db", "one")
    assert python("-c", KILLED + DRIVER, *arguments, check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".mlflow.db-*"))
    assert not (tmp_path / "mlflow.db").exists()
    python("-c", DRIVER, *arguments)
    assert (tmp_path / "mlflow.db").exists()
    assert not list(tmp_path.glob(".mlflow.db-*"))


def test_later_runs_of_a_process_have_the_same_timeouts(tmp_path, monkeypatch):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    from orchestrator.tracking._runs import connect

    monkeypatch.delenv(RETRIES.name)  # as `airsweep.run` restores the environment
    connect(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlflow.db")
    assert RETRIES.get() == 2
