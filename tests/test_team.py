"""MLflow of a team: with users, in Postgres and S3."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sweeps import (
    TIMEOUT,
    environment,
    search_sweep,
    wait_until,
    write_sweep,
)
from tests.helpers.team import IS_INSTALLED, MISSING, Team, basic, shell_environment, team
from tests.helpers.trivial import Trivial

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not IS_INSTALLED, reason=MISSING)]

NAME = "shared"
TRIVIAL = "tests.helpers.trivial"
SHORT = ("--set", "search.points=2")
ENDED = ("trial_done", "trial_reused", "trial_failed")


@pytest.fixture(scope="module")
def services(tmp_path_factory) -> Iterator[Team]:
    with team(tmp_path_factory.mktemp("team")) as running:
        yield running


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    """A search with twelve points in six rounds."""
    body = search_sweep(drawn_digits).replace("points: 4", "points: 12")
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
    """Run a sweep with trivial trials, without tracking unless an option or variable sets it."""
    tracked = {"--tracking-uri", "reconcile"} & {*options} or "MLFLOW_TRACKING_URI" in more
    untracked = () if tracked else ("--tracking-uri", "none")
    return _trivial.run("run", spec, "--store", store, *options, *untracked, **more)


def run_ok(spec: Path, store: Path | str, *options: str, **more: str) -> str:
    """Run a sweep, assert success, and return the output."""
    done = run(spec, store, *options, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ---------------------------------------------------------------- MLflow with users


@pytest.fixture(scope="module")
def ada(services) -> dict[str, str]:
    return services.mlflow.make_user("ada")


@pytest.fixture(scope="module")
def recorded(spec, services, ada) -> Path:
    """The store of a sweep that the user ada ran with the team's services."""
    store = spec.parent / "recorded"
    output = run_ok(spec, store, "--set", "project=digits", *SHORT, **ada)
    (spec.parent / "output.txt").write_text(output)
    return store


def runs(services: Team, project: str) -> list[Any]:
    answer = services.mlflow.post("api/2.0/mlflow/experiments/search", {"max_results": 100})
    experiment = next(e for e in answer["experiments"] if e["name"] == f"air/{project}")
    query = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
    return list(services.mlflow.post("api/2.0/mlflow/runs/search", query)["runs"])


def tags(run: Any) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def test_a_user_s_sweep_is_tracked_and_the_server_stores_its_files(recorded, services, ada):
    tracked = runs(services, "digits")
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
        f"{services.mlflow.url}/get-artifact?path=spec.json&run_uuid={trial['info']['run_id']}",
        headers={"Authorization": basic("ada", ada["MLFLOW_TRACKING_PASSWORD"])},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        assert json.loads(answer.read())["dataset"]


def test_no_file_database_or_output_contains_a_password(recorded, spec, services, ada):
    passwords = [*services.secrets, ada["MLFLOW_TRACKING_PASSWORD"]]
    paths = [*recorded.rglob("*"), spec.parent / "output.txt"]
    files = [path for path in paths if path.is_file()]
    assert len(files) > 20
    for path in [*files, services.mlflow.log]:
        content = path.read_bytes()
        assert not [secret for secret in passwords if secret.encode() in content], path
    for table, text in services.postgres.dump("mlflow").items():
        assert not [secret for secret in passwords if secret in text], table
    for name, content in services.s3.objects("mlflow").items():
        assert not [secret for secret in passwords if secret.encode() in content], name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "not-this-one"}, "~/.mlflow/credentials"),
        ({"MLFLOW_TRACKING_USERNAME": "nobody"}, "MLFLOW_TRACKING_USERNAME"),
        ({"MLFLOW_TRACKING_URI": "http://localhost:{port}"}, "--allowed-hosts localhost:{port}"),
    ],
)
def test_a_run_that_mlflow_rejects_is_refused_before_it_starts(
    spec, services, ada, tmp_path, change, message
):
    port = services.mlflow.port
    changed = {name: value.format(port=port) for name, value in change.items()}
    done = run(spec, tmp_path, **{**ada, **changed})
    assert done.returncode == 2
    assert message.format(port=port) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "not-this-one" not in done.stderr
    assert not (tmp_path / "sweeps").exists()


