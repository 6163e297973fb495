"""Environment variables: temporary changes, and the variables that Ray sets for a driver."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables during the context; processes started within it inherit them permanently."""
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


def joins_existing_cluster() -> bool:
    """Whether a run uses an existing Ray cluster instead of starting a local one."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def in_ray_job() -> bool:
    """Whether `ray job submit` started this process."""
    return bool(os.environ.get(RAY_JOB))


def ray_job_variables() -> set[str]:
    """Variables that this Ray job sets for its workers; Ray refuses to set them again."""
    job = json.loads(os.environ.get(RAY_JOB) or "{}")
    return set((job.get("runtime_env") or {}).get("env_vars") or ())
