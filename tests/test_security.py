"""What docs/security.md promises: secrets that do not stay, files that run no code, addresses."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from air_core.diffusion.pipeline import load_pipeline
from orchestrator.errors import Refused
from orchestrator.formatting import show
from orchestrator.redact import HIDDEN, redacted
from orchestrator.spec import SpecError, load_sweep
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.servers import MlflowServer
from tests.helpers.sweeps import TIMEOUT, airsweep, environment, write_sweep

ROOT = Path(__file__).parents[1]
WORD = st.text("abcdefgh0123456789_-~!$%", min_size=1, max_size=20)

# ---------------------------------------------------------------- secrets


@given(user=WORD, password=WORD, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_password_in_an_address_is_nowhere_in_what_is_left(user, password, before, after):
    secret = f"{password}-geheim"
    said = redacted(f"{before} postgresql+psycopg2://{user}:{secret}@db:5432/x {after}")
    assert secret not in said
    assert f"{HIDDEN}@db:5432/x" in said


SECRET_NAMES = """
    DB_PASS DBPASS SMTP_PASS2 MYSQL_PWD REDIS_PASSWD GITHUB_PAT PAT SENTRY_DSN BASIC_AUTH
    REDISCLI_AUTH HTTP_AUTHORIZATION AWS_CREDS BEARER SESSION_COOKIE DJANGO_SECRET FLASK_SESSION_KEY
    PASSWORD_SALT SAS_SIGNATURE OPENAI_APIKEY MINIO_ACCESSKEY SLACK_WEBHOOK_URL DISCORD_WEBHOOK
    AZURE_STORAGE_CONNECTION_STRING SUPABASE_JWT AGE_KEYS
"""
PLAIN_NAMES = """
    PATH PYTHONPATH OLDPWD PASSTHROUGH_MODE COMPASS_ADDRESS NO_PROXY_BYPASS FILE_PATTERN AUTHOR
    GIT_AUTHOR_EMAIL XAUTHORITY SSH_AUTH_SOCK RAY_AUTH_MODE KEYBOARD MONKEY_ISLAND OAUTHLIB_RELAXED
    DATABASE_URL MLFLOW_TRACKING_URI AUTH_TYPE PATIENCE_EPOCHS COMPATIBILITY