def test_a_user_needs_edit_permission_for_the_project_of_another_user(
    spec, services, recorded, tmp_path
):
    bob = services.mlflow.make_user("bob")
    mine = ("--set", "project=digits", "--set", "name=of_bob", *SHORT)
    refused = run(spec, tmp_path, *mine, **bob)
    assert refused.returncode == 2
    assert "denies bob access to the experiment air/digits" in refused.stderr
    assert "EDIT" in refused.stderr
    assert not (tmp_path / "sweeps").exists()
    run_ok(spec, tmp_path, "--set", "project=bobs", *SHORT, **bob)  # a new project belongs to bob
    services.mlflow.grant("bob", runs(services, "digits")[0]["info"]["experiment_id"], "EDIT")
    run_ok(spec, tmp_path, *mine, **bob)
    sweeps = [tags(run) for run in runs(services, "digits") if tags(run)["air.kind"] == "sweep"]
    assert {sweep["air.sweep"] for sweep in sweeps} == {NAME, "of_bob"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_the_documented_script_makes_users_and_changes_the_first_password(spec, services, tmp_path):
    mlflow = services.mlflow
    first, grace = mlflow.admin, secrets.token_hex(12)
    mlflow.admin = secrets.token_hex(12)
    netrc = mlflow.folder / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login admin password {first}\n")
    words = {"NAME": "grace", "PASSWORD": grace, "PROJECT": "flowers"}
    words |= {"FIRST": first, "NEXT": mlflow.admin, "MLFLOW_TRACKING_URI": mlflow.url}
    made = subprocess.run(
        ["bash", "users.sh"], cwd=mlflow.folder, env={**shell_environment(), **words}, check=False
    )
    assert made.returncode == 0
    login = {"MLFLOW_TRACKING_USERNAME": "grace", "MLFLOW_TRACKING_PASSWORD": grace}
    target = {"MLFLOW_TRACKING_URI": mlflow.url, "AIRSWEEP_PROJECT": "flowers"}
    run_ok(spec, tmp_path, *SHORT, **login, **target)
    assert runs(services, "flowers")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        mlflow.post("api/2.0/mlflow/experiments/search", {"max_results": 1}, "admin", first)


# ---------------------------------------------------------------- many drivers


MANY = """
grid: {{method: [zero_shot, air_fpl]}}
fixed: {{generator: "folder:{folder}", generation.block: 8, train.steps: 20}}
search:
  points: 3
  width: 2
  space:
    images_per_class: {{values: [4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [{seed}]
"""
DRIVERS, PROJECTS = 6, ("north", "south")


def test_six_drivers_at_the_same_time_track_every_trial_once(services, drawn_digits, tmp_path):
    """Each driver runs a different sweep; all use one store and the team's services."""
    gate, store = tmp_path / "gate", tmp_path / "runs"
    gate.mkdir()
    experiments = {name: services.mlflow.make_experiment(f"air/{name}") for name in PROJECTS}
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # as in docs/tracking.md
        "AIRSWEEP_GATE": str(gate),
        "AIRSWEEP_TRIAL_SECONDS": "0.1",
    }
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for number in range(DRIVERS):
            project = PROJECTS[number % 2]
            user = services.mlflow.make_user(f"user{number}")
            services.mlflow.grant(f"user{number}", experiments[project], "EDIT")
            body = MANY.format(folder=drawn_digits, seed=number + 1)
            spec = write_sweep(tmp_path, f"sweep{number}", f"project: {project}\n{body}")
            log = stack.enter_context((tmp_path / f"driver{number}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", TRIVIAL, "run", spec, "--store", store],
                env=environment(**variables, **user),
                stdout=log,
                stderr=log,
            )
            stack.callback(process.kill)
            running.append(process)

        def logs() -> list[str]:
            return [file.read_text() for file in sorted(tmp_path.glob("driver*.log"))]

        def are_ready() -> bool:
            assert all(process.poll() is None for process in running), logs()
            return len(list(gate.iterdir())) == DRIVERS

        wait_until(are_ready, logs)
        (gate / "open").touch()
        wait_until(lambda: all(process.poll() is not None for process in running), logs, every=0.2)
    assert [process.returncode for process in running] == [0] * DRIVERS, logs()

    tracked: Counter[tuple[str, str]] = Counter()
    for tracked_run in (run for project in PROJECTS for run in runs(services, project)):
        run_tags = tags(tracked_run)
        assert tracked_run["info"]["status"] == "FINISHED"
        if run_tags["air.kind"] in ("sweep", "trial"):
            tracked[run_tags["air.sweep"], run_tags.get("air.slot", "")] += 1
    expected: set[tuple[str, str]] = set()
    for file in (store / "sweeps").glob("*/*/events.jsonl"):
        ended = [e for e in map(json.loads, file.open()) if e["event"] in ENDED]
        expected |= {(file.parent.name, slot) for slot in ("", *(e["slot"] for e in ended))}
    assert tracked == Counter(expected)
    assert len(expected) == DRIVERS * (1 + 1 + 3)
