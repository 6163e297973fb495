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

import pytest

from tests.helpers.servers import free_port
from tests.helpers.sweeps import environment, wait_until

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")

NODE = {"object_store_memory": 100 * 2**20}
# A silent machine counts as dead after a few seconds instead of Ray's default of 20.
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000}


def without_token(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """Set the variables of a cluster without a token; workers inherit them from their raylet."""
    variables = environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **more)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


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


@contextmanager
def joined(address: str, *options: str, inside: Sequence[str] = (), **more: str) -> Iterator[None]:
    """Add a machine to a cluster of one machine during the block.

    Args:
        options: options of `ray start`.
        inside: prefix of the command, such as `nsenter` into other mounts.
        more: environment variables.
    """
    from ray._raylet import GcsClient

    words = ["start", f"--address={address}", "--num-cpus=1", "--block", *options]
    store = f"--object-store-memory={NODE['object_store_memory']}"
    process = subprocess.Popen(
        [*inside, RAY, *words, store, "--include-log-monitor=false"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**{"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}),
        start_new_session=True,
    )

    def alive() -> int:
        nodes = GcsClient(address=address).get_all_node_info(timeout=60).values()
        return sum(node.state == 0 for node in nodes)

    def has_joined() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        return alive() == 2

    try:
        wait_until(has_joined, lambda: "the second machine does not join")
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # then the head hears of it at once
        process.communicate()
        wait_until(lambda: alive() == 1, lambda: "the second machine does not leave")
