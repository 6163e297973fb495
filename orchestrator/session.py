"""Ray, started or joined: the cluster we are inside of, or a small local one."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from orchestrator.fit import Machine
from orchestrator.variables import environment, of_ray_job

# Read by Ray when it is imported. A silent Tune needs the first three.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its C++ part warns of actors' arguments
}
AUTH_MODE = "RAY_AUTH_MODE"
DAEMONS = ("raylet", "gcs_server")  # of a local cluster: without them there is none
OBJECT_STORE_BYTES = 256 * 2**20  # artifacts travel by the store, not by Ray
# Of a local cluster: an idle worker is kept for the next task, which need not load torch again. Ray
# would end it after a second.
KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 60_000, "num_workers_soft_limit": 4}


@contextmanager
def ray_session(lost: Callable[[], None] = lambda: None) -> Iterator[tuple[Machine, ...]]:
    """Join the cluster of RAY_ADDRESS, or start a local one; yields its machines.

    A local cluster listens on loopback, has no dashboard and ends with the block. Where this
    process is in a cluster already, that is used, and left as it is.

    Args:
        lost: called on a thread when a local cluster has died. Some ten seconds later Ray ends this
            process, and no `finally` runs.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    joined = bool(os.environ.get("RAY_ADDRESS"))
    import ray

    if ray.is_initialized():  # by whoever called from Python, and it stays his
        yield machines()
        return
    # Workers import this package from wherever it lies here, installed or not.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if joined:
        told = {"AIRSWEEP_COMMIT", "AIRSWEEP_DIRTY", "AIRSWEEP_USER", "AIRSWEEP_SWEEP"}
        passed = {name: os.environ[name] for name in (told & os.environ.keys()) - of_ray_job()}
        with _muted_errors():
            ray.init(runtime_env={"env_vars": passed}, **quiet)
    else:
        package_root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # Not as a runtime_env: the workers that Ray starts at once would not fit it, and be idle.
        given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with _muted_errors(), _on_loopback(), _own_token(), environment(given):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config=KEEP_WORKERS,
                **quiet,
            )
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    over = threading.Event()
    if not joined:
        family = psutil.Process().children(recursive=True)
        daemons = [process for process in family if process.name() in DAEMONS]
        threading.Thread(target=_watch, args=(daemons, over, lost), daemon=True).start()
    try:
        yield machines()
    finally:
        over.set()
        ray.shutdown()


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


def machines() -> tuple[Machine, ...]:
    """What each machine of the cluster has."""
    import ray

    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])


@contextmanager
def _muted_errors() -> Iterator[None]:
    """File descriptor 2 goes nowhere for a moment: Ray's C++ part greets there, whatever its
    level. What goes wrong still arrives as an exception."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
            resident = sum(map(_resident, family))
            if resident > most * 1.01:
                most = resident
                self.bytes = max(self.bytes, sum(map(_proportional, family)))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it ended meanwhile


def _proportional(process: psutil.Process) -> int:
    """Bytes of a process, pages that it shares with others counted in part."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0  # it ended meanwhile
    return int(getattr(memory, "pss", memory.uss))
