"""What a team shares: studies in Postgres, an MLflow with users, files that the server keeps."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import free_port
from tests.helpers.sweeps import (
    TIMEOUT,
    count,
    environment,
    events,
    search_sweep,
    wait_until,
    write_sweep,
)
from tests.helpers.team import HERE, MISSING, Team, basic, reader, team
from tests.helpers.trivial import Trivial

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not HERE, reason=MISSING)]

NAME = "shared"
SHORT = ("--set", "search.points=2")
ENDED = ("trial_done", "trial_reused", "trial_failed", "trial_pruned")


@pytest.fixture(scope="module")
def services(tmp_path_factory) -> Iterator[Team]:
    with team(tmp_path_factory.mktemp("team")) as running:
        yield running


@pytest.fixture(scope="module")
def spec(tmp_path_factory, drawn_digits) -> Path:
    """A search of twelve points in six rounds."""
    body = search_sweep(drawn_digits).replace("points: 4", "points: 12")
    return write_sweep(tmp_path_factory.mktemp("spec"), NAME, body)


def command(spec: Path, store: Path | str, *options: str) -> list[str]:
    start = [sys.executable, "-m", "tests.helpers.trivial", "run", str(spec), "--store", str(store)]
    return [*start, *options]


@pytest.fixture(scope="module", autouse=True)
def trivial() -> Iterator[None]:
    """What `run` starts."""
    global _trivial
    with closing(Trivial()) as _trivial:
        yield


def run(
    spec: Path, store: Path | str, *options: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """A sweep whose trials take no time, untracked unless asked for."""
    tracked = {"--tracking-uri", "reconcile"} & {*options} or "MLFLOW_TRACKING_URI" in more
    untracked = () if tracked else ("--tracking-uri", "none")
    return _trivial.run("run", spec, "--store", store, *options, *untracked, **more)


def ran(spec: Path, store: Path | str, *options: str, **more: str) -> str:
    """The same, where it must end well; what it printed."""
    done = run(spec, store, *options, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def on_postgres(services: Team, uri: str | None = None) -> tuple[str, str]:
    return "--set", f"search.storage={uri or services.studies}"


def password(services: Team) -> dict[str, str]:
    return {"PGPASSWORD": services.passwords["airsweep_studies"]}


def outcomes(store: Path) -> dict[str, tuple[str, str]]:
    """State and key by slot: what was asked for at each point."""
    return {e["slot"]: (e["event"], e["key"]) for e in events(store, NAME) if e["event"] in ENDED}


def told(store: Path) -> list[Any]:
    """Rounds with their objectives."""
    found = [e for e in events(store, NAME) if e["event"] == "round_told"]
    return [(event["cell"], event["values"]) for event in found]


def asked(store: Path) -> list[Any]:
    found = [e for e in events(store, NAME) if e["event"] == "point_asked"]
    return [(event["study"], event["point"], event["params"]) for event in found]


@pytest.fixture(scope="module")
def calm(spec) -> Path:
    """The store of an undisturbed run with studies in the journal."""
    store = spec.parent / "calm"
    ran(spec, store)
    assert len(asked(store)) == 12
    return store


# ---------------------------------------------------------------- studies


def test_a_search_in_postgres_asks_and_tells_what_one_in_the_journal_does(
    spec, calm, services, tmp_path
):
    ran(spec, tmp_path, *on_postgres(services), **password(services))
    assert asked(tmp_path) == asked(calm)
    assert told(tmp_path) == told(calm)
    assert outcomes(tmp_path) == outcomes(calm)
    assert not (tmp_path / "sweeps" / "default" / NAME / "studies.journal").exists()
    assert services.postgres.connections_of("airsweep_studies") == 0
    query = "SELECT count(*) FROM studies WHERE study_name LIKE 'default/shared/%'"
    assert services.postgres.ask(query, "airsweep_studies") == [(1,)]


def test_sweeps_of_the_same_name_do_not_meet_in_one_database(spec, services, tmp_path):
    for store in ("ours", "theirs"):
        ran(spec, tmp_path / store, *on_postgres(services), **password(services))
    assert asked(tmp_path / "ours") == asked(tmp_path / "theirs")
    names = {e["name"] for s in ("ours", "theirs") for e in named(tmp_path / s)}
    assert len(names) == 2


def named(store: Path) -> list[dict[str, Any]]:
    return [e for e in events(store, NAME) if e["event"] == "studies_named"]


def test_drivers_that_start_together_in_an_empty_database_all_find_its_tables(
    services, monkeypatch
):
    from orchestrator.planning.search import open_database

    monkeypatch.setenv("PGPASSWORD", services.postgres.make_database("fresh_studies"))
    uri = services.postgres.uri("fresh_studies")
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(open_database, [uri] * 8))
    assert len(opened) == 8


def test_a_wrong_password_for_the_studies_is_bad_input_and_a_dead_server_is_refused(
    spec, services, tmp_path
):
    wrong = run(spec, tmp_path, *on_postgres(services), PGPASSWORD="not-this-one")
    assert wrong.returncode == 2
    assert "rejects the login" in wrong.stderr
    assert "PGPASSWORD" in wrong.stderr
    assert "not-this-one" not in wrong.stderr
    dead = f"postgresql://ada@127.0.0.1:{free_port()}/studies"
    away = run(spec, tmp_path, *on_postgres(services, dead))
    assert away.returncode == 3
    assert "is unreachable" in away.stderr
    assert {len(done.stderr.splitlines()) for done in (wrong, away)} == {1}
    assert not (tmp_path / "sweeps").exists()


def test_a_search_goes_on_without_its_database_and_later_copies_what_is_missing(
    spec, calm, services, tmp_path
):
    options = (*on_postgres(services), "--tracking-uri", "none")
    process = subprocess.Popen(
        command(spec, tmp_path, *options),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(**password(services)),
    )

    def has_told() -> bool:
        assert process.poll() is None
        return count(events(tmp_path, NAME), "round_told") > 0

    wait_until(has_told, every=0.01)
    process.send_signal(signal.SIGSTOP)
    services.postgres.kill()
    process.send_signal(signal.SIGCONT)
    try:
        _, said = process.communicate(timeout=TIMEOUT)
    finally:
        services.postgres.start()
    assert process.returncode == 0, said
    assert "is unreachable" in said
    assert asked(tmp_path) == asked(calm)
    ran(spec, tmp_path, *options, "--set", "search.points=13", **password(services))
    [name] = [event["name"] for event in named(tmp_path)]
    trials = "SELECT count(*) FROM trials JOIN studies USING (study_id)"
    query = f"{trials} WHERE study_name LIKE '{name}/%'"
    assert services.postgres.ask(query, "airsweep_studies") == [(13,)]


# ---------------------------------------------------------------- MLflow with users


@pytest.fixture(scope="module")
def ada(services) -> dict[str, str]:
    return services.mlflow.make_user("ada")


@pytest.fixture(scope="module")
def recorded(spec, services, ada) -> Path:
    """The store of a sweep of ada's, told to the team's server with files, as she would."""
    store = spec.parent / "recorded"
    options = (*on_postgres(services), "--set", "project=digits", *SHORT)
    said = ran(spec, store, *options, **password(services), **ada)
    (spec.parent / "said.txt").write_text(said)
    return store


def runs(services: Team, project: str) -> list[Any]:
    found = services.mlflow.post("api/2.0/mlflow/experiments/search", {"max_results": 100})
    experiment = next(e for e in found["experiments"] if e["name"] == f"air/{project}")
    asked = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
    return list(services.mlflow.post("api/2.0/mlflow/runs/search", asked)["runs"])


def tags(run: Any) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def test_a_sweep_is_recorded_through_login_with_files_that_the_server_keeps(
    recorded, services, ada
):
    found = runs(services, "digits")
    kinds = [tags(run)["air.kind"] for run in found]
    assert kinds.count("sweep") == 1
    slots = [tags(run)["air.slot"] for run in found if tags(run)["air.kind"] == "trial"]
    event_log = [
        json.loads(line) for line in (recorded / "sweeps" / "digits" / NAME / "events.jsonl").open()
    ]
    assert sorted(slots) == sorted({e["slot"] for e in event_log if e["event"] in ENDED})
    assert {run["info"]["status"] for run in found} == {"FINISHED"}
    trial = next(run for run in found if tags(run)["air.kind"] == "trial")
    assert trial["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    request = urllib.request.Request(
        f"{services.mlflow.url}/get-artifact?path=spec.json&run_uuid={trial['info']['run_id']}",
        headers={"Authorization": basic("ada", ada["MLFLOW_TRACKING_PASSWORD"])},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        assert json.loads(answer.read())["dataset"]


def test_no_password_is_left_anywhere(recorded, spec, services, ada):
    words = [*services.secrets, ada["MLFLOW_TRACKING_PASSWORD"]]
    left = [path for path in [*recorded.rglob("*"), spec.parent / "said.txt"] if path.is_file()]
    assert len(left) > 20
    for path in [*left, services.mlflow.log]:
        content = path.read_bytes()
        assert not [word for word in words if word.encode() in content], path
    for database in ("mlflow", "airsweep_studies"):
        for table, text in services.postgres.dump(database).items():
            assert not [word for word in words if word in text], (database, table)
    for name, content in services.s3.objects("mlflow").items():
        assert not [word for word in words if word.encode() in content], name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "not-this-one"}, "~/.mlflow/credentials"),
        ({"MLFLOW_TRACKING_USERNAME": "nobody"}, "MLFLOW_TRACKING_USERNAME"),
        ({"MLFLOW_TRACKING_URI": "http://localhost:{port}"}, "--allowed-hosts localhost:{port}"),
    ],
)
def test_who_is_not_let_in_is_told_before_anything_starts(
    spec, services, ada, tmp_path, change, says
):
    port = services.mlflow.port
    changed = {name: value.format(port=port) for name, value in change.items()}
    done = run(spec, tmp_path, **{**ada, **changed})
    assert done.returncode == 2
    assert says.format(port=port) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "not-this-one" not in done.stderr
    assert not (tmp_path / "sweeps").exists()


def test_who_may_only_read_a_project_is_told_and_who_is_granted_may_write(
    spec, services, recorded, tmp_path
):
    bob = services.mlflow.make_user("bob")
    mine = ("--set", "project=digits", "--set", "name=of_bob", *SHORT)
    refused = run(spec, tmp_path, *mine, **bob)
    assert refused.returncode == 2
    assert "does not let bob use the experiment air/digits" in refused.stderr
    assert "EDIT" in refused.stderr
    assert not (tmp_path / "sweeps").exists()
    ran(spec, tmp_path, "--set", "project=bobs", *SHORT, **bob)  # what one makes is one's own
    services.mlflow.grant("bob", runs(services, "digits")[0]["info"]["experiment_id"], "EDIT")
    ran(spec, tmp_path, *mine, **bob)
    sweeps = [tags(run) for run in runs(services, "digits") if tags(run)["air.kind"] == "sweep"]
    assert {of["air.sweep"] for of in sweeps} == {NAME, "of_bob"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_an_administrator_makes_users_and_changes_the_first_password_as_the_page_says(
    spec, services, tmp_path
):
    mlflow = services.mlflow
    first, grace = mlflow.admin, secrets.token_hex(12)
    mlflow.admin = secrets.token_hex(12)
    netrc = mlflow.folder / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login admin password {first}\n")
    words = {"NAME": "grace", "PASSWORD": grace, "PROJECT": "flowers"}
    words |= {"FIRST": first, "NEXT": mlflow.admin, "MLFLOW_TRACKING_URI": mlflow.url}
    made = subprocess.run(
        ["bash", "users.sh"], cwd=mlflow.folder, env={**reader(), **words}, check=False
    )
    assert made.returncode == 0
    hers = {"MLFLOW_TRACKING_USERNAME": "grace", "MLFLOW_TRACKING_PASSWORD": grace}
    where = {"MLFLOW_TRACKING_URI": mlflow.url, "AIRSWEEP_PROJECT": "flowers"}
    ran(spec, tmp_path, *SHORT, **hers, **where)
    assert runs(services, "flowers")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        mlflow.post("api/2.0/mlflow/experiments/search", {"max_results": 1}, "admin", first)


# ---------------------------------------------------------------- many at once


MANY = """
grid: {{method: [zero_shot, air_fpl]}}
fixed: {{generator: "folder:{folder}", generation.block: 8, train.steps: 20}}
search:
  points: 3
  width: 2
  storage: {studies}
  space:
    images_per_class: {{values: [4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [{seed}]
"""
DRIVERS, PROJECTS = 6, ("north", "south")


def test_six_drivers_at_once_lose_nothing(services, drawn_digits, tmp_path):
    """Each with a sweep of its own, all on one store and the team's services."""
    gate, store = tmp_path / "gate", tmp_path / "runs"
    gate.mkdir()
    experiments = {name: services.mlflow.make_experiment(f"air/{name}") for name in PROJECTS}
    variables = {
        **password(services),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # as docs/tracking.md says
        "AIRSWEEP_GATE": str(gate),
        "AIRSWEEP_TRIAL_SECONDS": "0.1",
    }
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for number in range(DRIVERS):
            project = PROJECTS[number % 2]
            user = services.mlflow.make_user(f"user{number}")
            services.mlflow.grant(f"user{number}", experiments[project], "EDIT")
            body = MANY.format(folder=drawn_digits, studies=services.studies, seed=number + 1)
            spec = write_sweep(tmp_path, f"sweep{number}", f"project: {project}\n{body}")
            log = stack.enter_context((tmp_path / f"driver{number}.log").open("wb"))
            process = subprocess.Popen(
                command(spec, store), env=environment(**variables, **user), stdout=log, stderr=log
            )
            stack.callback(process.kill)
            running.append(process)

        def logs() -> list[str]:
            return [file.read_text() for file in sorted(tmp_path.glob("driver*.log"))]

        def could_begin() -> bool:
            assert all(process.poll() is None for process in running), logs()
            return len(list(gate.iterdir())) == DRIVERS

        wait_until(could_begin, logs)
        (gate / "open").touch()
        wait_until(lambda: all(process.poll() is not None for process in running), logs, every=0.2)
    assert [process.returncode for process in running] == [0] * DRIVERS, logs()

    told: Counter[tuple[str, str]] = Counter()
    for run_of_a_project in (run for project in PROJECTS for run in runs(services, project)):
        found = tags(run_of_a_project)
        assert run_of_a_project["info"]["status"] == "FINISHED"
        if found["air.kind"] in ("sweep", "trial"):
            told[found["air.sweep"], found.get("air.slot", "")] += 1
    expected: set[tuple[str, str]] = set()
    for file in (store / "sweeps").glob("*/*/events.jsonl"):
        ended = [e for e in map(json.loads, file.open()) if e["event"] in ENDED]
        expected |= {(file.parent.name, slot) for slot in ("", *(e["slot"] for e in ended))}
    assert told == Counter(expected)
    assert len(expected) == DRIVERS * (1 + 1 + 3)
