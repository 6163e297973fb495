"""`airsweep submit`, `jobs` and `stop` against clusters that `ray start --head` made."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster import Cluster
from orchestrator.git import commit
from tests.helpers.clusters import head as ray_head
from tests.helpers.servers import served
from tests.helpers.sweeps import (
    TIMEOUT,
    airsweep,
    count,
    environment,
    events,
    many_trials,
    table,
    wait_until,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

OPEN = {"RAY_AUTH_MODE": "disabled"}
COUNT = 12
TRIALS = many_trials(COUNT)
# Sixty lines in six seconds, as a job of ours is known.
COUNTING = "for n in $(seq 60); do echo line $n; sleep 0.1; done; exit 4"
METADATA = {"airsweep.sweep": "default/counting", "airsweep.user": "me", "airsweep.store": "/none"}


def asked_jobs(address: str, **env: str) -> dict[str, Any]:
    """What `airsweep jobs --json` says, by id."""
    done = airsweep("jobs", "--address", address, "--json", **{**OPEN, **env})
    return {job["id"]: job for job in json.loads(done.stdout)}


# ---------------------------------------------------------------- a token; its own cluster


def test_the_token_of_a_cluster_lets_in_and_is_never_shown(tmp_path):
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text("a1" * 32)
    wrong.write_text("b2" * 32)
    for file in (token, wrong):
        file.chmod(0o600)
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    sweep = write_sweep(tmp_path, "small", "fixed: {method: zero_shot}\nseeds: [1]\n")
    with ray_head(jobs=True, cpus=2, **right) as address:
        called = ("submit", sweep, "--address", address, "--store", tmp_path / "runs")
        none = airsweep(*called, check=False, **OPEN)
        assert none.returncode == 3
        assert "wants a token, and none was sent; export RAY_AUTH_MODE=token" in none.stderr
        other = airsweep(*called, check=False, **{**right, "RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert other.returncode == 3
        assert "refuses the token that was sent; export RAY_AUTH_MODE=token" in other.stderr

        done = airsweep(*called, **right)
        assert [row["method"] for row in table(tmp_path / "runs", "small")] == ["zero_shot"]
        said = [none.stderr, other.stderr, done.stdout, done.stderr]
        assert not any("Traceback" in text for text in said)
        kept = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
        for secret in ("a1" * 8, "b2" * 8):
            assert not any(secret in text for text in said)
            assert not any(secret.encode() in content for content in kept)


# ---------------------------------------------------------------- without one


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head(jobs=True, cpus=2) as address:
        yield address


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared") / "runs"


def test_a_sweep_from_anywhere_runs_there_and_its_log_is_followed(head, store, tmp_path):
    sweep = write_sweep(tmp_path / "a folder", "far", "fixed: {method: zero_shot}\nseeds: [1]\n")
    done = airsweep("submit", sweep, "--address", f"{head}/", "--store", store, **OPEN)
    assert "zero_shot" in done.stdout  # the row, and the closing screen
    assert " again    submit it again" in done.stdout
    assert "default-far-1: SUCCEEDED, exit code 0" in done.stderr
    assert f"airsweep table far --store {store}" in done.stderr
    assert "INFO" not in done.stderr
    assert [row["method"] for row in table(store, "far")] == ["zero_shot"]
    first = events(store, "far")[0]
    assert (first["event"], first["commit"]) == ("sweep_started", commit())
    job = asked_jobs(head)["default-far-1"]
    assert (job["state"], job["exit_code"], job["store"]) == ("SUCCEEDED", 0, str(store))


def test_a_job_that_airsweep_refuses_ends_with_its_code(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "wide", "fixed: {method: fpl}\nseeds: [1]\n")
    called = ("submit", sweep, "--address", head, "--store", store)
    done = airsweep(*called, "--set", "resources.trial.cpu=99", check=False, **OPEN)
    assert done.returncode == 3
    assert "a trial requires 99 CPU" in done.stdout  # the log of a job is one
    assert "default-wide-1: FAILED, exit code 3" in done.stderr


def test_a_python_that_is_not_there_is_told_with_the_remedy(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "snake", "fixed: {method: zero_shot}\nseeds: [1]\n")
    called = ("submit", sweep, "--address", head, "--store", store, "--python", "/gone/python")
    done = airsweep(*called, check=False, **OPEN)
    assert done.returncode == 127
    assert "give --python PATH" in done.stderr


def test_detached_left_stopped_and_submitted_again_a_sweep_is_whole(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "long", TRIALS)
    called = ("submit", sweep, "--address", head, "--store", store)
    first = airsweep(*called, "--detach", "--json", **OPEN)
    said = json.loads(first.stdout)
    assert (said["id"], said["sweep"], said["store"]) == (
        "default-long-1",
        "default/long",
        str(store),
    )
    assert said["commands"]["stop"] == f"airsweep stop default-long-1 --address {head}"

    second = airsweep(*called, check=False, **OPEN)
    assert second.returncode == 3
    assert "ING already as default-long-1" in second.stderr
    assert said["commands"]["stop"] in second.stderr

    wait_until(lambda: count(events(store, "long"), "trial_done"))
    stopped = airsweep("stop", "long", "--address", head, **OPEN)
    assert "default-long-1: STOPPED, exit code 143" in stopped.stderr
    assert "trials are left" in stopped.stderr  # its driver had time to close
    found = events(store, "long")
    assert count(found, "trial_done") < COUNT
    assert (found[-1]["event"], found[-1]["exit_code"]) == ("sweep_ended", 143)
    again = airsweep("stop", "default-long-1", "--address", head, **OPEN)
    assert "it had ended before" in again.stderr
    nothing = airsweep("stop", "long", "--address", head, check=False, **OPEN)
    assert (nothing.returncode, "give the id of one: none" in nothing.stderr) == (2, True)

    code, told = interrupted(called, "to run", head)
    assert code == 130, told
    assert "default-long-2 goes on without being followed" in told
    assert f"ray job logs --address {head} --follow default-long-2" in told
    wait_until(lambda: asked_jobs(head)["default-long-2"]["exit_code"] == 0)
    found = events(store, "long")
    done = [event["key"] for event in found if event["event"] == "trial_done"]
    assert len(done) == len(set(done)) <= COUNT  # what ended as the driver did is reused
    assert len(done) + count(found, "trial_reused") == COUNT
    assert len(table(store, "long")) == COUNT


def interrupted(called: tuple[Any, ...], word: str, address: str) -> tuple[int, str]:
    """A submit that gets Ctrl-C once its log says `word`; its code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, called)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**OPEN),
        # Ignored where the tests run in the background of a shell, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=TIMEOUT)
    assert any(job["state"] == "RUNNING" for job in asked_jobs(address).values())
    return process.returncode, told


