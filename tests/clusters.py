"""A Ray cluster of two machines on this one, of which the second can be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.sweeps import environment

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
