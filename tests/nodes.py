"""Ray clusters of several machines on this one: lost and added, or come when asked for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clusters import BIN, NODE, QUICK, RAY, without_token
from tests.servers import free_port
from tests.sweeps import TIMEOUT


class Nodes:
    """A head without cores, and machines of one core each: raylets of their own."""

    def __init__(self, machines: int = 2) -> None:
        from ray.cluster_utils import Cluster
        from ray.job_submission import JobSubmissionClient

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={
                **NODE,
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_port": free_port(),
                "dashboard_agent_listen_port": free_port(),
                "_system_config": QUICK,
            },
        )
        self._machines: list[Any] = []
        for _ in range(machines):
            self.add()
        self.client = JobSubmissionClient(f"http://{self._cluster.head_node.webui_url}")

    def add(self) -> None:
        self._machines.append(
            self._cluster.add_node(**NODE, dashboard_agent_listen_port=free_port())
        )

    def kill(self, number: int) -> None:
        """kill -9 of a machine's raylet; its workers go with it."""
        _kill(self._machines[number], ("raylet",))

    def lose_everything(self) -> None:
        """All of it at once, the driver of a job too."""
        for node in (*self._machines, self._cluster.head_node):
            _kill(node, tuple(node.all_processes))

    def submit(self, *arguments: str) -> str:
        """A job without a working directory, which raylets of one machine would remove from under
        each other; its id."""
        words = [sys.executable, "-m", "orchestrator", *arguments]
        return str(self.client.submit_job(entrypoint=shlex.join(words)))

    def wait(self, job: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not self.client.get_job_status(job).is_terminal():
            assert time.monotonic() < deadline, self.logs(job)
            time.sleep(0.2)

    def exit_code(self, job: str) -> int | None:
        return self.client.get_job_info(job).driver_exit_code

    def logs(self, job: str) -> str:
        return str(self.client.get_job_logs(job))

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _kill(node: Any, names: tuple[str, ...]) -> None:
    for name in names:
        for one in node.all_processes.get(name, []):
            family = psutil.Process(one.process.pid).children(recursive=True)
            one.process.kill()
            for child in family:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


@contextmanager
def nodes(monkeypatch: pytest.MonkeyPatch, machines: int = 2) -> Iterator[Nodes]:
    without_token(monkeypatch, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    cluster = Nodes(machines)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def scaling(monkeypatch: pytest.MonkeyPatch, most: int = 2) -> Iterator[str]:
    """The address of a head without cores, whose autoscaler starts machines of one core on this
    one: Ray's own, over its provider for tests."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="scale", dir="/tmp"))
    empty: dict[str, Any] = {"node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "scaling",
        "max_workers": most,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": "f" * 51 + "00000",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "upscaling_speed": 1.0,
        "head_node_type": "head",
        "available_node_types": {
            "head": {**empty, "resources": {"CPU": 0}, "max_workers": 0},
            "machine": {
                **empty,
                "resources": {"CPU": 1, "object_store_memory": NODE["object_store_memory"]},
                "max_workers": most,
            },
        },
        **{
            f"{name}_commands": []
            for name in (
                *("initialization", "setup", "head_setup", "worker_setup"),
                *("head_start_ray", "worker_start_ray"),
            )
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    without_token(monkeypatch)
    subprocess.run(
        [
            *(RAY, "start", "--head", "--num-cpus=0"),
            f"--port={port}",
            f"--dashboard-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
            "--object-store-memory=100000000",
            f"--temp-dir={folder}/ray",
            f"--autoscaling-config={folder}/config.yaml",
        ],
        env={**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(folder) in word for word in process.cmdline()):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)
