"""The guarantees of docs/security.md: secrets, untrusted files, terminal output and addresses."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.formatting import show
from orchestrator.redact import HIDDEN, redact
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.servers import MlflowServer
from tests.helpers.sweeps import airsweep, python, write_sweep

WORD = st.text("abcdefgh0123456789_-~!$%", min_size=1, max_size=20)

# ---------------------------------------------------------------- secrets


@given(user=WORD, password=WORD, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_password_in_an_address_is_removed(user, password, before, after):
    secret = f"{password}-geheim"
    text = redact(f"{before} postgresql+psycopg2://{user}:{secret}@db:5432/x {after}")
    assert secret not in text
    assert f"{HIDDEN}@db:5432/x" in text


SECRET_NAMES = """
    DB_PASS DBPASS SMTP_PASS2 MYSQL_PWD REDIS_PASSWD GITHUB_PAT PAT SENTRY_DSN BASIC_AUTH
    REDISCLI_AUTH HTTP_AUTHORIZATION AWS_CREDS BEARER SESSION_COOKIE DJANGO_SECRET FLASK_SESSION_KEY
    PASSWORD_SALT SAS_SIGNATURE OPENAI_APIKEY MINIO_ACCESSKEY SLACK_WEBHOOK_URL DISCORD_WEBHOOK
    AZURE_STORAGE_CONNECTION_STRING SUPABASE_JWT AGE_KEYS AWS_SECRET_ACCESS_KEY PGPASSWORD
    MLFLOW_TRACKING_PASSWORD RAY_AUTH_TOKEN HF_TOKEN WANDB_API_KEY
"""
PLAIN_NAMES = """
    PATH PYTHONPATH OLDPWD PASSTHROUGH_MODE COMPASS_ADDRESS NO_PROXY_BYPASS FILE_PATTERN AUTHOR
    GIT_AUTHOR_EMAIL XAUTHORITY SSH_AUTH_SOCK RAY_AUTH_MODE KEYBOARD MONKEY_ISLAND OAUTHLIB_RELAXED
    DATABASE_URL MLFLOW_TRACKING_URI AUTH_TYPE PATIENCE_EPOCHS COMPATIBILITY RAY_AUTH_TOKEN_PATH
    AWS_ACCESS_KEY_ID TOKENIZERS_PARALLELISM HOSTNAME_OF_THIS
"""


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        *((name, True) for name in SECRET_NAMES.split()),
        *((name, False) for name in PLAIN_NAMES.split()),
    ],
)
def test_the_name_of_a_variable_decides_whether_it_is_a_secret(name, hidden, monkeypatch):
    monkeypatch.setenv(name, "wJalrXUtnFEMI")
    assert (redact("the key is wJalrXUtnFEMI.") == f"the key is {HIDDEN}.") == hidden


def test_a_short_secret_is_not_replaced_in_ordinary_text(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "test")
    assert redact("test/accuracy") == "test/accuracy"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "served", tmp_path / "server.log")
    server.start()
    yield server
    server.stop()


@pytest.mark.integration
def test_no_output_of_a_run_contains_a_secret(server, tmp_path):
    """Every trial fails with a message that contains both kinds of secrets."""
    spec = write_sweep(tmp_path, "leaky", "grid: {method: [zero_shot, fpl]}\nseeds: [1, 2]\n")
    secrets = {"MLFLOW_TRACKING_PASSWORD": "wJalrXUtnFEMI", "HF_TOKEN": "hf_abcdefghijkl"}
    message = "no entry for postgresql://air:pw-of-url@db/x with wJalrXUtnFEMI and hf_abcdefghijkl"
    uri = server.url.replace("http://", "http://me:pw-of-mlflow@")
    words = ("run", spec, "--store", tmp_path / "runs", "--tracking-uri", uri)
    variables = {**secrets, "AIRSWEEP_SAID": message}
    done = airsweep(*words, trivial=True, check=False, **variables)
    server.stop()
    assert done.returncode == 1, done.stderr
    event_log = (tmp_path / "runs" / "sweeps" / "default" / "leaky" / "events.jsonl").read_text()
    failed = [event for event in map(json.loads, event_log.splitlines()) if "message" in event]
    assert failed[-1]["message"] == f"no entry for postgresql://{HIDDEN}@db/x with *** and ***"
    written = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any("mlflow.db" in name and b"no entry for" in data for name, data in written.items())
    written["output"] = (done.stdout + done.stderr).encode()
    for secret in (*secrets.values(), "pw-of-url", "pw-of-mlflow"):
        assert [name for name, data in written.items() if secret.encode() in data] == []


# ---------------------------------------------------------------- terminal output


@given(st.text() | st.text("\x00\x07\x1b\x7f\x9b\r\u2028\u202e\u2066\ud800\n\tü花 "))
def test_printed_text_contains_no_control_characters(text):
    out = io.StringIO()
    show(text, file=out)
    control = {c for c in out.getvalue() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert control == {"\n"}
    assert not {c for c in out.getvalue() if "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"}


def test_a_warning_contains_no_control_characters(monkeypatch):
    from orchestrator.__main__ import main

    monkeypatch.setattr(sys, "argv", ["airsweep", "--version"])
    with pytest.raises(SystemExit):
        main()
    handler = logging.lastResort
    record = logging.makeLogRecord({"msg": "%s is new", "args": ("a\x1b[2J.png",)})
    assert handler.filter(record)
    assert record.getMessage() == r"a\u001b[2J.png is new"


# ---------------------------------------------------------------- paths outside the store


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", "."])
def test_names_that_leave_the_store_are_refused_in_a_location(name, tmp_path):
    """Sweep files and options: `tests/golden/messages/sweep_options.txt`."""
    store = ArtifactStore(tmp_path / "runs")
    for names in ((name, "sweep"), ("default", name)):
        with pytest.raises(ValueError, match="leads to another folder"):
            SweepLocation(store, *names, None)


# ---------------------------------------------------------------- network addresses


def _loopback(address: str) -> bool:
    ip = ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def of_children(facts: Callable[[psutil.Process], list[Any]]) -> list[Any]:
    """Facts about all child processes, without those that end meanwhile."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += facts(child)
    return found