def test_by_the_name_of_a_sweep_only_ones_own_job_is_stopped(head, monkeypatch):
    other_job(head, "counting-0", monkeypatch, "sleep 600")
    theirs = airsweep("stop", "counting", "--address", head, check=False, **OPEN)
    assert theirs.returncode == 2
    assert "no job of yours runs default/counting" in theirs.stderr
    assert "counting-0 of me" in theirs.stderr
    by_id = airsweep("stop", "counting-0", "--address", head, **OPEN)
    assert "counting-0: STOPPED, exit code 143" in by_id.stderr
    assert "its driver was killed before it had closed" in by_id.stderr


# ---------------------------------------------------------------- a bad connection


def other_job(
    address: str, name: str, monkeypatch: pytest.MonkeyPatch, entrypoint: str = COUNTING
) -> None:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    JobSubmissionClient(address).submit_job(
        entrypoint=entrypoint, submission_id=name, metadata=METADATA
    )


@contextmanager
def relay(port: int, to: str) -> Iterator[str]:
    """A way to a server that is cut when the block ends."""
    there = int(to.rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", port))
    open_ones: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", there))
                open_ones.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in open_ones:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(head, monkeypatch):
    other_job(head, "counting-1", monkeypatch)
    log: list[str] = []
    said: list[str] = []
    with ThreadPoolExecutor() as threads:
        with relay(0, head) as address:
            cluster = Cluster(address)
            ended = threads.submit(cluster.follow, "counting-1", log.append, said.append)
            wait_until(lambda: "line 5\n" in "".join(log))
        wait_until(lambda: any("trying again" in text for text in said))
        with relay(int(address.rpartition(":")[2]), head):
            assert ended.result(TIMEOUT).exit_code == 4
    lines = [line for line in "".join(log).splitlines() if line.startswith("line ")]
    assert lines == [f"line {n}" for n in range(1, 61)]


def test_who_closes_the_output_ends_the_following_and_not_the_job(head, monkeypatch):
    other_job(head, "counting-3", monkeypatch)

    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Cluster(head).follow("counting-3", closed, lambda text: None)
    wait_until(lambda: asked_jobs(head)["counting-3"]["exit_code"] == 4)


# ---------------------------------------------------------------- what is no such cluster


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *what: Any) -> None:
            pass

    with served(Handler) as url:
        yield url


def refused(address: str, **env: str) -> str:
    """What is said of an address; each in a line, and nothing else happens."""
    done = airsweep("jobs", "--address", address, check=False, **{**OPEN, **env})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (3, "", 1)
    return done.stderr


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, "not found", "is no Ray cluster"),
        (200, "<html>", "is no Ray cluster"),
        (200, "[]", "is no Ray cluster"),
        (
            *(200, '{"version": "4", "ray_version": "2.9.3"}'),
            f"has Ray 2.9.3, and airsweep here runs on Ray {ray.__version__}",
        ),
    ],
)
def test_a_server_that_is_no_ray_or_another_one_is_refused(status, body, words):
    with server(status, body) as address:
        assert f"{address} {words}" in refused(address)


def test_a_port_where_no_http_is_spoken_is_told():
    def answer() -> None:
        near, _ = listener.accept()
        near.recv(65536)
        near.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x04\x00@\r\n")
        near.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        said = refused(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert "no HTTP is spoken there" in said


@pytest.mark.parametrize(
    ("address", "words"),
    [
        *((a, "allowed: http://<head>:8265") for a in ("ray://head:10001", "head:6379", "auto")),
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://no-such-host.invalid:8265", "Name or service not known"),
        ("http://me:hunter2@head:8265", "the address holds a password"),
    ],
)
def test_an_address_that_is_none_is_refused_and_no_password_is_shown(address, words):
    said = refused(address)
    assert words in said
    assert "hunter2" not in said


def test_the_option_wins_over_the_environment(head):
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:2"}
    assert asked_jobs(head, **elsewhere) == asked_jobs(head)
