"""Ray, started or joined: the cluster we are inside of, or a small local one."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from orchestrator.environment import environment, of_ray_job
from orchestrator.errors import Refused
from orchestrator.failures import first_line
from orchestrator.files import ROOT
from orchestrator.planning import Machine, ray_resources
from orchestrator.spec import ProcessResources, Resources
from orchestrator.store.artifacts import DEVICES

log = logging.getLogger(__name__)

# Read by Ray when it is imported. A silent Tune needs the first three.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Of what its daemons say to a driver: machines that are lost and workers that took too much
    # memory, without colours. The rest we tell in our own words.
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": "marked dead|memory pressure",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its C++ part warns of actors' arguments
}
AUTH_MODE = "RAY_AUTH_MODE"
DAEMONS = ("raylet", "gcs_server")  # of a local cluster: without them there is none
REACHED = 10.0  # seconds that a cluster has to take a connection: its head may just start anew
OBJECT_STORE_BYTES = 256 * 2**20  # artifacts travel by the store, not by Ray
# Linux allows 107 bytes for the path of a socket. The longest one of Ray, below its folder, is
# /session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store: 64 bytes.
LONGEST_PARENT = 107 - 64 - len("/air-12345678/ray")
# Of a local cluster: an idle worker is kept for the next task, which need not load torch again. Ray
# would end it after a second.
KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 60_000, "num_workers_soft_limit": 4}


@contextmanager
def ray_session(
    lost: Callable[[Path], None] = lambda logs: None, keep: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Machine, ...]]:
    """Join the cluster of RAY_ADDRESS, or start a local one; yields its machines.

    A local cluster listens on loopback, has no dashboard and ends with the block, and its files lie
    in a folder that this user alone can enter. Where this process is in a cluster already, that is
    used, and left as it is.

    Args:
        lost: called with the folder of Ray's logs, on a thread, when a local cluster has died. Some
            ten seconds later Ray ends this process, and no `finally` runs.
        keep: called at the end: are the logs of a local cluster kept, although it did not die?

    Raises:
        Refused: there is no cluster to be joined at RAY_ADDRESS, or it lets us not in.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # by whoever called from Python, and it stays his
        yield machines()
        return
    address = os.environ.get("RAY_ADDRESS")
    with _joined(address) if address else _started(lost, keep):
        for name in ("ray", "ray.tune", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield machines()


SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    told = {"AIRSWEEP_COMMIT", "AIRSWEEP_DIRTY", "AIRSWEEP_USER", "AIRSWEEP_SWEEP"}
    passed = {name: os.environ[name] for name in (told & os.environ.keys()) - of_ray_job()}
    _join(address, runtime_env={"env_vars": passed}, **SILENT)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started(lost: Callable[[Path], None], keep: Callable[[], bool]) -> Iterator[None]:
    """A local cluster. Its logs are kept if it did not start, if it died, and if `keep()`."""
    import ray

    # Workers import this package from wherever it lies here, installed or not.
    package_root = str(ROOT)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    # Not as a runtime_env: the workers that Ray starts at once would not fit it, and be idle.
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    folder = _private_folder()
    ray_folder = folder / "ray"  # which Ray opens to all users, so the one around it is closed
    logs = ray_folder / "session_latest" / "logs"
    try:
        with redirected(2, None), _on_loopback(), _own_token(), environment(given):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(ray_folder),
                _system_config=KEEP_WORKERS,
                **SILENT,
            )
    except Exception:
        log.error(f"Ray did not start; its logs are in {logs}")
        raise
    over, died = threading.Event(), threading.Event()

    def report_death() -> None:
        died.set()
        lost(logs)

    family = psutil.Process().children(recursive=True)
    daemons = [process for process in family if process.name() in DAEMONS]
    threading.Thread(target=_watch, args=(daemons, over, report_death), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        ray.shutdown()
        if not died.is_set() and not keep():
            shutil.rmtree(folder, ignore_errors=True)  # a last worker may write into it
        elif not died.is_set():
            log.error(f"a process died; Ray's logs are kept in {logs}")


def _private_folder() -> Path:
    """An empty folder that this user alone can enter, with a path that is short enough for Ray."""
    parent = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(os.fsencode(parent)) > LONGEST_PARENT:
        parent = "/tmp"
    os.makedirs(parent, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="air-", dir=parent))


