"""Ray clusters of several machines that can be lost and added, or that an autoscaler starts."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.clusters import NODE, QUICK, RAY, without_token
from tests.helpers.machines import Machine, Network
from tests.helpers.servers import free_port
from tests.helpers.sweeps import TIMEOUT, run_command, wait_for_stopped, wait_until

ALIVE = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=f"{sys.argv[1]}:6379").get_all_node_info(timeout=60).values()
print(sum(node.state == 0 for node in nodes) - 1)
"""


class Job:
    """A command on the laptop that submits a sweep and follows its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(TIMEOUT)
        raise AssertionError(f"the job does not end; its log:\n{self.log()}")

    def wait_for_log(self, text: str) -> None:
        def is_logged() -> bool:
            over = self.over()  # before the log is read
            assert text in self.log() or not over, self.log()
            return text in self.log()

        wait_until(is_logged, self.log)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Wait until the driver has stopped itself (`STOPPING`); it continues after the block."""

        def log() -> str:
            assert not self.over(), self.log()
            return self.log()

        driver = wait_for_stopped("stopping.py", log)
        yield
        driver.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return self._log.read_text()


class Nodes:
    """A cluster with a token: a head without cores, two machines of one core, and a laptop."""

    def __init__(self, network: Network) -> None:
        self._network = network
        token = network.shared / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.head, self.laptop = self._machine("head"), self._machine("laptop")
        self._start(
            self.head,
            *("--head", "--num-cpus=0", "--dashboard-host=0.0.0.0"),
            f"--system-config={json.dumps(QUICK)}",
        )
        self.machines: list[Machine] = []
        for _ in range(2):
            self.add()

    def _machine(self, kind: str) -> Machine:
        return self._network.machine(f"{kind}{len(self._network.machines)}")

    def _start(self, machine: Machine, *options: str) -> None:
        memory = f"--object-store-memory={NODE['object_store_memory']}"
        machine.run("ray", "start", memory, *options, **self.variables)

    def add(self) -> None:
        machine = self._machine("worker")
        self._start(machine, f"--address={self.head.name}:6379", "--num-cpus=1")
        self.machines.append(machine)

    def wait_for_count(self, count: int) -> None:
        """Wait until the head counts as many machines as alive, without itself."""
        wait_until(lambda: self._alive() == count, lambda: f"{self._alive()} machines", every=1)

    def _alive(self) -> int:
        done = self.head.run("python", "-c", ALIVE, self.head.name, **self.variables)
        return int(done.stdout)

    def close(self) -> None:
        for machine in (*self.machines, self.head, self.laptop):
            machine.lose()

    @property
    def address(self) -> str:
        return f"http://{self.head.name}:8265"

    def follow(self, *words: object) -> Job:
        """Start a command on the laptop, in its home folder."""
        log = self._network.folder / f"{self.laptop.name}.log"
        return Job(self.laptop.start(log, *words, **self.variables), log)


@contextmanager
def scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head without cores whose autoscaler starts up to two machines with one core.

    Uses Ray's provider for tests, which starts the machines as processes on this machine.
    """
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="scale", dir="/tmp"))
    empty: dict[str, Any] = {"node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "scaling",
        "max_workers": 2,
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
                "max_workers": 2,
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
    run_command(
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
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(folder) in word for word in process.cmdline()):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)
