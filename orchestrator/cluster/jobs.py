"""Sweeps as jobs of a Ray cluster: submit, follow, stop and list them.

Uses Ray's JobSubmissionClient. A job runs `python -m orchestrator run`, so submitting a sweep again
resumes it. The cluster is the only record of jobs; this machine stores nothing.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cluster.job_package import JobPaths
from orchestrator.environment import environment
from orchestrator.errors import FAILED, REFUSED, TERMINATED, Refused
from orchestrator.formatting import format_time
from orchestrator.planning import SweepRequest
from orchestrator.store import smoke_store

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # seconds; Ray's client has no timeout
POLL_INTERVAL = 0.5  # seconds
SILENCE = 20.0  # seconds without a line of the log before the log is opened again
LOST_AFTER = 300.0  # seconds without an answer before the cluster counts as lost
COMMAND_NOT_FOUND = 127  # exit code of a shell
NOT_ENDED = ("PENDING", "RUNNING")
SWEEP, USER, STORE = "airsweep.sweep", "airsweep.user", "airsweep.store"  # keys of job metadata
JOB_NAME = "job_name"  # the key of the metadata that Ray's dashboard shows
# Ray's error types of a failed job whose driver never started.
NOT_STARTED = (
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR",
)
ALLOWED = "http://<head>:8265, the address of the dashboard"


class ClusterLost(Refused):
    """The cluster stopped answering, or does not know the job."""


@dataclass(frozen=True)
class Job:
    """A job of a cluster, with the metadata of its sweep."""

    id: str
    sweep: str  # PROJECT/NAME; empty: the job runs no sweep
    user: str  # empty: unknown, since the job was not sent by `airsweep submit`
    store: str
    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    exit_code: int | None  # airsweep's exit code; None: not ended
    started: float  # seconds since the epoch
    ended: float | None
    driver_started: bool
    message: str

    @property
    def is_over(self) -> bool:
        return self.state not in NOT_ENDED

    @property
    def of_user(self) -> str:
        return f" of {self.user}" if self.user else ""

    def json(self) -> dict[str, Any]:
        names = ("id", "sweep", "user", "store", "state", "exit_code", "started", "ended")
        return {name: getattr(self, name) for name in names}


# ---------------------------------------------------------------- a cluster


class Cluster:
    """Client for the jobs of a Ray cluster.

    Args:
        address: URL of the dashboard, http://<head>:8265.

    Raises:
        Refused: no server answers, it is not Ray or has another version, or it requires a token.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked_address(address)
        self._client = _connect(self.address)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of Ray's client.

        Raises:
            ClusterLost: the cluster does not answer, or refuses the call.
        """
        try:
            with _without_ray_logs():
                return getattr(self._client, method)(*args, **kwargs)
        except (RuntimeError, OSError) as problem:
            raise ClusterLost(f"{self.address}: {_reason(problem)}") from problem

    def jobs(self) -> list[Job]:
        """Jobs that run sweeps, the newest last."""
        submitted = map(_job, self._call("list_jobs"))
        return sorted((job for job in submitted if job.sweep), key=lambda job: job.started)

    def job(self, job_id: str) -> Job:
        """Return a job by its id.

        Raises:
            ClusterLost: the cluster does not answer, or has no such job.
        """
        return _job(self._call("get_job_info", job_id))

    def submit(
        self,
        request: SweepRequest,
        paths: JobPaths,
        folder: Path,
        env: Mapping[str, str],
        command: str,
    ) -> Job:
        """Submit a sweep.

        Args:
            folder: the job package.
            env: environment variables of the job, with AIRSWEEP_PROJECT and AIRSWEEP_USER.
            command: the command that the job runs.

        Raises:
            Refused: a job runs this sweep already, or the cluster accepts no job.
        """
        sweep = f"{env['AIRSWEEP_PROJECT']}/{request.spec.name}"
        store = str(smoke_store(paths.store) if request.smoke else paths.store).rstrip("/")
        submitted = list(map(_job, self._call("list_jobs")))
        for job in submitted:
            if not job.is_over and (job.sweep, job.store) == (sweep, store):
                raise Refused(
                    f"{sweep} is already {job.state} as {job.id}{job.of_user}, since "
                    f"{format_time(job.started)}; to follow it: {self.follow_command(job.id)}; to "
                    f"stop it: {self.stop_command(job.id)}"
                )
        stem = sweep.replace("/", "-")  # numbered, because Ray accepts an id only once
        matches = [re.fullmatch(rf"{re.escape(stem)}-(\d+)", job.id) for job in submitted]
        number = 1 + max((int(match[1]) for match in matches if match), default=0)
        metadata = {SWEEP: sweep, USER: env["AIRSWEEP_USER"], STORE: store, JOB_NAME: sweep}
        return self._start(
            command, folder, env, submission_id=f"{stem}-{number}", metadata=metadata
        )

    def _start(self, command: str, folder: Path, env: Mapping[str, str], **options: Any) -> Job:
        runtime_env = {"working_dir": str(folder), "env_vars": dict(env)}
        try:
            job_id = self._call(
                "submit_job", entrypoint=command, runtime_env=runtime_env, **options
            )
        except (ClusterLost, ValueError) as problem:
            race = "already exists" in str(problem)
            remedy = "; the same sweep was submitted at the same time: try again" if race else ""
            raise Refused(f"no job was started: {problem}{remedy}") from problem
        return self.job(job_id)

    def run(
        self, command: str, folder: Path, env: Mapping[str, str], timeout: float
    ) -> tuple[str, Job]:
        """Run a job that is not a sweep and wait for its end; returns its log and final state.

        Args:
            folder, env, command: as for `submit`.
            timeout: seconds.

        Raises:
            Refused: the cluster accepts no job, does not answer, or the job takes too long.
        """
        job, deadline = self._start(command, folder, env), time.monotonic() + timeout
        while not job.is_over:
            if time.monotonic() > deadline:
                self.stop(job.id)
                raise Refused(
                    f"{self.address}: {job.id} did not end within {timeout:.0f} s; the cluster may "
                    "have no free resources"
                )
            time.sleep(POLL_INTERVAL)
            job = self.job(job.id)
        return self.log_of(job.id), job

    def follow(
        self,
        job_id: str,
        write: Callable[[str], None],
        report: Callable[[str], None],
    ) -> Job:
        """Write a job's log as it grows, until the job ends.

        After a lost connection the log continues at the character where it stopped.

        Args:
            write: receives pieces of the log.
            report: receives messages about the connection and a pending job.

        Raises:
            ClusterLost: no answer for LOST_AFTER seconds. The job keeps running.
        """
        written = 0  # characters

        async def tail() -> None:
            nonlocal written
            received = 0  # characters; Ray sends a log from its beginning
            pieces = self._client.tail_job_logs(job_id)
            while (text := await self._next_piece(pieces)) is not None:
                new = text[max(0, written - received) :]
                received += len(text)
                written = max(written, received)
                if new:
                    write(new)

        lost_since, pending = None, ""
        while True:
            try:
                with _without_ray_logs():
                    asyncio.run(tail())
                job, lost_since = self.job(job_id), None
            except ClusterLost as problem:
                if lost_since is None:
                    report(f"{problem}; trying again for {LOST_AFTER:.0f} s")
                    lost_since = time.monotonic()
                too_long = time.monotonic() - lost_since > LOST_AFTER
                if too_long or "status code 404" in str(problem):
                    raise
            else:
                if job.is_over:
                    return job
                if job.state == "PENDING" and job.message != pending:
                    pending = job.message
                    report(f"{job_id} is PENDING: {pending}")
            time.sleep(POLL_INTERVAL)

    async def _next_piece(self, pieces: Any) -> str | None:
        """The next piece of a log. None: the log has ended, or was silent for SILENCE seconds, for
        instance because its node is lost."""
        from aiohttp import ClientError

        try:
            piece: str | None = await asyncio.wait_for(anext(pieces, None), SILENCE)
            return piece
        except TimeoutError:
            return None
        except (RuntimeError, OSError, ClientError) as problem:
            raise ClusterLost(f"{self.address}: {_reason(problem)}") from problem

    def stop(self, job_id: str) -> Job:
        """Stop a job and wait until its driver has ended."""
        self._call("stop_job", job_id)
        while not (job := self.job(job_id)).is_over:
            time.sleep(POLL_INTERVAL)
        return job

    def log_of(self, job_id: str) -> str:
        return str(self._call("get_job_logs", job_id))

    def follow_command(self, job_id: str) -> str:
        return shlex.join(["ray", "job", "logs", "--address", self.address, "--follow", job_id])

    def stop_command(self, job_id: str) -> str:
        return shlex.join(["airsweep", "stop", job_id, "--address", self.address])


def _job(info: Any) -> Job:
    metadata = info.metadata or {}
    if SWEEP not in metadata and info.submission_id:  # a driver without one is no job
        variables = (info.runtime_env or {}).get("env_vars") or {}
        metadata = _entrypoint_metadata(info.entrypoint, variables)
    state = str(info.status.value)
    ended = info.end_time and info.end_time / 1000
    return Job(
        id=info.submission_id or "",
        sweep=metadata.get(SWEEP, ""),
        user=metadata.get(USER, ""),
        store=metadata.get(STORE, ""),
        state=state,
        exit_code=_exit_code(state, info),
        started=(info.start_time or 0) / 1000,
        ended=ended or None,
        driver_started=info.driver_exit_code is not None,
        message=info.message or "",
    )


def _entrypoint_metadata(entrypoint: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Sweep, user and store of a command that `ray job submit` has sent; empty for another command.

    Args:
        variables: the environment variables of the job.

    >>> command = "python -m orchestrator run sweeps/mine.yaml --store /shared/runs"
    >>> _entrypoint_metadata(command, {"AIRSWEEP_PROJECT": "birds"})[SWEEP]
    'birds/mine'
    """
    run = re.search(r"(?:-m orchestrator|\bairsweep) (?:run|retry|prepare) (.*)", entrypoint)
    words = run[1].replace("=", " ").split() if run else []
    spec = next((word for word in words if word.endswith((".yaml", ".yml"))), "")
    spec = spec or (words[0] if words and not words[0].startswith("-") else "")
    if not spec:
        return {}
    store = words[words.index("--store") + 1] if "--store" in words[:-1] else ""
    return {
        SWEEP: f"{variables.get('AIRSWEEP_PROJECT', 'default')}/{Path(spec).stem}",
        USER: variables.get("AIRSWEEP_USER", ""),
        STORE: store or variables.get("AIRSWEEP_STORE", ""),
    }


