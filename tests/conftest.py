"""Small real things that tests share: the embedded CLIP, the digits, one local Ray."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two threads on a busy two-core machine are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RAY_ADDRESS", "AIRSWEEP_STORE"):
    os.environ.pop(name, None)

from collections.abc import Iterator
from pathlib import Path

import pytest

from air_core.specs import Ref, TrialSpec
from orchestrator import presets
from orchestrator.resolve import Resolver


@pytest.fixture(scope="session")
def tiny_clip():
    from air_core.backbone import load_backbone, tiny_folder

    return load_backbone(tiny_folder())


@pytest.fixture(scope="session")
def resolver(tmp_path_factory) -> Resolver:
    return Resolver(tmp_path_factory.mktemp("digests") / "digests.json", None)


@pytest.fixture(scope="session")
def trial(resolver):
    """A trial on digits by method, with keys replaced."""

    def make(method: str, **changes: object) -> TrialSpec:
        flat = presets.defaults(method, {})
        return resolver.trial({**flat, **{k.replace("__", "."): v for k, v in changes.items()}})

    return make


@pytest.fixture(scope="session")
def ray_session() -> Iterator[dict[str, float]]:
    from orchestrator import session

    with session.ray_session() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def digits_ref(resolver) -> Ref:
    from air_core.datasets import get_dataset

    return resolver.dataset(get_dataset("digits"))


ROOT = Path(__file__).parents[1]