def internet(process: psutil.Process) -> list[Any]:
    return process.net_connections("inet")


@pytest.mark.ray
def test_a_local_cluster_listens_only_on_loopback_and_requires_a_token(ray_session):
    import ray

    listening = {
        connection.laddr.ip
        for connection in (*internet(psutil.Process()), *of_children(internet))
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(map(_loopback, listening)), listening
    script = (
        "import sys; from ray._raylet import GcsClient; "
        "print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))"
    )
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        address = ray.get_runtime_context().gcs_address
        done = python("-c", script, address, check=False, **{"RAY_AUTH_MODE": "token"} | token)
        assert done.returncode != 0, done.stdout


def others_may_enter(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o011 for folder in path.resolve().parents)


@pytest.mark.ray
def test_other_users_cannot_access_files_and_sockets_of_a_local_cluster(ray_session):
    import ray

    sockets = {unix.laddr for unix in of_children(lambda child: child.net_connections("unix"))}
    files = of_children(lambda child: child.open_files())
    opened = {file.path for file in files if file.mode != "r"}
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = set(map(str, session.rglob("*")))
    assert any(path.endswith("sockets/plasma_store") for path in sockets)
    assert any("/logs/" in path for path in opened)
    paths = map(Path, (sockets | opened | written) - {""})
    assert [str(path) for path in paths if path.exists() and others_may_enter(path)] == []
    if os.geteuid() == 0:
        listing = subprocess.run(["ls", session], user=65534, group=65534, capture_output=True)
        assert listing.returncode != 0, listing.stdout


SCRIPT = """
import ray
from orchestrator.cluster import session
from orchestrator.environment import environment

init, seconds = ray.init, ["0", "30"]  # that a start may take: the first one fails

def start(**options):
    with environment({{"RAY_gcs_server_port_wait_time_s": seconds.pop(0)}}):
        init(**options)

ray.init = start
with session.ray_session(keep_logs=lambda: {keep}):
    print(ray._private.worker._global_node.get_session_dir_path())
"""


@pytest.mark.ray
@pytest.mark.parametrize("keep", [False, True])
def test_a_local_cluster_leaves_no_files_behind_but_its_logs_if_a_process_died(keep, tmp_path):
    """Also if the path of the temporary folder is too long for Ray's sockets, and the first start
    fails, as where two take the same port."""
    (tmp_path / ("x" * 100)).mkdir()
    done = python("-c", SCRIPT.format(keep=keep), TMPDIR=tmp_path / ("x" * 100))
    session = Path(done.stdout.strip())
    assert session.parents[1].exists() == keep
    logs = session.parent / "session_latest" / "logs"
    assert (f"Ray's logs are kept in {logs}" in done.stderr) == bool(done.stderr) == keep
    if keep:
        assert any(logs.iterdir())
        shutil.rmtree(session.parents[1])


KILLED = """
import os
import psutil
from orchestrator.cluster import session

with session.ray_session():
    children = [child for daemon in session._daemons() for child in daemon.children(recursive=True)]
    session.kill_local_ray()
    ended, running = psutil.wait_procs(children, timeout=60)
    print(len(ended) > 1, running, flush=True)
    os._exit(0)
"""


@pytest.mark.ray
def test_no_process_of_a_killed_local_cluster_stays():
    assert python("-c", KILLED).stdout == "True []\n"


@pytest.mark.parametrize(("failure_class", "kept"), [("infra", True), ("data", False)])
def test_a_run_keeps_the_logs_of_ray_if_a_process_died(failure_class, kept, tmp_path):
    spec = write_sweep(tmp_path, "fails", "fixed: {method: fpl}\nseeds: [1]\n")
    words = ("run", spec, "--store", tmp_path / "runs", "--tracking-uri", "none")
    variables = {"AIRSWEEP_SAID": "the process died", "AIRSWEEP_FAILS_AS": failure_class}
    done = airsweep(*words, trivial=True, check=False, **variables)
    assert done.returncode == 1, done.stderr
    assert ("Ray's logs are kept" in done.stderr) == kept
