"""Ray sessions: join the cluster of RAY_ADDRESS, or start a private local cluster."""

from __future__ import annotations

import ctypes
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from orchestrator.environment import environment, redirect_descriptor
from orchestrator.errors import Refused
from orchestrator.failures import first_line
from orchestrator.files import ROOT
from orchestrator.planning import Machine, ray_resources
from orchestrator.plugins import Plugin, use_plugins
from orchestrator.spec import ProcessResources, Resources
from orchestrator.store.artifacts import DEVICES

log = logging.getLogger(__name__)

# Variables that Ray reads when it is imported. The first three silence Ray Tune.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    # After Ctrl-C a call of Ray would start a second Ray, which warns on the terminal.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ code warns about arguments of actors otherwise
}
# Of the daemons' messages a driver prints lost machines and workers that used too much memory;
# airsweep reports everything else itself.
PRINTED = "marked dead|memory pressure"
AUTH_MODE = "RAY_AUTH_MODE"
DAEMONS = ("raylet", "gcs_server")  # a local cluster is dead without one of these
CONNECT_TIMEOUT = 10.0  # seconds; the head of a cluster may be restarting
OBJECT_STORE_BYTES = 256 * 2**20  # small, because artifacts travel through the store
# Linux allows 107 bytes for the path of a socket. The longest one of Ray, below its folder, is
# /session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store: 64 bytes.
MAX_PARENT_LENGTH = 107 - 64 - len("/air-12345678/ray")
START_TRIES = 2  # of a local cluster: two that start at the same moment can take one port
# A local cluster keeps idle workers, which have torch loaded, for the next task. Ray's default ends
# them after a second.
KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 60_000, "num_workers_soft_limit": 4}

# Parameters of glibc's `mallopt`, and bytes: arrays up to this size are kept, as much as this.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_ARRAY, KEPT_MEMORY = 32 * 2**20, 256 * 2**20


