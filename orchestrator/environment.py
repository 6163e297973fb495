"""Environment variables: set for a moment, and those by which Ray tells a driver where it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set in this process for a moment, and in processes that are started meanwhile for good."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def joins_a_cluster() -> bool:
    """Will Ray be joined, rather than started here? Also by a process that is in one already."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def in_ray_job() -> bool:
    """Was this process started by `ray job submit`?"""
    return bool(os.environ.get(RAY_JOB))


def of_ray_job() -> set[str]:
    """Variables that the job gives to its workers, if this is one: Ray takes none twice."""
    job = json.loads(os.environ.get(RAY_JOB) or "{}")
    return set((job.get("runtime_env") or {}).get("env_vars") or ())