"""


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("PGPASSWORD", True),
        ("RAY_AUTH_TOKEN", True),
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        *((name, True) for name in SECRET_NAMES.split()),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("AWS_ACCESS_KEY_ID", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("HOSTNAME_OF_THIS", False),
        *((name, False) for name in PLAIN_NAMES.split()),
    ],
)
def test_a_variable_is_a_secret_by_its_name(name, hidden, monkeypatch):
    monkeypatch.setenv(name, "wJalrXUtnFEMI")
    assert (redacted("it said wJalrXUtnFEMI.") == f"it said {HIDDEN}.") == hidden


LONG = 1_000_000
HOSTILE = {
    "a word": "a" * LONG,
    "schemes": "a://" * LONG,
    "users": "a://b" * LONG,
    "passwords": "a://b:c" * LONG,
    "colons": "a://" + "b:" * LONG,
    "signs": "a://b:" + "@" * LONG + "/",
    "a user": "a://" + "b" * LONG,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_long_text_is_redacted_in_time_that_grows_with_its_length(text):
    """Of quadratic time a million characters take hours."""
    read = "import sys; from orchestrator.redact import *; text = sys.stdin.read(); "
    subprocess.run(
        [sys.executable, "-c", read + "redacted(text); password_at(text)"],
        input=text,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT,
        check=True,
    )


def test_a_short_secret_blots_out_no_plain_words(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "test")
    assert redacted("test/accuracy") == "test/accuracy"


@pytest.mark.parametrize(
    "line",
    [
        'tracking: {uri: "http://me:geheim@mlflow:5000"}',
        "# as in http://me:geheim@mlflow:5000",
    ],
)
def test_a_sweep_file_with_a_password_is_refused_where_it_stands(line, tmp_path):
    spec = write_sweep(tmp_path, "leaky", f"fixed: {{method: fpl}}\nseeds: [1]\n{line}\n")
    with pytest.raises(SpecError) as told:
        load_sweep(spec)
    column = line.index("http") + 1
    assert str(told.value).startswith(f"{spec}:5:{column}: ")
    assert "MLFLOW_TRACKING_PASSWORD" in str(told.value)
    assert "geheim" not in str(told.value)


def test_an_option_with_a_password_is_refused_without_it(tmp_path):
    spec = write_sweep(tmp_path, "leaky", "fixed: {method: fpl}\nseeds: [1]\n")
    with pytest.raises(SpecError) as told:
        load_sweep(spec, sets=["tracking.uri=http://me:geheim@mlflow:5000"])
    assert str(told.value).startswith("--set tracking.uri: ")
    assert "geheim" not in str(told.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "served", tmp_path / "server.log")
    server.start()
    yield server
    server.stop()


@pytest.mark.integration
def test_nothing_that_a_run_leaves_or_says_holds_a_secret(server, tmp_path):
    """All its trials fail of something that has both kinds of secret in its words."""
    spec = write_sweep(tmp_path, "leaky", "grid: {method: [zero_shot, fpl]}\nseeds: [1, 2]\n")
    secrets = {"TEAM_DB_PASSWORD": "wJalrXUtnFEMI", "HF_TOKEN": "hf_abcdefghijkl"}
    said = "no entry for postgresql://air:pw-of-url@db/x with wJalrXUtnFEMI and hf_abcdefghijkl"
    uri = server.url.replace("http://", "http://me:pw-of-mlflow@")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.helpers.trivial", "run", str(spec)),
            *("--store", str(tmp_path / "runs"), "--tracking-uri", uri),
        ],
        capture_output=True,
        text=True,
        env=environment(**secrets, AIRSWEEP_SAID=said),
        cwd=ROOT,
        timeout=TIMEOUT,
        check=False,
    )
    server.stop()
    assert done.returncode == 1, done.stderr
    event_log = (tmp_path / "runs" / "sweeps" / "default" / "leaky" / "events.jsonl").read_text()
    failed = [event for event in map(json.loads, event_log.splitlines()) if "message" in event]
    assert failed[-1]["message"] == f"no entry for postgresql://{HIDDEN}@db/x with *** and ***"
    left = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any("mlflow.db" in name and b"no entry for" in data for name, data in left.items())
    left["output"] = (done.stdout + done.stderr).encode()
    for secret in (*secrets.values(), "pw-of-url", "pw-of-mlflow"):
        assert [name for name, data in left.items() if secret.encode() in data] == []


# ---------------------------------------------------------------- files that run no code

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
READS_CODE = {"read_pickle", "unsafe_load", "full_load"}


def _dangers(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (one.name for one in names if one.name.split(".")[0] in PICKLES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in RUNS_CODE:
                yield name
            case ast.Call(func=ast.Attribute(value=owner, attr=name), keywords=given):
                whole, said = f"{ast.unparse(owner)}.{name}", [ast.unparse(one) for one in given]
                careless = whole == "torch.load" and "weights_only=True" not in said
                if name in READS_CODE or careless or "allow_pickle=True" in said:
                    yield whole


def test_no_file_is_read_that_could_run_code():
    found = {
        f"{file.relative_to(ROOT)}: {danger}"
        for package in ("air_core", "orchestrator")
        for file in (ROOT / package).rglob("*.py")
        for danger in _dangers(file)
    }
    assert found == set()


def test_the_search_for_such_readers_finds_them(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import pickle, joblib\nfrom cloudpickle import loads\ntorch.load('x')\n"
        "torch.load('x', weights_only=True)\nnp.load('x')\nnp.load('x', allow_pickle=True)\n"
        "eval('1')\npd.read_pickle('x')\nre.compile('x')\n"
    )
    assert sorted(_dangers(file)) == [
        *("cloudpickle", "eval", "joblib", "np.load", "pd.read_pickle", "pickle", "torch.load")
    ]


EVIL = "open({place!r}, 'w').close()\nclass Evil: pass\n"


@pytest.mark.parametrize("part", ["the pipeline", "unet"])
def test_a_model_that_brings_code_is_not_run(part, tmp_path):
    """As diffusers would with trust_remote_code, which is never given."""
    model = Path(
        shutil.copytree(ROOT / "air_core" / "tiny" / "weights" / "diffusion", tmp_path / "m")
    )
    index = json.loads((model / "model_index.json").read_text())
    ran = tmp_path / "ran"
    if part == "unet":
        index[part] = ["evil", "Evil"]
        (model / part / "evil.py").write_text(EVIL.format(location=str(ran)))
    else:
        index["_class_name"] = ["evil", "Evil"]
        (model / "evil.py").write_text(EVIL.format(location=str(ran)))
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(Exception) as told:  # noqa: PT011  (each version has its own)
        load_pipeline(model)
    assert "evil" in str(told.value).lower() or "trust_remote_code" in str(told.value)
    assert not ran.exists()


# ---------------------------------------------------------------- names from outside

PRINTS = {"print", "sys.stdout.write", "sys.stderr.write"}
MAY_PRINT = {
    "orchestrator/formatting.py",  # which escapes control characters
    "orchestrator/cli/submit.py",  # the log of a job, which airsweep has written over there
}


def test_all_that_is_printed_goes_through_what_escapes_control_characters():
    found = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "orchestrator").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTS
    }
    assert found == MAY_PRINT


@given(st.text() | st.text("\x00\x07\x1b\x7f\x9b\r\u2028\u202e\u2066\ud800\n\tü花 "))
def test_what_is_printed_does_not_steer_a_terminal(text):
    out = io.StringIO()
    show(text, file=out)
    steering = {c for c in out.getvalue() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert steering == {"\n"}
    assert not {c for c in out.getvalue() if "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"}


def test_a_warning_does_not_steer_the_terminal_either(capsys, monkeypatch):
    from orchestrator.__main__ import main

    monkeypatch.setattr(sys, "argv", ["airsweep", "--version"])
    with pytest.raises(SystemExit):
        main()
    handler = logging.lastResort
    assert handler is not None
    record = logging.makeLogRecord({"msg": "%s is new", "args": ("a\x1b[2J.png",)})
    assert handler.filter(record)
    assert record.getMessage() == r"a\u001b[2J.png is new"


# ---------------------------------------------------------------- ways out of a folder


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "", "."])
def test_no_name_of_a_project_or_a_sweep_leads_out_of_the_store(name, tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path / "runs")
    with pytest.raises(ValueError, match="way to another folder"):
        SweepLocation(store, name, "sweep", None)
    with pytest.raises(ValueError, match="way to another folder"):
        SweepLocation(store, "default", name, None)


@pytest.mark.parametrize("key", ["name", "project"])
@pytest.mark.parametrize("value", ["..", "../x", "a/b", "/etc", ".hidden"])
def test_nor_does_one_in_a_sweep_file(key, value, tmp_path):
    text = f"version: 1\nname: fine\nfixed: {{method: fpl}}\nseeds: [1]\n{key}: {value!r}\n"
    file = tmp_path / "fine.yaml"
    file.write_text(text.replace("name: fine\n", "") if key == "name" else text)
    with pytest.raises(SpecError, match=f":.*{key}"):
        load_sweep(file)


# ---------------------------------------------------------------- who listens where


def _loopback(address: str) -> bool:
    found = ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone_and_wants_a_token(ray_session):
    import ray

    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        one.laddr.ip
        for process in family
        for one in process.net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(map(_loopback, listening)), listening
    ask = (
        "import sys; from ray._raylet import GcsClient; "
        "print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))"
    )
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        stranger = {**os.environ, "RAY_AUTH_MODE": "token", **token}
        done = subprocess.run(
            [sys.executable, "-c", ask, ray.get_runtime_context().gcs_address],
            capture_output=True,
            text=True,
            env=stranger,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode != 0, done.stdout


def others_may_enter(path: Path) -> bool:
    return all(one.stat().st_mode & 0o011 for one in path.resolve().parents)


@pytest.mark.ray
def test_no_file_or_socket_of_a_local_cluster_can_be_reached_by_another_user(ray_session):
    import ray

    family = psutil.Process().children(recursive=True)
    sockets = {one.laddr for process in family for one in process.net_connections("unix")}
    files = [file for process in family for file in process.open_files()]
    opened = {file.path for file in files if file.mode != "r"}
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = set(map(str, session.rglob("*")))
    assert any(path.endswith("sockets/plasma_store") for path in sockets)
    assert any("/logs/" in path for path in opened)
    paths = map(Path, (sockets | opened | written) - {""})
    assert [str(path) for path in paths if path.exists() and others_may_enter(path)] == []
    if os.geteuid() == 0:
        look = subprocess.run(["ls", session], user=65534, group=65534, capture_output=True)
        assert look.returncode != 0, look.stdout


STARTED = """
import ray
from orchestrator.cluster import (session)