@contextmanager
def ray_session(
    on_death: Callable[[Path], None] = lambda logs: None,
    keep_logs: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Machine, ...]]:
    """Join the cluster of RAY_ADDRESS, or start a local cluster; yields the machines.

    A local cluster listens on loopback, has no dashboard, writes to a folder that only this user
    can read, and ends with the block. If Ray is initialized in this process already, the session
    uses that cluster and leaves it running.

    Args:
        on_death: called on a thread with the folder of Ray's logs if a local cluster dies. About
            ten seconds later Ray ends this process without running any `finally`.
        keep_logs: called at the end; returns whether to keep the logs of a local cluster that did
            not die.

    Raises:
        Refused: no cluster at RAY_ADDRESS can be joined, or it rejects the token; or no local
            cluster starts.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    from ray._private import ray_logging, worker

    if ray.is_initialized():  # by the Python code that called airsweep
        yield machines()
        return
    address = os.environ.get("RAY_ADDRESS")
    # Ray's own filter was set by variables when a caller imported Ray.
    before = worker.stdout_deduplicator
    worker.stdout_deduplicator = ray_logging.LogDeduplicator(0, PRINTED, skip_re=".")
    try:
        with _existing_cluster(address) if address else _local_cluster(on_death, keep_logs):
            for name in ("ray", "ray.tune"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield machines()
    finally:
        worker.stdout_deduplicator = before


SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def _existing_cluster(address: str) -> Iterator[None]:
    """Join a cluster.

    Raises:
        Refused: it cannot be joined; the message has the reason and a remedy.
    """
    import ray
    from ray.exceptions import AuthenticationError

    # Ray's dashboard shows this name for a driver that no job has started.
    name = {"job_name": os.environ.get("AIRSWEEP_SWEEP", "airsweep")}
    config = ray.job_config.JobConfig(metadata=name)
    _wait_for_connection(address)
    try:
        with redirect_descriptor(2, None):  # errors still arrive as exceptions
            ray.init(job_config=config, **SILENT)
    except (ConnectionError, AuthenticationError) as problem:
        raise Refused(
            f"the Ray cluster at {address} rejected the connection ({first_line(problem)}); if it "
            "requires a token, export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the "
            "cluster's token; if it has just started, try again"
        ) from problem
    except (RuntimeError, ValueError) as problem:
        reason = " ".join(str(problem).split())  # seven lines if the versions of Ray differ
        raise Refused(f"{address} cannot be joined: {reason}") from problem
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local_cluster(
    on_death: Callable[[Path], None], keep_logs: Callable[[], bool]
) -> Iterator[None]:
    """Start a local cluster. Its logs stay if it fails to start, dies, or `keep_logs()` is true."""
    import ray

    # Workers import the packages of this checkout, which may not be installed.
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Not by a runtime_env: Ray could not use the workers that it starts in advance.
    variables = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    folder = _private_folder()
    ray_folder = folder / "ray"  # readable by all users; the folder around it is private
    logs = ray_folder / "session_latest" / "logs"
    for tries_left in reversed(range(START_TRIES)):
        try:
            with redirect_descriptor(2, None), _private(), environment(variables):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(ray_folder),
                    _system_config=KEEP_WORKERS,
                    **SILENT,
                )
            break
        except Exception as problem:
            kill_local_ray()  # the processes that have started
            # After its time limits Ray raises one of these, or a plain Exception.
            is_late = type(problem) is Exception or isinstance(problem, RuntimeError | TimeoutError)
            if not is_late:
                raise  # such as a full disk
            if not tries_left:
                reason = first_line(problem).partition(". ")[0]
                raise Refused(
                    f"Ray did not start on this machine ({reason}); if the machine is busy, try "
                    f"again later (Ray's logs: {logs})"
                ) from problem
    closing, died = threading.Event(), threading.Event()

    def report_death() -> None:
        died.set()
        on_death(logs)

    watched = (_daemons(), closing, report_death)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    try:
        yield
    finally:
        closing.set()
        ray.shutdown()
        if not died.is_set() and not keep_logs():
            shutil.rmtree(folder, ignore_errors=True)  # a worker may still write into the folder
        elif not died.is_set():
            log.error(f"a process died; Ray's logs are kept in {logs}")


def _private_folder() -> Path:
    """Make an empty folder that only this user can read, with a path that is short enough."""
    parent = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(os.fsencode(parent)) > MAX_PARENT_LENGTH:
        parent = "/tmp"
    os.makedirs(parent, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="air-", dir=parent))


def check_address() -> None:
    """Check that a cluster answers at RAY_ADDRESS, if it is set.

    Raises:
        Refused: it is no address, or no connection within CONNECT_TIMEOUT.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return
    if address.startswith("http") or (":" not in address and address not in ("auto", "local")):
        raise Refused(
            f"RAY_ADDRESS={address} is no address of a cluster; set it to host and port of the "
            "head, such as 10.0.0.1:6379, or unset it"
        )
    _wait_for_connection(address)


def _wait_for_connection(address: str) -> None:
    """Wait until the address accepts a connection; Ray itself would try for minutes.

    Raises:
        Refused: no connection within CONNECT_TIMEOUT.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in host:
        return
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
            return
        except OSError as problem:
            if time.monotonic() > deadline:
                raise Refused(
                    f"no Ray cluster answers at RAY_ADDRESS={address} ({problem}); check that the "
                    "cluster is up and that this is its head and port, such as 10.0.0.1:6379"
                ) from problem
        time.sleep(0.5)


@contextmanager
def _private() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 instead of all addresses, and require a random token, since other
    users may share the machine; and without processes that only larger clusters need.

    Ray has no options for these. It listens on loopback on macOS and Windows, where the constant is
    false. The token is passed by a variable: a token file in the home folder, which Ray would
    write, would affect the user's other clusters. If RAY_AUTH_MODE is set, it decides instead.
    """
    from ray._private import node, parameter, ray_constants

    # The monitor of an autoscaler, the server of the dashboard, which would have no page, and the
    # log monitor, whose lines a driver without `log_to_driver` ignores: 2 CPU seconds.
    fewer = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    changes: list[tuple[Any, str, Any]] = [
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        (parameter, "RayParams", fewer),
        (node.Node, "start_api_server", lambda *_, **__: None),
    ]
    auth_mode = os.environ.get(AUTH_MODE)
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        with environment({} if auth_mode else {"RAY_AUTH_TOKEN": _token()}):
            yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)
        if not auth_mode:
            os.environ.pop(AUTH_MODE, None)  # Ray has set it


