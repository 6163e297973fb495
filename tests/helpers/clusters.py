"""Ray clusters on this machine: one that accepts jobs, one that machines join temporarily."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import free_port
from tests.helpers.sweeps import environment, wait_until

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
# A silent machine counts as dead after a few seconds instead of Ray's default of 20.
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000}


class OneNode:
    """A cluster with one node, which further machines can join temporarily.

    `address` is its RAY_ADDRESS.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK},
        )
        self.address: str = self._cluster.address

    @contextmanager
    def joined(self, *options: str, inside: Sequence[str] = (), **more: str) -> Iterator[None]:
        """Add a machine during the block.

        Args:
            options: options of `ray start`.
            inside: prefix of the command, such as `nsenter` into other mounts.
            more: environment variables.
        """
        words = ["start", f"--address={self.address}", "--num-cpus=1", "--block", *options]
        store = f"--object-store-memory={NODE['object_store_memory']}"
        before = self.alive()
        process = subprocess.Popen(
            [*inside, RAY, *words, store, "--include-log-monitor=false"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(**more),
            start_new_session=True,
        )
        try:
            self._until(before + 1, process)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self._until(before, None)

    def alive(self) -> int:
        """Number of machines that the head counts as alive."""
        return sum(node["Alive"] for node in self._cluster.global_state.node_table())

    def _until(self, count: int, process: subprocess.Popen[bytes] | None) -> None:
        def is_met() -> bool:
            assert process is None or process.poll() is None, process.communicate()[0].decode()
            return self.alive() == count

        wait_until(is_met, lambda: f"{self.alive()} machines, not {count}")

    def shutdown(self) -> None:
        self._cluster.shutdown()


def without_token(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """Set the variables of a cluster without a token; workers inherit them from their raylet."""
    variables = environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **more)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@contextmanager
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneNode]:
    without_token(monkeypatch)
    cluster = OneNode()
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def head(jobs: bool = False, cpus: int = 1, **more: str) -> Iterator[str]:
    """Start a cluster with one machine by `ray start --head`; yields its address.

    Args:
        jobs: start a dashboard, and yield the address for jobs.
        cpus: number of CPUs.
        more: environment variables.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets need a short path
    address = f"127.0.0.1:{free_port()}"
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}
    words = (
        f"--port={address.partition(':')[2]}",
        "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={free_port()}",
        f"--include-dashboard={jobs}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={NODE['object_store_memory']}",
        f"--temp-dir={folder}",
    )
    addresses = [address]
    if jobs:
        address, agent = (f"127.0.0.1:{free_port()}" for _ in range(2))
        # The dashboard refuses a job if the agent, which starts later, is not there in 10 seconds.
        addresses = [address, agent]
        words += ("--dashboard-host=127.0.0.1", f"--dashboard-port={address.partition(':')[2]}")
        # Another Ray on this machine may use the default port; jobs would then find no agent.
        words += (f"--dashboard-agent-listen-port={agent.partition(':')[2]}",)
        variables["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**variables),
        start_new_session=True,
    )
    try:
        for each in addresses:
            _wait_for_connection(each, process)
        yield f"http://{address}" if jobs else address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_connection(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")

    def accepts_connection() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        with suppress(OSError):
            socket.create_connection((host, int(port)), timeout=5).close()
            return True
        return False

    wait_until(accepts_connection, lambda: f"no head at {address}")
