"""Ray clusters on this machine: one that takes jobs, one that others join for a while."""

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
# A machine that says nothing is given up after seconds, where Ray's own defaults wait for 20.
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000}


class OneNode:
    """`address` for RAY_ADDRESS; others join it for a while."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK},
        )
        self.address: str = self._cluster.address

    @contextmanager
    def joined(
        self, *options: str, inside: Sequence[str] = (), **more: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A machine for as long as the block lasts; its raylet's process group is yielded.

        Args:
            options: of `ray start`.
            inside: what the command begins with, such as `nsenter` into other mounts.
            more: of its environment.
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
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self._until(before, None)

    def alive(self) -> int:
        """How many machines the head counts."""
        return sum(node["Alive"] for node in self._cluster.global_state.node_table())

    def _until(self, count: int, process: subprocess.Popen[bytes] | None) -> None:
        def is_met() -> bool:
            assert process is None or process.poll() is None, process.communicate()[0].decode()
            return self.alive() == count

        wait_until(is_met, lambda: f"{self.alive()} machines, not {count}")

    def shutdown(self) -> None:
        self._cluster.shutdown()


def without_token(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """The environment of a cluster that is started here: workers inherit it from their raylet."""
    known = environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **more)
    for name, value in known.items():
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
    """A cluster of one machine, by `ray start --head`; its address.

    Args:
        jobs: it takes jobs, and its address is that for them.
        cpus: that it has.
        more: of its environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets need a short path
    address = f"127.0.0.1:{free_port()}"
    known = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}
    words = (
        f"--port={address.partition(':')[2]}",
        "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={free_port()}",
        f"--include-dashboard={jobs}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={NODE['object_store_memory']}",
        f"--temp-dir={folder}",
    )
    if jobs:
        address = f"127.0.0.1:{free_port()}"
        words += ("--dashboard-host=127.0.0.1", f"--dashboard-port={address.partition(':')[2]}")
        # Its default port is taken where another Ray runs; jobs then find no agent.
        words += (f"--dashboard-agent-listen-port={free_port()}",)
        known["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**known),
        start_new_session=True,
    )
    try:
        _listens(address, process)
        yield f"http://{address}" if jobs else address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _listens(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        with suppress(OSError):
            socket.create_connection((host, int(port)), timeout=5).close()
            return True
        return False

    wait_until(is_there, lambda: f"no head at {address}")