def _join(address: str, **how: Any) -> None:
    """
    Raises:
        Refused: it cannot be joined; says why, and what to do.
    """
    import ray
    from ray.exceptions import AuthenticationError

    _reach(address)
    try:
        with redirected(2, None):  # what goes wrong still arrives as an exception
            ray.init(**how)
    except (ConnectionError, AuthenticationError) as problem:
        raise Refused(
            f"the Ray at {address} lets us not in ({first_line(problem)}); if it demands a token, "
            "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the one of that "
            "cluster; if it was just started, try again"
        ) from problem
    except (RuntimeError, ValueError) as problem:
        why = first_line(problem)
        if "Version mismatch" in str(problem):  # on seven lines
            why = (
                f"{' '.join(str(problem).split())}; install the same here, or let the cluster's "
                "own Python run it: `ray job submit ... -- python -m orchestrator`"
            )
        raise Refused(f"{address} cannot be joined: {why}") from problem


def _reach(address: str) -> None:
    """Ray itself would wait for minutes where nobody listens.

    Raises:
        Refused: nobody does.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in host:
        return
    give_up = time.monotonic() + REACHED
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=REACHED).close()
            return
        except OSError as problem:
            if time.monotonic() > give_up:
                raise Refused(
                    f"no Ray answers at {address}, the RAY_ADDRESS ({problem}); is the cluster up, "
                    "and is this its head and port, such as 10.0.0.1:6379?"
                ) from problem
        time.sleep(0.5)


@contextmanager
def _own_token() -> Iterator[None]:
    """Who lacks the token runs nothing on a cluster that is started meanwhile: others may be logged
    in on this machine. A token in the home folder, as Ray makes one, would change the user's other
    clusters. Where RAY_AUTH_MODE is set, it is as it says.
    """
    if os.environ.get(AUTH_MODE):
        yield
        return
    try:
        with environment({"RAY_AUTH_TOKEN": _token()}):
            yield
    finally:
        os.environ.pop(AUTH_MODE, None)  # Ray has set it


@cache
def _token() -> str:
    return secrets.token_hex(32)  # one a process, since Ray reads it once


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray listens on all addresses, but where it takes 127.0.0.1 for this machine's own. It has no
    option for that: this is what it does on macOS and Windows."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _watch(
    daemons: Sequence[psutil.Process], over: threading.Event, lost: Callable[[], None]
) -> None:
    while not over.wait(1.0):
        if not all(map(_lives, daemons)) and not over.is_set():
            lost()
            return


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def note_devices() -> None:
    """Note what Ray has given to this process, if it is a worker, for records of what it makes."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    given = ray.get_runtime_context().get_assigned_resources()
    known = {"cpu": given.get("CPU", 0.0), "gpu": given.get("GPU", 0.0)}
    os.environ[DEVICES] = json.dumps(known)


def machines() -> tuple[Machine, ...]:
    """What each machine of the cluster has."""
    import ray

    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])


def free_resources() -> dict[str, tuple[float, float]]:
    """Of each kind, what is free in the cluster and what there is."""
    import ray

    free = ray.available_resources()
    return {kind: (free.get(kind, 0.0), has) for kind, has in ray.cluster_resources().items()}


def ask_autoscaler(resources: Resources) -> None:
    """Ask for room for one of each kind that a sweep starts."""
    from ray.autoscaler.sdk import request_resources

    generators: list[ProcessResources] = [resources.generator] * (resources.generator.actors or 1)
    wants = [ray_resources(want) for want in [resources.trial, resources.encoding, *generators]]
    request_resources(bundles=[{kind: n for kind, n in want.items() if n} for want in wants])


@contextmanager
def redirected(descriptor: int, to: int | None) -> Iterator[None]:
    """What goes to a file descriptor goes to another one for a moment, or nowhere: parts of Ray
    print to 1 and 2 whatever they are told."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(descriptor)
        os.dup2(nowhere.fileno() if to is None else to, descriptor)
        try:
            yield
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)


class MemoryPeak:
    """Largest proportional memory of this process and its children, looked at once a second.

    The kernel counts proportional memory page by page, so only where resident memory has grown.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        return self.bytes

    def _watch(self) -> None:
        most = 0
        while not self._stop.wait(1.0):
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            resident = _total(family, lambda process: process.memory_info().rss)
            if resident > most * 1.01:
                most = resident
                self.bytes = max(self.bytes, _total(family, _proportional))


def _total(family: Sequence[psutil.Process], bytes_of: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in family:
        with suppress(psutil.Error):  # it ended meanwhile
            total += bytes_of(process)
    return total


def _proportional(process: psutil.Process) -> int:
    """Bytes of a process, pages that it shares with others counted in part."""
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", memory.uss))
