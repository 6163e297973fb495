"""Environment variables and file descriptors of this process, and what Ray sets for a driver."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
originals: dict[int, int] = {}  # copies of the descriptors that are redirected now


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


@contextmanager
def redirect_descriptor(descriptor: int, to: int | None) -> Iterator[None]:
    """Redirect a file descriptor to another one, or to /dev/null (None), during the block.

    Parts of Ray write to descriptors 1 and 2 directly, so replacing `sys.stdout` is not enough.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w") as null:
        original = originals[descriptor] = os.dup(descriptor)
        os.dup2(null.fileno() if to is None else to, descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(original, descriptor)
            originals.pop(descriptor, None)
            os.close(original)


def joins_existing_cluster() -> bool:
    """Whether a run uses an existing Ray cluster instead of starting a local one."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def in_ray_job() -> bool:
    """Whether `ray job submit` started this process."""
    return bool(os.environ.get(RAY_JOB))
