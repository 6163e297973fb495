"""Ray clusters on this machine: one that takes jobs, one of two nodes of which one can be lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.sweeps import environment

BIN = Path(sys.executable).parent
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
# A machine that says nothing is given up after seconds, where Ray's own defaults wait for 20.
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000}


class TwoNodes:
    """`address` for RAY_ADDRESS; the first node has the driver."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK},
        )
        self._second = self._cluster.add_node(**NODE)
        self.address: str = self._cluster.address

    def kill_second(self) -> None:
        """kill -9 of its raylet; its workers go with it."""
        for raylet in self._second.all_processes["raylet"]:
            raylet.process.kill()

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    for name, value in environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0").items():
        monkeypatch.setenv(name, value)  # workers inherit it from their raylet
    cluster = TwoNodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_head(**more: str) -> Iterator[str]:
    """A one-node cluster on loopback that takes jobs; only its own processes are ended afterwards.

    Args:
        more: for its environment.

    Yields:
        The address for jobs.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    port = free_port()
    known = {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        subprocess.run(
            [
                BIN / "ray",
                "start",
                "--head",
                f"--port={free_port()}",
                "--node-ip-address=127.0.0.1",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={port}",
                # Its default port is taken where another Ray runs; jobs then find no agent.
                f"--dashboard-agent-listen-port={free_port()}",
                "--num-cpus=2",
                f"--temp-dir={folder}",
            ],
            env=environment(**{**known, **more}),
            check=True,
            capture_output=True,
            timeout=120,
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in Path("/proc").iterdir():
            try:
                line = (process / "cmdline").read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if folder in line:
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)
