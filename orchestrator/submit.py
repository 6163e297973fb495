"""Sweeps as jobs of a Ray cluster: submitted, followed, stopped, listed.

Thin over Ray's JobSubmissionClient. A job is `python -m orchestrator run`, so to submit again is to
go on. What runs where is asked of the cluster each time; nothing is kept on this machine.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.asked import Asked
from orchestrator.parcel import Destination, Parcel, store_of
from orchestrator.place import FAILED, REFUSED, TERMINATED, Refused
from orchestrator.variables import environment

# Seconds for a connection, and for an answer at first and later; Ray's client would wait for ever.
CONNECTED, FIRST_ANSWER, ANSWER = 10.0, 20.0, 60.0
POLL = 0.5  # seconds between two looks at a job
LOOK_EVERY = 20.0  # seconds of silence, after which it is looked whether the job is still there
LOST_AFTER = 300.0  # seconds without the cluster, after which nobody follows any more
ATTEMPTS = 5  # to find a number that no other submitter takes at the same moment
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

    def jobs(self) -> list[Job]:
        """Those that run sweeps, the newest last."""
        with self._told():
            found = self._client.list_jobs()
        jobs = [_job(each) for each in found if SWEEP in (each.metadata or {})]
        return sorted(jobs, key=lambda job: job.started)

    def job(self, name: str) -> Job:
        """One by its id.

        Raises:
            ClusterLost: the cluster does not answer, or has no such job.
        """
        with self._told():
            return _job(self._client.get_job_info(name))

    def submit(
        self, asked: Asked, to: Destination, parcel: Parcel, env: Mapping[str, str], entry: str
    ) -> Job:
        """Start a sweep.

        Raises:
            Refused: it is running already, or the cluster takes no job.
        """
        sweep = f"{env['AIRSWEEP_PROJECT']}/{asked.spec.name}"
        store = store_of(asked, to.store)
        metadata = {SWEEP: sweep, USER: env["AIRSWEEP_USER"], STORE: store}
        runtime_env = {"working_dir": str(parcel.folder), "env_vars": dict(env)}
        for _ in range(ATTEMPTS):
            name = self._free_id(sweep, store)
            try:
                with _quiet(), self._told():
                    self._client.submit_job(
                        entrypoint=entry,
                        submission_id=name,
                        runtime_env=runtime_env,
                        metadata=metadata,
                    )
            except ClusterLost as problem:
                if "already exists" not in str(problem):
                    raise Refused(f"no job was started: {problem}") from problem
                continue  # somebody was faster, maybe with the same sweep
            return self.job(name)
        raise Refused(f"{self.address}: others take every number of {sweep}; try again")

    def run(
        self, entry: str, parcel: Parcel, env: Mapping[str, str], seconds: float
    ) -> tuple[str, Job]:
        """A job that is no sweep, from beginning to end: its log, and how it ended.

        Args:
            seconds: that it may take.

        Raises:
            ClusterLost: the cluster does not answer, or not in time.
        """
        runtime_env = {"working_dir": str(parcel.folder), "env_vars": dict(env)}
        with _quiet(), self._told():
            name = self._client.submit_job(entrypoint=entry, runtime_env=runtime_env)
        give_up = time.monotonic() + seconds
        while not (job := self.job(name)).over:
            if time.monotonic() > give_up:
                self.stop(name)
                raise ClusterLost(
                    f"{self.address}: {name} did not end within {seconds:.0f} s; is it full?"
                )
            time.sleep(POLL)
        return self.log_of(name), job

    def _free_id(self, sweep: str, store: str) -> str:
        """PROJECT-NAME-N: Ray takes an id once."""
        with self._told():
            found = self._client.list_jobs()
        for job in map(_job, found):
            if not job.over and (job.sweep, job.store) == (sweep, store):
                raise Refused(
                    f"{sweep} is {job.state} already as {job.id} of {job.user}, since "
                    f"{clock_time(job.started)}; follow it: {self.follow_command(job.id)}; stop "
                    f"it: {self.stop_command(job.id)}"
                )
        stem = sweep.replace("/", "-")
        pattern = re.compile(re.escape(stem) + r"-(\d+)")
        known = [pattern.fullmatch(each.submission_id or "") for each in found]
        return f"{stem}-{1 + max((int(one[1]) for one in known if one), default=0)}"

    def follow(
        self,
        name: str,
        write: Callable[[str], None],
        say: Callable[[str], None],
        lost_after: float = LOST_AFTER,
    ) -> Job:
        """Write a job's log as it grows, until the job ends.

        A connection that is lost is taken up where it broke.

        Args:
            write: is given pieces of the log.
            say: is told what is not in the log.
            lost_after: seconds without an answer.

        Raises:
            ClusterLost: no answer for so long; the job goes on.
        """
        log = _Log(self._client, name, write, self._told)
        pending = ""

        def over() -> bool:
            nonlocal pending
            job = self.job(name)
            if job.state == "PENDING" and job.message != pending:
                pending = job.message
                say(f"{name} is PENDING: {pending}")
            return job.over

        lost, heard = 0.0, -1  # since when, and how much of the log had come by then
        while True:
            try:
                with _quiet():
                    asyncio.run(log.follow(over))
                job = self.job(name)
            except ClusterLost as problem:
                now = time.monotonic()
                if log.shown > heard:
                    say(f"{problem}; trying again for {lost_after:.0f} s")
                    lost, heard = now, log.shown
                if now - lost > lost_after or "status code 404" in str(problem):
                    raise
                time.sleep(2 * POLL)
                continue
            if job.over:
                return job
            time.sleep(POLL)  # its log has ended, and its end is told at once

    def stop(self, name: str) -> Job:
        """Ask a job to end, and wait until its driver has."""
        with self._told():
            self._client.stop_job(name)
        while not (job := self.job(name)).over:
            time.sleep(POLL)
        return job

    def log_of(self, name: str) -> str:
        with self._told():
            return str(self._client.get_job_logs(name))

    def _told(self) -> AbstractContextManager[None]:
        return _told(self.address)

    def follow_command(self, name: str) -> str:
        return shlex.join(["ray", "job", "logs", "--address", self.address, "--follow", name])

    def stop_command(self, name: str) -> str:
        return shlex.join(["airsweep", "stop", name, "--address", self.address])


@contextmanager
def _told(address: str) -> Iterator[None]:
    """
    Raises:
        ClusterLost: what Ray's client or one of its HTTP libraries has raised.
    """
    from aiohttp import ClientError

    try:
        yield
    except ClusterLost:
        raise
    except (RuntimeError, OSError, ClientError) as problem:
        raise ClusterLost(f"{address}: {_reason(problem)}") from problem


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
        what = "is of Ray's client" if found.scheme == "ray" else "is none of Ray's job server"
        raise Refused(f"the address {address!r} {what}; allowed: {FORM}")
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
        answer = FIRST_ANSWER

        def _do_request(self, *what: Any, **how: Any) -> Any:
            return super()._do_request(*what, **{"timeout": (CONNECTED, self.answer), **how})

    try:
        # Ray prefers this variable, and then RAY_ADDRESS, to what it is given.
        with _quiet(), environment({"RAY_API_SERVER_ADDRESS": address}):
            client = Client(address)
            there = str(client._server_ray_version)
        client.answer = ANSWER
    except AuthenticationError as problem:
        raise Refused(f"{address} {_unknown_token(str(problem))}") from None
    except ConnectionError as problem:
        raise Refused(f"no Ray answers at {address}: {_reason(problem)}; allowed: {FORM}") from None
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as problem:
        raise Refused(
            f"{address} is no Ray cluster ({_reason(problem)}); allowed: {FORM}"
        ) from None
    if _minor(there) != _minor(ray.__version__):
        raise Refused(
            f"the cluster at {address} has Ray {there}, and airsweep here runs on Ray "
            f"{ray.__version__}; take a cluster of this version, or the airsweep for the other"
        )
    return client


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _unknown_token(problem: str) -> str:
    how = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with the cluster's token>"
    if "Authentication failed" in problem:
        return f"refuses the token that was sent; {how}"
    return f"wants a token, and none was sent; {how}"


def _reason(problem: BaseException) -> str:
    """What was first wrong, in a line."""
    while (cause := problem.__cause__ or problem.__context__) is not None:
        problem = cause
    lines = str(problem).strip().splitlines()
    if not lines:
        return type(problem).__name__
    # A status line of HTTP that is none.
    return lines[0].rstrip(".") if lines[0].isprintable() else "no HTTP is spoken there"


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's client tells each of its steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Log:
    """A log that is read on where it was left."""

    def __init__(
        self,
        client: Any,
        job: str,
        write: Callable[[str], None],
        told: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._client, self._job, self._write, self._told = client, job, write, told
        self.shown = 0  # characters

    async def follow(self, over: Callable[[], bool]) -> None:
        """Until it ends.

        Raises:
            ClusterLost: the connection did.
        """
        lines = self._client.tail_job_logs(self._job)
        passed = 0  # it begins at the beginning
        while (text := await self._next(lines, over)) is not None:
            new = text[max(0, self.shown - passed) :]
            passed += len(text)
            self.shown = max(self.shown, passed)
            if new:
                self._write(new)

    async def _next(self, lines: Any, over: Callable[[], bool]) -> str | None:
        step = asyncio.ensure_future(anext(lines, None))
        with self._told():
            while not (await asyncio.wait({step}, timeout=LOOK_EVERY))[0]:
                if over():  # its node is gone, and nobody will say more
                    step.cancel()
                    return None
            return step.result()


# ---------------------------------------------------------------- commands


def entrypoint(asked: Asked, to: Destination, spec: str, python: str) -> str:
    """What the job runs."""
    words = [python, "-m", "orchestrator", "run", spec, "--store", to.store]
    for option, value in (("--data-root", to.data_root), ("--tracking-uri", to.tracking_uri)):
        words += [option, value] if value else []
    return shlex.join([*words, *asked.options])


def next_commands(cluster: Cluster, job: Job, again: Sequence[str]) -> dict[str, str]:
    """What can be done about a job, and by which command."""
    name = job.sweep.removeprefix("default/")
    return {
        "follow": cluster.follow_command(job.id),
        "jobs": shlex.join(["airsweep", "jobs", "--address", cluster.address]),
        "stop": cluster.stop_command(job.id),
        "status": shlex.join(["airsweep", "status", name, "--store", job.store]),
        "table": shlex.join(["airsweep", "table", name, "--store", job.store]),
        "again": shlex.join(again),
    }


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
