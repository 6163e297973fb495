"""`airsweep submit` on clusters started by `ray start --head`."""

from __future__ import annotations

import functools
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.git import commit
from tests.helpers.clusters import RAY
from tests.helpers.clusters import head as ray_head
from tests.helpers.sweeps import (
    TIMEOUT,
    airsweep,
    continue_with,
    environment,
    events,
    many_trials,
    result_slots,
    run_command,
    stopping_python,
    table,
    wait_for_stopped,
    wait_until,
    write_sweep,
)

pytestmark = [pytest.mark.integration, pytest.mark.ray]

OPEN = {"RAY_AUTH_MODE": "disabled"}
COUNT = 12
UNTRACKED = ("--tracking-uri", "none")
SMALL = "fixed: {method: zero_shot}\nseeds: [1]\n"


def submitted(
    folder: Path, event: str, *words: Any
) -> tuple[subprocess.Popen[bytes], Path, psutil.Process, str]:
    """A running `airsweep submit`, the file of its output, its driver, which has stopped itself at
    an event, and the id of the job."""
    interpreter, script = stopping_python(folder / "stopping", event)
    words = ("orchestrator", "submit", *words, "--python", interpreter)
    log = folder / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        env=environment(**OPEN),
        # Background jobs of a shell ignore SIGINT, and subprocesses inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )

    def output() -> str:
        assert process.poll() is None, log.read_text()
        return log.read_text()

    driver, pattern = wait_for_stopped(script, output), "--follow (default-[a-z]+-[-0-9]+);"
    wait_until(lambda: re.search(pattern, output()), output)
    return process, log, driver, re.findall(pattern, output())[0]


# ---------------------------------------------------------------- a cluster with a token


def test_a_cluster_with_a_token_accepts_only_this_token_and_no_output_shows_it(tmp_path, encoded):
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text("a1" * 32)
    wrong.write_text("b2" * 32)
    for file in (token, wrong):
        file.chmod(0o600)
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    sweep = write_sweep(tmp_path, "small", SMALL)
    with ray_head(jobs=True, cpus=2, **right) as address:
        command = ("submit", sweep, "--address", address, "--store", encoded)
        none = airsweep(*command, check=False, **OPEN)
        assert none.returncode == 3
        assert "RAY_AUTH_MODE is currently" in none.stderr
        other = airsweep(*command, check=False, **{**right, "RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert other.returncode == 3
        assert "RAY_AUTH_TOKEN_PATH" in other.stderr

        done = airsweep(*command, **right)
        assert [row["method"] for row in table(encoded, "small")] == ["zero_shot"]
        output = [none.stderr, other.stderr, done.stdout, done.stderr]
        assert not any("Traceback" in text for text in output)
        stored = [path.read_bytes() for path in encoded.rglob("*") if path.is_file()]
        for secret in ("a1" * 8, "b2" * 8):
            assert not any(secret in text for text in output)
            assert not any(secret.encode() in content for content in stored)


# ---------------------------------------------------------------- a cluster without a token


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head(jobs=True, cpus=2) as address:
        yield address


@pytest.fixture(scope="module")
def store(features, tmp_path_factory) -> Path:
    return Path(shutil.copytree(features, tmp_path_factory.mktemp("shared") / "runs"))


def test_submit_runs_a_sweep_on_the_cluster_and_prints_its_log(head, store, tmp_path, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    sweep = write_sweep(tmp_path / "a folder", "far", SMALL)
    done = airsweep("submit", sweep, "--address", f"{head}/", "--store", store, **OPEN)
    assert "zero_shot" in done.stdout  # in the final screen
    assert re.search(" next +airsweep table far", done.stdout)
    [job] = re.findall(r"airsweep: (default-far-[-0-9]+): SUCCEEDED, exit code 0\n", done.stderr)
    assert f"ray job logs --address {head} --follow {job}; to stop it: " in done.stderr
    assert [row["method"] for row in table(store, "far")] == ["zero_shot"]
    first = events(store, "far")[0]
    assert (first["event"], first["commit"]) == ("sweep_started", commit())
    details = JobSubmissionClient(head).get_job_info(job)
    assert details.metadata["job_name"] == "default/far"  # in Ray's dashboard


def test_no_wait_prints_only_the_id_to_stdout(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "later", SMALL)
    command = ("submit", sweep, "--address", head, "--store", store, *UNTRACKED, "--no-wait")
    # The option precedes the variables.
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:2"}
    done = airsweep(*command, **OPEN, **elsewhere)
    assert re.fullmatch(r"default-later-\d{8}-\d{6}\n", done.stdout)
    log = run_command(
        [RAY, "job", "logs", "--address", head, "--follow", done.stdout.strip()],
        env=environment(**OPEN),
    )
    assert "zero_shot" in log.stdout
    assert [row["method"] for row in table(store, "later")] == ["zero_shot"]


def test_check_checks_the_machines_as_a_job_and_runs_nothing(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "checked", "fixed: {method: fpl}\nseeds: [1]\n")
    command = ("submit", sweep, "--address", head, "--store", store, "--check")
    done = airsweep(*command, **OPEN)
    assert "checked 1 machine of the cluster: ok" in done.stdout
    assert not (store / "sweeps" / "default" / "checked").exists()
    refused = airsweep(*command, "--set", "resources.trial.cpu=99", check=False, **OPEN)
    assert refused.returncode == 3
    assert "a trial requires 99 CPU" in refused.stdout


def test_a_job_that_is_stopped_ends_with_143(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "long", many_trials(COUNT))
    command = (sweep, "--address", head, "--store", store)
    process, log, driver, job = submitted(tmp_path, "trial_done", *command)
    second = airsweep("submit", *command, check=False, **OPEN)
    assert second.returncode == 3
    assert "stop it; `airsweep status long" in second.stdout  # the store is locked
    stopping = subprocess.Popen(
        [RAY, "job", "stop", "--address", head, job],
        env=environment(**OPEN),
        stdout=subprocess.DEVNULL,
    )
    continue_with(driver, signal.SIGTERM)
    assert process.wait(TIMEOUT) == 143
    assert stopping.wait(TIMEOUT) == 0
    assert f"{job}: STOPPED, exit code 143" in log.read_text()
    assert "left to run" in log.read_text()  # the driver had time to close
    recorded = events(store, "long")
    assert len(result_slots(recorded)) < COUNT
    assert (recorded[-1]["event"], recorded[-1]["exit_code"]) == ("sweep_ended", 143)


def test_ctrl_c_leaves_the_job_running(head, store, tmp_path):
    sweep = write_sweep(tmp_path, "left", SMALL)
    words = (sweep, "--address", head, "--store", store, *UNTRACKED)
    process, log, driver, job = submitted(tmp_path, "sweep_started", *words)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130, log.read_text()
    assert f"{job}: keeps running" in log.read_text()
    driver.send_signal(signal.SIGCONT)
    wait_until(lambda: events(store, "left")[-1]["event"] == "sweep_ended")
    assert len(table(store, "left")) == 1
