"""Submit a sweep with `ray job submit` and wait for the end of its job.

Ray's command prints the job's log. It exits with 0 if the job was stopped or the connection broke,
so only the cluster's answer about the job gives the exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.environment import environment
from orchestrator.errors import FAILED, TERMINATED, Refused

POLL_INTERVAL = 0.5  # seconds
LOST_AFTER = 300.0  # seconds without an answer before the cluster counts as lost
REST_OF_LOG = 30.0  # seconds that Ray's command has to print it after the end of the job
ADDRESS = "RAY_API_SERVER_ADDRESS"  # precedes --address and RAY_ADDRESS in Ray's own code
ALLOWED = "http://<head>:8265, the address of the dashboard"


@dataclass(frozen=True)
class Job:
    """The job of a sweep on a cluster."""

    id: str
    sweep: str  # PROJECT/NAME
    address: str  # URL of the dashboard

    @classmethod
    def new(cls, sweep: str, address: str) -> Job:
        """A job whose id, which Ray accepts only once, says the sweep and the time."""
        return cls(f"{sweep.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}", sweep, address)

    @property
    def commands(self) -> str:
        """How to follow and stop the job."""
        follow = ["ray", "job", "logs", "--address", self.address, "--follow", self.id]
        stop = ["ray", "job", "stop", "--address", self.address, self.id]
        return f"to follow its log: {shlex.join(follow)}; to stop it: {shlex.join(stop)}"


def connect(address: str) -> Any:
    """Return Ray's client for the jobs of a cluster.

    Raises:
        ValueError: the address is empty.
        Refused: the address is not allowed, or no Ray dashboard accepts the client there.
    """
    if not address:
        raise ValueError(
            f"no address of a cluster; give --address or set {ADDRESS}; allowed: {ALLOWED}"
        )
    if "@" in address:  # the message must not contain the address
        raise Refused(
            "the address contains a password; Ray reads a token from RAY_AUTH_TOKEN_PATH instead"
        )
    if not address.startswith(("http://", "https://")) or not urlsplit(address).hostname:
        raise Refused(f"{address!r} is not the address of Ray's job server; allowed: {ALLOWED}")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address.rstrip("/")
    try:
        with environment({ADDRESS: address}):
            return JobSubmissionClient(address)
    except AuthenticationError as problem:
        raise Refused(f"{address}: {problem}") from None
    except (RuntimeError, OSError, ValueError, KeyError) as problem:
        reason = str(problem).rstrip(".")
        raise Refused(
            f"no Ray cluster answers at {address}: {reason}; allowed: {ALLOWED}"
        ) from None


def start_submission(
    job: Job, folder: Path, variables: Mapping[str, str], command: Sequence[str], no_wait: bool
) -> subprocess.Popen[bytes]:
    """Start `ray job submit`, which sends a folder and prints the log of the job.

    Args:
        folder: the job package, which becomes the working directory of the job.
        variables: environment variables of the job.
        command: the command that the job runs.
        no_wait: print no log; all output goes to stderr.
    """
    options = [
        "--log-color=false",
        f"--submission-id={job.id}",
        f"--working-dir={folder}",
        f"--runtime-env-json={json.dumps({'env_vars': dict(variables)})}",
        f"--metadata-json={json.dumps({'job_name': job.sweep})}",  # shown by the dashboard
        *(["--no-wait"] if no_wait else []),
    ]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    return subprocess.Popen(
        [*ray, *options, "--", *command],
        env={**os.environ, ADDRESS: job.address, "PYTHONUNBUFFERED": "1"},
        stdout=sys.stderr if no_wait else None,
    )


def wait_for_end(
    client: Any, job: Job, submission: subprocess.Popen[bytes], report: Callable[[str], None]
) -> int:
    """Wait for the end of a job, also if `ray job submit` ends earlier.

    Args:
        client: Ray's client for the cluster.
        report: receives messages about the job and the connection.

    Returns:
        The exit code of the driver; 143 if the job was stopped; 1 if the cluster did not answer for
        LOST_AFTER seconds.

    Raises:
        Refused: the cluster has no such job.
    """
    answered, is_known, is_followed = time.monotonic(), False, True
    while True:
        is_printing = submission.poll() is None
        try:
            info = client.get_job_info(job.id)
        except (RuntimeError, OSError) as problem:
            if "status code 404" not in str(problem):
                if time.monotonic() - answered > LOST_AFTER:
                    report(
                        f"{job.address} has not answered for {LOST_AFTER:.0f} s; the job keeps "
                        f"running if the cluster still exists; {job.commands}"
                    )
                    return FAILED
            elif not is_printing:
                raise Refused(
                    f"{job.address} has no job {job.id}; Ray's message above says why"
                ) from None
        else:
            answered = time.monotonic()
            if not is_known:
                report(f"submitted; Ctrl-C leaves it running; {job.commands}")
                is_known = True
            if info.status.is_terminal():
                with suppress(subprocess.TimeoutExpired):
                    submission.wait(REST_OF_LOG)
                code = _exit_code(info)
                report(f"{info.status.value}, exit code {code}")
                return code
            if is_followed and not is_printing:
                report(f"the log is no longer followed; waiting for the end; {job.commands}")
                is_followed = False
        time.sleep(POLL_INTERVAL)


def _exit_code(info: Any) -> int:
    """The exit code of a job that has ended; Ray's own commands know only 0 and 1."""
    if info.status.value == "STOPPED":
        return TERMINATED
    code: int | None = info.driver_exit_code
    if code is None:  # the driver did not start, or its node was lost
        return FAILED
    return code if code >= 0 else 128 - code  # a signal, numbered like in a shell
