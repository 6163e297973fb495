"""`airsweep submit`, `jobs` and `stop` on clusters started by `ray start --head`."""

from __future__ import annotations

import functools
import json
import re
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
from tests.helpers.golden import check_golden_cases
from tests.helpers.plugins import MARGIN
from tests.helpers.servers import free_port, serve
from tests.helpers.sweeps import (
    TIMEOUT,
    airsweep,
    continue_with,
    environment,
    events,
    many_trials,
    result_slots,
    stopping_python,
    table,
    wait_for_stopped,
    wait_until,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

OPEN = {"RAY_AUTH_MODE": "disabled"}
COUNT = 12
TRIALS = many_trials(COUNT)
# Prints sixty lines in six seconds; submitted with the metadata of a sweep.
COUNTING = "for n in $(seq 60); do echo line $n; sleep 0.1; done; exit 4"
METADATA = {"airsweep.sweep": "default/counting", "airsweep.user": "me", "airsweep.store": "/none"}


def jobs_of(address: str, **env: str) -> dict[str, Any]:
    """The output of `airsweep jobs --json`, by id."""
    done = airsweep("jobs", "--address", address, "--json", **{**OPEN, **env})
    return {job["id"]: job for job in json.loads(done.stdout)}


def log_of(address: str, name: str) -> str:
    """The log of a job that has not ended."""
    cluster = Cluster(address)
    log = cluster.log_of(name)
    assert not cluster.job(name).is_over, log
    return log


def wait_for_end(address: str, name: str, code: int) -> None:
    """Wait for the end of a job, and assert its exit code."""
    cluster = Cluster(address)
    wait_until(lambda: cluster.job(name).is_over, lambda: cluster.log_of(name), every=0.5)
    assert cluster.job(name).exit_code == code, cluster.log_of(name)


# ---------------------------------------------------------------- a cluster with a token


def test_a_cluster_with_a_token_accepts_only_this_token_and_no_output_shows_it(tmp_path):
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text("a1" * 32)
    wrong.write_text("b2" * 32)
    for file in (token, wrong):
        file.chmod(0o600)
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    sweep = write_sweep(tmp_path, "small", "fixed: {method: zero_shot}\nseeds: [1]\n")
    with ray_head(jobs=True, cpus=2, **right) as address:
        command = ("submit", sweep, "--address", address, "--store", tmp_path / "runs")
        none = airsweep(*command, check=False, **OPEN)
        assert none.returncode == 3
        assert "requires a token, but none was sent; export RAY_AUTH_MODE=token" in none.stderr
        other = airsweep(*command, check=False, **{**right, "RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert other.returncode == 3
        assert "rejected the token; export RAY_AUTH_MODE=token" in other.stderr

        done = airsweep(*command, **right)
        assert [row["method"] for row in table(tmp_path / "runs", "small")] == ["zero_shot"]
        output = [none.stderr, other.stderr, done.stdout, done.stderr]
        assert not any("Traceback" in text for text in output)
        stored = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
        for secret in ("a1" * 8, "b2" * 8):
            assert not any(secret in text for text in output)
            assert not any(secret.encode() in content for content in stored)


# ---------------------------------------------------------------- a cluster without a token


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head(jobs=True, cpus=2) as address:
        yield address


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared") / "runs"


def test_submit_runs_a_sweep_on_the_cluster_and_follows_its_log(head, store, tmp_path, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    sweep = write_sweep(tmp_path / "a folder", "far", "fixed: {method: zero_shot}\nseeds: [1]\n")
    done = airsweep("submit", sweep, "--address", f"{head}/", "--store", store, **OPEN)
    assert "zero_shot" in done.stdout  # in the final screen
    assert re.search(" next +airsweep table far", done.stdout)
    assert "default-far-1: SUCCEEDED, exit code 0" in done.stderr
    assert f"airsweep table far --store {store}" in done.stderr
    assert "INFO" not in done.stderr
    assert [row["method"] for row in table(store, "far")] == ["zero_shot"]
    first = events(store, "far")[0]
    assert (first["event"], first["commit"]) == ("sweep_started", commit())
    details = JobSubmissionClient(head).get_job_info("default-far-1")
    assert details.metadata["job_name"] == "default/far"  # in Ray's dashboard
    job = jobs_of(head)["default-far-1"]
    assert (job["state"], job["exit_code"], job["store"]) == ("SUCCEEDED", 0, str(store))


def test_a_plugin_travels_with_a_job(head, store, tmp_path):
    folder = tmp_path / "elsewhere"
    body = """plugins: [own/margin.py]
grid: {pseudo_labels.kind: [margin, top_k]}
fixed: {method: pseudo, iterations: 1, train.steps: 20}
seeds: [1]
"""
    sweep = write_sweep(folder, "plugged", body)
    (folder / "own").mkdir()
    (folder / "own" / "margin.py").write_text(MARGIN)
    airsweep("submit", sweep, "--address", head, "--store", store, **OPEN)
    kinds = {row["settings"]["pseudo_labels.kind"] for row in table(store, "plugged")}
    assert kinds == {"margin", "top_k"}
    assert "2 done, 0 to run" in airsweep("plan", sweep, "--store", store).stdout
    (folder / "own" / "margin.py").write_text(f"{MARGIN}\n# edited\n")
    edited = airsweep("plan", sweep, "--store", store).stdout
    assert "1 done, 1 to run" in edited
    assert "pseudo_labels.kind:margin: the code changed since: 1 result is" in edited


def test_submit_exits_with_the_code_of_a_refused_run(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "wide", "fixed: {method: fpl}\nseeds: [1]\n")
    command = ("submit", sweep, "--address", head, "--store", store)
    done = airsweep(*command, "--set", "resources.trial.cpu=99", check=False, **OPEN)
    assert done.returncode == 3
    assert "a trial requires 99 CPU" in done.stdout  # the log of a job is one
    assert "default-wide-1: FAILED, exit code 3" in done.stderr


def test_a_missing_python_on_the_cluster_is_reported_with_the_remedy(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "snake", "fixed: {method: zero_shot}\nseeds: [1]\n")
    command = ("submit", sweep, "--address", head, "--store", store, "--python", "/gone/python")
    done = airsweep(*command, check=False, **OPEN)
    assert done.returncode == 127
    assert "give --python PATH" in done.stderr


def test_a_job_that_is_stopped_and_submitted_again_completes_the_sweep(
    head, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    sweep = write_sweep(tmp_path, "long", TRIALS)
    command = ("submit", sweep, "--address", head, "--store", store)
    python, script = stopping_python(tmp_path / "first", "trial_done")
    first = airsweep(*command, "--python", python, "--detach", "--json", **OPEN)
    submitted = json.loads(first.stdout)
    assert (submitted["id"], submitted["sweep"], submitted["store"]) == (
        "default-long-1",
        "default/long",
        str(store),
    )
    assert submitted["commands"]["stop"] == f"airsweep stop default-long-1 --address {head}"

    second = airsweep(*command, check=False, **OPEN)
    assert second.returncode == 3
    assert "ING as default-long-1" in second.stderr
    assert submitted["commands"]["stop"] in second.stderr

    driver = wait_for_stopped(script, lambda: log_of(head, "default-long-1"))
    with ThreadPoolExecutor() as threads:
        stopping = threads.submit(airsweep, "stop", "long", "--address", head, **OPEN)
        continue_with(driver, signal.SIGTERM)
        stopped = stopping.result()
    assert "default-long-1: STOPPED, exit code 143" in stopped.stderr
    assert "left to run" in stopped.stderr  # the driver had time to close
    recorded = events(store, "long")
    assert len(result_slots(recorded)) < COUNT
    assert (recorded[-1]["event"], recorded[-1]["exit_code"]) == ("sweep_ended", 143)
    again = airsweep("stop", "default-long-1", "--address", head, **OPEN)
    assert "already ended" in again.stderr
    nothing = airsweep("stop", "long", "--address", head, check=False, **OPEN)
    assert (nothing.returncode, "running: none" in nothing.stderr) == (2, True)

    python, script = stopping_python(tmp_path / "second", "trials_started")
    code, stderr = interrupted((*command, "--python", python), "to run")
    assert code == 130, stderr
    assert "default-long-2 keeps running" in stderr
    assert f"ray job logs --address {head} --follow default-long-2" in stderr
    driver = wait_for_stopped(script, lambda: log_of(head, "default-long-2"))
    driver.send_signal(signal.SIGCONT)
    wait_for_end(head, "default-long-2", 0)
    recorded = events(store, "long")
    assert len(result_slots(recorded)) == len(set(result_slots(recorded))) == COUNT
    assert len(table(store, "long")) == COUNT


def interrupted(command: tuple[Any, ...], word: str) -> tuple[int, str]:
    """Submit, and send Ctrl-C once the log contains `word`; returns exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**OPEN),
        # Background jobs of a shell ignore SIGINT, and subprocesses inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if word in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT)
    return process.returncode, stderr


def test_jobs_lists_sweeps_that_ray_job_submit_has_sent(head, monkeypatch):
    command = "echo python -m orchestrator run sweeps/by_hand.yaml --store /none"
    other_job(head, "plain", monkeypatch, command, metadata={})
    other_job(head, "no-sweep", monkeypatch, "echo python -m orchestrator status", metadata={})
    listed = jobs_of(head)
    assert "no-sweep" not in listed
    job = listed["plain"]
    assert (job["sweep"], job["store"], job["user"]) == ("default/by_hand", "/none", "")


def test_stop_by_sweep_name_does_not_stop_a_job_of_another_user(head, monkeypatch):
    other_job(head, "counting-0", monkeypatch, "sleep 600")
    theirs = airsweep("stop", "counting", "--address", head, check=False, **OPEN)
    assert theirs.returncode == 2
    assert "no job of yours runs default/counting" in theirs.stderr
    assert "counting-0 of me" in theirs.stderr
    by_id = airsweep("stop", "counting-0", "--address", head, **OPEN)
    assert "counting-0: STOPPED, exit code 143" in by_id.stderr
    assert "the driver was killed before it could close" in by_id.stderr


# ---------------------------------------------------------------- a bad connection


def other_job(
    address: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    entrypoint: str = COUNTING,
    metadata: dict[str, str] = METADATA,
) -> None:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    JobSubmissionClient(address).submit_job(
        entrypoint=entrypoint, submission_id=name, metadata=metadata
    )


@contextmanager
def relay(port: int, to: str) -> Iterator[str]:
    """Forward a port to a server; all connections break when the block ends."""
    server_port = int(to.rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", port))
    sockets: list[socket.socket] = [listener]

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
                far = socket.create_connection(("127.0.0.1", server_port))
                sockets.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def test_after_a_broken_connection_the_log_continues_without_gap_or_repetition(
    head, monkeypatch, tmp_path
):
    go = tmp_path / "go"
    first, rest = ("seq -f 'line %g' 30", "seq -f 'line %g' 31 60")
    pause = f"while [ ! -e {go} ]; do sleep 0.1; done"
    other_job(head, "counting-1", monkeypatch, f"{first}; {pause}; {rest}; exit 4")
    log: list[str] = []
    messages: list[str] = []
    with ThreadPoolExecutor() as threads:
        with relay(free_port(), head) as address:
            cluster = Cluster(address)
            ended = threads.submit(cluster.follow, "counting-1", log.append, messages.append)
            wait_until(lambda: "line 30\n" in "".join(log), lambda: (ended, log, messages))
        wait_until(lambda: any("trying again" in message for message in messages), messages.copy)
        go.touch()
        with relay(int(address.rpartition(":")[2]), head):
            assert ended.result(TIMEOUT).exit_code == 4
    lines = [line for line in "".join(log).splitlines() if line.startswith("line ")]
    assert lines == [f"line {n}" for n in range(1, 61)]


def test_a_closed_output_ends_following_but_not_the_job(head, monkeypatch):
    other_job(head, "counting-3", monkeypatch)

    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Cluster(head).follow("counting-3", closed, lambda text: None)
    wait_for_end(head, "counting-3", 4)


# ---------------------------------------------------------------- wrong addresses


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with serve(Handler) as url:
        yield url


def refused(address: str) -> str:
    """The one-line message about an address that is refused."""
    done = airsweep("jobs", "--address", address, check=False, **OPEN)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (3, "", 1)
    shown = re.sub(r"\[Errno .*?(?=;)", "<reason of the system>", done.stderr.rstrip())
    return shown.replace(address, "<address>")


def test_messages_about_wrong_addresses_equal_the_golden_ones():
    """No password is shown."""
    found = {}
    for status, body in (
        (404, "not found"),
        (200, "<html>"),
        (200, "[]"),
        (200, '{"version": "4", "ray_version": "2.9.3"}'),
    ):
        with server(status, body) as address:
            found[f"a server with {body}"] = refused(address).replace(ray.__version__, "<Ray>")

    def answer() -> None:
        near, _ = listener.accept()
        near.recv(65536)
        near.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\x00\x00\x04\x00@\r\n")
        near.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        found["a server that does not speak HTTP"] = refused(address)
    for address in (
        *("ray://head:10001", "head:6379", "auto", "http://127.0.0.1:1"),
        *("http://no-such-host.invalid:8265", "http://me:hunter2@head:8265"),
    ):
        found[address] = refused(address)
        assert "hunter2" not in found[address]
    check_golden_cases("messages/jobs.txt", found)


def test_the_option_address_overrides_the_environment(head):
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:2"}
    assert jobs_of(head, **elsewhere) == jobs_of(head)
