"""Drivers as users of an MLflow server with logins."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking.database import SERVER_ENVIRONMENT
from tests.helpers.servers import ServerProcess
from tests.helpers.sweeps import TIMEOUT, search_sweep, write_sweep
from tests.helpers.trivial import Trivial

pytestmark = pytest.mark.integration

NAME = "shared"
ENDED = ("trial_done", "trial_reused", "trial_failed")
USERS = """
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class UsersServer(ServerProcess):
    """An MLflow server that requires a login.

    Args:
        folder: folder for its databases, artifacts and log.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "mlflow.log")
        self.folder, self.admin = folder, secrets.token_hex(12)

    def start(self) -> None:
        settings = self.folder / "users.ini"
        settings.write_text(USERS.format(folder=self.folder, password=self.admin))
        words = [
            *("--host", "127.0.0.1", "--port", f"{self.port}", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--serve-artifacts", "--artifacts-destination", f"{self.folder}/artifacts"),
            *("--app-name", "basic-auth", "--allowed-hosts", f"127.0.0.1:{self.port}"),
        ]
        variables = {
            "OMP_NUM_THREADS": "1",
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }
        command = [sys.executable, "-m", "mlflow", "server", *words]
        self._launch(command, os.environ | SERVER_ENVIRONMENT | variables)

    def post(self, path: str, body: Any) -> Any:
        """Post JSON as the administrator and return the JSON of the answer."""
        headers = {"Content-Type": "application/json", **basic("admin", self.admin)}
        content = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def make_user(self, name: str) -> dict[str, str]:
        """Create a user; returns the environment variables of its clients."""
        password = secrets.token_hex(12)
        self.post("api/2.0/mlflow/users/create", {"username": name, "password": password})
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def grant(self, user: str, experiment: str, permission: str) -> None:
        grant = {"username": user, "permission": permission}
        grant |= {"resource_type": "experiment", "resource_id": experiment}
        self.post("api/3.0/mlflow/users/permissions/grant", grant)


def basic(user: str, password: str) -> dict[str, str]:
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[UsersServer]:
    server = UsersServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    """A search with two points."""
    body = search_sweep(drawn_digits).replace("points: 4", "points: 2")
    return write_sweep(tmp_path_factory.mktemp("spec"), NAME, body)


@pytest.fixture(scope="module", autouse=True)
def trivial() -> Iterator[None]:
    """The process in which `run` runs sweeps with trivial trials."""
    global _trivial
    with closing(Trivial()) as _trivial:
        yield


def run(
    spec: Path, store: Path | str, *options: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a sweep with trivial trials."""
    return _trivial.run("run", spec, "--store", store, *options, **more)


def run_ok(spec: Path, store: Path | str, *options: str, **more: str) -> None:
    done = run(spec, store, *options, **more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ada(server) -> dict[str, str]:
    return server.make_user("ada")


@pytest.fixture(scope="module")
def recorded(spec, server, ada) -> Path:
    """The store of a sweep that the user ada ran on the server."""
    store = spec.parent / "recorded"
    run_ok(spec, store, "--set", "project=digits", **ada)
    return store


def runs(server: UsersServer, project: str) -> list[Any]:
    answer = server.post("api/2.0/mlflow/experiments/search", {"max_results": 100})
    experiment = next(e for e in answer["experiments"] if e["name"] == f"air/{project}")
    query = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
    return list(server.post("api/2.0/mlflow/runs/search", query)["runs"])


def tags(run: Any) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def test_a_user_s_sweep_is_tracked_and_the_server_stores_its_files(recorded, server, ada):
    tracked = runs(server, "digits")
    kinds = [tags(run)["air.kind"] for run in tracked]
    assert kinds.count("sweep") == 1
    slots = [tags(run)["air.slot"] for run in tracked if tags(run)["air.kind"] == "trial"]
    event_log = [
        json.loads(line) for line in (recorded / "sweeps" / "digits" / NAME / "events.jsonl").open()
    ]
    assert sorted(slots) == sorted({e["slot"] for e in event_log if e["event"] in ENDED})
    assert {run["info"]["status"] for run in tracked} == {"FINISHED"}
    trial = next(run for run in tracked if tags(run)["air.kind"] == "trial")
    assert trial["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    request = urllib.request.Request(
        f"{server.url}/get-artifact?path=spec.json&run_uuid={trial['info']['run_id']}",
        headers=basic("ada", ada["MLFLOW_TRACKING_PASSWORD"]),
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        assert json.loads(answer.read())["dataset"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "not-this-one"}, "~/.mlflow/credentials"),
        ({"MLFLOW_TRACKING_USERNAME": "nobody"}, "MLFLOW_TRACKING_USERNAME"),
        ({"MLFLOW_TRACKING_URI": "http://localhost:{port}"}, "--allowed-hosts localhost:{port}"),
    ],
)
def test_a_run_that_mlflow_rejects_is_refused_before_it_starts(
    spec, server, ada, tmp_path, change, message
):
    port = server.port
    changed = {name: value.format(port=port) for name, value in change.items()}
    done = run(spec, tmp_path, **{**ada, **changed})
    assert done.returncode == 2
    assert message.format(port=port) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "not-this-one" not in done.stderr
    assert not (tmp_path / "sweeps").exists()


def test_a_user_needs_edit_permission_for_the_project_of_another_user(
    spec, server, recorded, tmp_path
):
    bob = server.make_user("bob")
    mine = ("--set", "project=digits", "--set", "name=of_bob")
    refused = run(spec, tmp_path, *mine, **bob)
    assert refused.returncode == 2
    assert "denies bob access to the experiment air/digits" in refused.stderr
    assert "EDIT" in refused.stderr
    assert not (tmp_path / "sweeps").exists()
    run_ok(spec, tmp_path, "--set", "project=bobs", **bob)  # a new project belongs to bob
    server.grant("bob", runs(server, "digits")[0]["info"]["experiment_id"], "EDIT")
    run_ok(spec, tmp_path, *mine, **bob)
    sweeps = [tags(run) for run in runs(server, "digits") if tags(run)["air.kind"] == "sweep"]
    assert {sweep["air.sweep"] for sweep in sweeps} == {NAME, "of_bob"}
