"""Sweeps as jobs of a Ray cluster: submitted, followed, stopped, listed.

Over Ray's JobSubmissionClient. A job is `python -m orchestrator run`, so to submit again is to
go on. What runs where is asked of the cluster each time; nothing is kept on this machine.
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

from orchestrator.cluster.job_package import Destination
from orchestrator.environment import environment
from orchestrator.errors import FAILED, REFUSED, TERMINATED, Refused
from orchestrator.planning import SweepRequest
from orchestrator.store import smoke_store

CONNECTED, ANSWER = 10.0, 60.0  # seconds; Ray's client would wait for ever
POLL = 0.5  # seconds between two looks at a job
SILENCE = 20.0  # seconds without a line of the log, after which it is read anew
LOST_AFTER = 300.0  # seconds without the cluster, after which nobody follows any more
NO_PROGRAM = 127  # a shell's exit code where it finds none
NOT_ENDED = ("PENDING", "RUNNING")
SWEEP, USER, STORE = "airsweep.sweep", "airsweep.user", "airsweep.store"
# Of a job that failed: what Ray says where no driver came to run.
NOT_STARTED = (
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR",
)
FORM = "http://<head>:8265, the address of its dashboard"


class ClusterLost(Refused):
    """A cluster does not answer any more, or has forgotten a job."""


@dataclass(frozen=True)
class Job:
    """A sweep on a cluster, as the cluster knows it."""

    id: str
    sweep: str  # PROJECT/NAME
    user: str
    store: str
    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    exit_code: int | None  # airsweep's own; None: not ended
    started: float  # seconds since the epoch
    ended: float | None
    ran: bool  # there was a driver
    message: str

    @property
    def over(self) -> bool:
        return self.state not in NOT_ENDED

    def json(self) -> dict[str, Any]:
        kept = ("id", "sweep", "user", "store", "state", "exit_code", "started", "ended")
        return {name: getattr(self, name) for name in kept}


# ---------------------------------------------------------------- a cluster


class Cluster:
    """Jobs of the cluster at an address.

    Raises:
        Refused: nothing answers there, it is no Ray or another version, or it wants a token.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        self._client = _client(self.address)

    def _ask(self, method: str, *of: Any, **how: Any) -> Any:
        """Call a method of Ray's client.

        Raises:
            ClusterLost: the cluster does not answer, or refuses.
        """
        try:
            with _quiet():
                return getattr(self._client, method)(*of, **how)
        except (RuntimeError, OSError) as problem:
            raise ClusterLost(f"{self.address}: {_reason(problem)}") from problem

    def jobs(self) -> list[Job]:
        """Those that run sweeps, the newest last."""
        jobs = [_job(one) for one in self._ask("list_jobs") if SWEEP in (one.metadata or {})]
        return sorted(jobs, key=lambda job: job.started)

    def job(self, name: str) -> Job:
        """One by its id.

        Raises:
            ClusterLost: the cluster does not answer, or has no such job.
        """
        return _job(self._ask("get_job_info", name))

    def submit(
        self, asked: SweepRequest, to: Destination, folder: Path, env: Mapping[str, str], entry: str
    ) -> Job:
        """Start a sweep.

        Args:
            folder: the package of the job.
            entry: what the job runs.

        Raises:
            Refused: it is running already, or the cluster takes no job.
        """
        sweep = f"{env['AIRSWEEP_PROJECT']}/{asked.spec.name}"
        store = str(smoke_store(to.store) if asked.smoke else to.store).rstrip("/")
        known = list(map(_job, self._ask("list_jobs")))
        for job in known:
            if not job.over and (job.sweep, job.store) == (sweep, store):
                raise Refused(
                    f"{sweep} is {job.state} already as {job.id} of {job.user}, since "
                    f"{clock_time(job.started)}; follow it: {self.follow_command(job.id)}; stop "
                    f"it: {self.stop_command(job.id)}"
                )
        stem = sweep.replace("/", "-")  # Ray takes an id once
        numbers = [re.fullmatch(rf"{re.escape(stem)}-(\d+)", job.id) for job in known]
        name = f"{stem}-{1 + max((int(one[1]) for one in numbers if one), default=0)}"
        metadata = {SWEEP: sweep, USER: env["AIRSWEEP_USER"], STORE: store}
        return self._start(entry, folder, env, submission_id=name, metadata=metadata)

    def _start(self, entry: str, folder: Path, env: Mapping[str, str], **more: Any) -> Job:
        runtime_env = {"working_dir": str(folder), "env_vars": dict(env)}
        try:
            name = self._ask("submit_job", entrypoint=entry, runtime_env=runtime_env, **more)
        except (ClusterLost, ValueError) as problem:
            faster = "; another submitter was faster: try again" * (
                "already exists" in str(problem)
            )
            raise Refused(f"no job was started: {problem}{faster}") from problem
        return self.job(name)

    def run(
        self, entry: str, folder: Path, env: Mapping[str, str], seconds: float
    ) -> tuple[str, Job]:
        """A job that is no sweep, from beginning to end: its log, and how it ended.

        Args:
            seconds: that it may take.

        Raises:
            Refused: the cluster takes no job, does not answer, or not in time.
        """
        job, deadline = self._start(entry, folder, env), time.monotonic() + seconds
        while not job.over:
            if time.monotonic() > deadline:
                self.stop(job.id)
                raise Refused(
                    f"{self.address}: {job.id} did not end within {seconds:.0f} s; is it full?"
                )
            time.sleep(POLL)
            job = self.job(job.id)
        return self.log_of(job.id), job

    def follow(
        self,
        name: str,
        write: Callable[[str], None],
        say: Callable[[str], None],
    ) -> Job:
        """Write a job's log as it grows, until the job ends.

        After a lost connection the log goes on where it broke.

        Args:
            write: is given pieces of the log.
            say: is told what is not in the log.

        Raises:
            ClusterLost: no answer for LOST_AFTER; the job goes on.
        """
        shown = 0  # characters

        async def tail() -> None:
            nonlocal shown
            passed = 0  # Ray sends a log from its beginning
            lines = self._client.tail_job_logs(name)
            while (text := await self._next(lines)) is not None:
                new = text[max(0, shown - passed) :]
                passed += len(text)
                shown = max(shown, passed)
                if new:
                    write(new)

        lost, pending = None, ""
        while True:
            try:
                with _quiet():
                    asyncio.run(tail())
                job, lost = self.job(name), None
            except ClusterLost as problem:
                if lost is None:
                    say(f"{problem}; trying again for {LOST_AFTER:.0f} s")
                    lost = time.monotonic()
                if time.monotonic() - lost > LOST_AFTER or "status code 404" in str(problem):
                    raise
            else:
                if job.over:
                    return job
                if job.state == "PENDING" and job.message != pending:
                    pending = job.message
                    say(f"{name} is PENDING: {pending}")
            time.sleep(POLL)

    async def _next(self, lines: Any) -> str | None:
        """The next piece of a log; None: it has ended, or says nothing any more, as where its node
        is gone."""
        from aiohttp import ClientError

        try:
            found: str | None = await asyncio.wait_for(anext(lines, None), SILENCE)
            return found
        except TimeoutError:
            return None
        except (RuntimeError, OSError, ClientError) as problem:
            raise ClusterLost(f"{self.address}: {_reason(problem)}") from problem

    def stop(self, name: str) -> Job:
        """Ask a job to end, and wait until its driver has."""
        self._ask("stop_job", name)
        while not (job := self.job(name)).over:
            time.sleep(POLL)
        return job

    def log_of(self, name: str) -> str:
        return str(self._ask("get_job_logs", name))

    def follow_command(self, name: str) -> str:
        return shlex.join(["ray", "job", "logs", "--address", self.address, "--follow", name])

    def stop_command(self, name: str) -> str:
        return shlex.join(["airsweep", "stop", name, "--address", self.address])