@cache
def _token() -> str:
    return secrets.token_hex(32)  # one token per process: Ray reads it only once


def _daemons() -> list[psutil.Process]:
    """The daemons among the child processes, some of which end while they are listed."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() in DAEMONS:
                found.append(process)
    return found


def kill_local_ray() -> None:
    """Kill a local cluster that this process has started, before the process exits at once.

    Without it, Ray's agents, which are children of the raylet, would run for another minute.
    """
    for daemon in _daemons():
        with suppress(psutil.NoSuchProcess):
            for process in daemon.children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # the others are still to be killed
                    process.kill()
            daemon.kill()


def _watch(
    daemons: Sequence[psutil.Process], closing: threading.Event, on_death: Callable[[], None]
) -> None:
    while not closing.wait(1.0):
        if not all(map(_is_alive, daemons)) and not closing.is_set():
            on_death()
            return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def data_context() -> Iterator[None]:
    """Within the block, Ray Data makes datasets that print nothing and pass each row on at once."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # else a thread reads it each second
    context.target_max_block_size = 1  # else rows are joined until their source ends
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with DataContext.current(context):
        yield


def prepare_worker(variables: Mapping[str, str], plugins: Sequence[Plugin]) -> None:
    """Prepare a worker for a sweep: open_clip, its plugins, and what the records of its artifacts
    have: the assigned CPUs and GPUs, and the user and commit of the driver (`variables`)."""
    import ray

    from air_core.backbone.loading import import_open_clip_alone

    _keep_freed_memory()
    import_open_clip_alone()
    use_plugins(plugins)
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    assigned = ray.get_runtime_context().get_assigned_resources()
    devices = {"cpu": assigned.get("CPU", 0.0), "gpu": assigned.get("GPU", 0.0)}
    os.environ |= {**variables, DEVICES: json.dumps(devices)}


def _keep_freed_memory() -> None:
    """Let this process use memory again that it has freed, instead of returning it to the system.

    glibc returns freed arrays of some megabytes, and the system clears each page of the next ones:
    a fifth of the time in which the tiny models draw images and compute denoising errors.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_ARRAY)
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


def machines() -> tuple[Machine, ...]:
    """Resources of each machine of the cluster."""
    import ray

    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])


def free_resources() -> dict[str, tuple[float, float]]:
    """Free and total amount of each resource in the cluster."""
    import ray

    free = ray.available_resources()
    return {kind: (free.get(kind, 0.0), total) for kind, total in ray.cluster_resources().items()}


def waits_for_resources() -> bool:
    """Whether a process waits for resources of the cluster; one that starts has them."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    waiting = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    return bool(waiting.ray_task_actor_demand or waiting.placement_group_demand)


def request_autoscaling(resources: Resources) -> None:
    """Request resources for one trial, one encoding task and all generators of a sweep."""
    from ray.autoscaler.sdk import request_resources

    generators: list[ProcessResources] = [resources.generator] * (resources.generator.actors or 1)
    processes = [resources.trial, resources.encoder_resources, *generators]
    requests = [ray_resources(process) for process in processes]
    request_resources(bundles=[{kind: n for kind, n in r.items() if n} for r in requests])


class MemoryPeak:
    """Largest proportional memory of this process and its children, sampled every two seconds.

    Reading proportional memory is slow (the kernel visits every page), so it is read only after the
    resident memory has grown.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> int:
        self._stop.set()
        return self.bytes

    def _watch(self) -> None:
        most = 0
        while not self._stop.wait(2.0):
            resident = _total(lambda process: process.memory_info().rss)
            if resident > most * 1.02:
                most = resident
                # With each shared page divided among its users.
                self.bytes = max(self.bytes, _total(lambda each: each.memory_full_info().pss))


def _total(bytes_of: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):  # the process has ended
            total += bytes_of(process)
    return total