def _exit_code(state: str, info: Any) -> int | None:
    """airsweep's exit code of a job; Ray's own commands distinguish only 0 and 1."""
    driver: int | None = info.driver_exit_code
    if state in NOT_ENDED:
        return None
    if driver is not None:
        return driver if driver >= 0 else 128 - driver  # a signal, numbered like in a shell
    if state == "STOPPED":
        return TERMINATED
    return REFUSED if info.error_type in NOT_STARTED else FAILED


# ---------------------------------------------------------------- connection


def _checked_address(address: str) -> str:
    """Return the address without a trailing slash.

    Raises:
        ValueError: the address is empty.
        Refused: it is not an HTTP address, or contains a password.
    """
    if not address:
        raise ValueError(
            f"no address of a cluster; give --address or set RAY_API_SERVER_ADDRESS; "
            f"allowed: {ALLOWED}"
        )
    parts = urlsplit(address)
    if "@" in address:  # the message must not contain the address
        raise Refused(
            "the address contains a password; Ray reads a token from RAY_AUTH_TOKEN_PATH instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"{address!r} is not the address of Ray's job server; allowed: {ALLOWED}")
    return address.rstrip("/")


def _connect(address: str) -> Any:
    """Return Ray's client, with timeouts.

    Raises:
        Refused: no server answers, it is not Ray or has another version, or it requires a token.
    """
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
            return super()._do_request(*args, **{"timeout": timeout, **kwargs})

    try:
        # RAY_API_SERVER_ADDRESS and RAY_ADDRESS take precedence over the argument of Ray's client.
        with _without_ray_logs(), environment({"RAY_API_SERVER_ADDRESS": address}):
            client = Client(address)
            server_version = str(client._server_ray_version)
    except AuthenticationError as problem:
        reason = "requires a token, but none was sent"
        if "Authentication failed" in str(problem):
            reason = "rejected the token"
        raise Refused(
            f"{address} {reason}; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with "
            "the cluster's token>"
        ) from None
    except ConnectionError as problem:
        raise Refused(
            f"no Ray cluster answers at {address}: {_reason(problem)}; allowed: {ALLOWED}"
        ) from None
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as problem:
        # Only Ray's own errors say what is wrong; others come from an answer of another form.
        said = _reason(problem) if isinstance(problem, RuntimeError) else "another kind of answer"
        raise Refused(f"{address} is not a Ray cluster ({said}); allowed: {ALLOWED}") from None
    if server_version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise Refused(
            f"the cluster at {address} has Ray {server_version}, but this airsweep uses Ray "
            f"{ray.__version__}; use a cluster with this version, or install the airsweep for Ray "
            f"{server_version}"
        )
    return client


def _reason(problem: BaseException) -> str:
    """The root cause of an exception, in one line."""
    while (cause := problem.__cause__ or problem.__context__) is not None:
        problem = cause
    lines = str(problem).strip(" .\n").splitlines()
    if not lines:
        return type(problem).__name__
    # The last line of a server's traceback is its exception.
    line = lines[-1 if lines[0].endswith("(most recent call last):") else 0]
    # A server that does not speak HTTP sends unprintable bytes instead of a status line.
    return line if line.isprintable() else "the server does not speak HTTP"


@contextmanager
def _without_ray_logs() -> Iterator[None]:
    """Silence the log messages of Ray's client below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- commands


def entrypoint(request: SweepRequest, paths: JobPaths, spec: str, python: str) -> str:
    """The command that a job runs."""
    words = [python, "-m", "orchestrator", "run", spec, "--store", paths.store]
    for option, value in (("--data-root", paths.data_root), ("--tracking-uri", paths.tracking_uri)):
        words += [option, value] if value else []
    return shlex.join([*words, *request.options])


def end_message(job: Job) -> str:
    """Final state of a job, with a remedy if its Python lacks airsweep."""
    text = f"{job.id}: {job.state}, exit code {job.exit_code}"
    if job.exit_code and ("No module named" in job.message or job.exit_code == COMMAND_NOT_FOUND):
        return (
            f"{text}: the job's Python is missing, or lacks airsweep or its dependencies; give "
            "--python PATH of an environment on the cluster, or activate the environment before "
            "`ray start`"
        )
    if job.state == "FAILED" and not job.driver_started:
        return f"{text}: {job.message}"
    return text