def clock_time(seconds: float) -> str:
    """In this machine's zone, as people and scripts read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _job(found: Any) -> Job:
    metadata = found.metadata or {}
    state = str(found.status.value)
    ended = found.end_time and found.end_time / 1000
    return Job(
        id=found.submission_id or "",
        sweep=metadata.get(SWEEP, ""),
        user=metadata.get(USER, ""),
        store=metadata.get(STORE, ""),
        state=state,
        exit_code=_exit_code(state, found),
        started=(found.start_time or 0) / 1000,
        ended=ended or None,
        ran=found.driver_exit_code is not None,
        message=found.message or "",
    )


def _exit_code(state: str, found: Any) -> int | None:
    """airsweep's own exit code; Ray's commands know 0 and 1 only."""
    driver: int | None = found.driver_exit_code
    if state in NOT_ENDED:
        return None
    if driver is not None:
        return driver if driver >= 0 else 128 - driver  # as a shell has it, of a signal
    if state == "STOPPED":
        return TERMINATED
    return REFUSED if found.error_type in NOT_STARTED else FAILED


# ---------------------------------------------------------------- the way there


def _checked(address: str) -> str:
    """
    Raises:
        ValueError: there is none.
        Refused: of another form than Ray's jobs need.
    """
    if not address:
        raise ValueError(f"which cluster? --address or RAY_API_SERVER_ADDRESS; allowed: {FORM}")
    found = urlsplit(address)
    if "@" in address:  # not shown
        raise Refused("the address holds a password; Ray takes a token from RAY_AUTH_TOKEN_PATH")
    if found.scheme not in ("http", "https") or not found.hostname:
        raise Refused(f"the address {address!r} is none of Ray's job server; allowed: {FORM}")
    return address.rstrip("/")


def _client(address: str) -> Any:
    """Ray's client, which waits no longer than ANSWER.

    Raises:
        Refused: it cannot be used, and why.
    """
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *what: Any, **how: Any) -> Any:
            return super()._do_request(*what, **{"timeout": (CONNECTED, ANSWER), **how})

    try:
        # Ray prefers this variable, and then RAY_ADDRESS, to what it is given.
        with _quiet(), environment({"RAY_API_SERVER_ADDRESS": address}):
            client = Client(address)
            there = str(client._server_ray_version)
    except AuthenticationError as problem:
        why = "wants a token, and none was sent"
        if "Authentication failed" in str(problem):
            why = "refuses the token that was sent"
        raise Refused(
            f"{address} {why}; export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with the "
            "cluster's token>"
        ) from None
    except ConnectionError as problem:
        raise Refused(f"no Ray answers at {address}: {_reason(problem)}; allowed: {FORM}") from None
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as problem:
        raise Refused(
            f"{address} is no Ray cluster ({_reason(problem)}); allowed: {FORM}"
        ) from None
    if there.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise Refused(
            f"the cluster at {address} has Ray {there}, and airsweep here runs on Ray "
            f"{ray.__version__}; take a cluster of this version, or the airsweep for the other"
        )
    return client


def _reason(problem: BaseException) -> str:
    """What was first wrong, in a line."""
    while (cause := problem.__cause__ or problem.__context__) is not None:
        problem = cause
    lines = str(problem).strip(" .\n").splitlines()
    if not lines:
        return type(problem).__name__
    # Of a traceback of the server the end says what is wrong.
    line = lines[-1 if lines[0].endswith("(most recent call last):") else 0]
    # A status line of HTTP that is none is not printable.
    return line if line.isprintable() else "no HTTP is spoken there"


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's client tells each of its steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- commands


def entrypoint(asked: SweepRequest, to: Destination, spec: str, python: str) -> str:
    """What the job runs."""
    words = [python, "-m", "orchestrator", "run", spec, "--store", to.store]
    for option, value in (("--data-root", to.data_root), ("--tracking-uri", to.tracking_uri)):
        words += [option, value] if value else []
    return shlex.join([*words, *asked.options])


def ending(job: Job) -> str:
    """How a job ended, and what to do where there was no driver, or one of another Python."""
    text = f"{job.id}: {job.state}, exit code {job.exit_code}"
    if job.exit_code and ("No module named" in job.message or job.exit_code == NO_PROGRAM):
        return (
            f"{text}: the job's Python has no airsweep, or not what it needs; give --python PATH, "
            "that of the environment on the cluster, or activate this before `ray start`"
        )
    if job.state == "FAILED" and not job.ran:
        return f"{text}: {job.message}"
    return text