with session.ray_session(keep_logs=lambda: {keep}):
    print(ray._private.worker._global_node.get_session_dir_path())
"""


def started(keep: bool = False, **known: object) -> tuple[Path, str]:
    """A local Ray that has ended: the folder of its session, and what was on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED.format(keep=keep)],
        capture_output=True,
        text=True,
        env=environment(**known),
        cwd=ROOT,
        timeout=TIMEOUT,
        check=True,
    )
    return Path(done.stdout.strip()), done.stderr


@pytest.mark.ray
def test_a_local_cluster_leaves_no_files_behind(tmp_path):
    """Also where the folder for temporary files has a name too long for Ray's sockets."""
    (tmp_path / ("x" * 100)).mkdir()
    session, said = started(TMPDIR=tmp_path / ("x" * 100))
    assert not session.parents[1].exists()
    assert said == ""


@pytest.mark.ray
def test_logs_of_a_local_cluster_are_kept_where_a_process_died():
    session, said = started(keep=True)
    logs = session.parent / "session_latest" / "logs"
    assert f"Ray's logs are kept in {logs}" in said
    assert any(logs.iterdir())
    shutil.rmtree(session.parents[1])


@pytest.mark.parametrize(("failure_class", "kept"), [("infra", True), ("data", False)])
def test_logs_of_ray_are_kept_by_a_run_with_a_process_that_died(failure_class, kept, tmp_path):
    spec = write_sweep(tmp_path, "fails", "fixed: {method: fpl}\nseeds: [1]\n")
    words = ("run", spec, "--store", tmp_path / "runs", "--tracking-uri", "none")
    known = {"AIRSWEEP_SAID": "no word of its own", "AIRSWEEP_FAILS_AS": failure_class}
    done = airsweep(*words, module="tests.helpers.trivial", check=False, **known)
    assert done.returncode == 1, done.stderr
    assert ("Ray's logs are kept" in done.stderr) == kept


def ui(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", "ui", *arguments, "--store", "nowhere"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--host", "0.0.0.0"], "ssh -L 5000:127.0.0.1:5000"),
        (["--host", "::"], "--auth"),
        (["--host", "box.example.org"], "--auth"),
        (["--host", "0.0.0.0", "--auth"], "--allowed-hosts NAME:PORT"),
    ],
)
def test_runs_are_not_shown_to_everybody(arguments, remedy):
    done = ui(*arguments)
    assert done.returncode == 3
    assert remedy in done.stderr


def test_users_need_what_mlflow_needs_for_them(monkeypatch, tmp_path):
    from orchestrator.tracking import exposure

    monkeypatch.delenv(exposure.AUTH_SECRET, raising=False)
    monkeypatch.delenv(exposure.AUTH_CONFIG, raising=False)
    exposure.check_exposure("127.0.0.1", auth=False, allowed_hosts=None)
    with pytest.raises((ValueError, Refused), match="--auth needs"):
        exposure.check_exposure("0.0.0.0", auth=True, allowed_hosts="box:5000")
