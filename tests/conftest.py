"""Fixtures of many tests: the embedded CLIP, the digits, one local Ray, an S3 server."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two threads on a busy two-core machine are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray gives its workers a niceness of 15: beside other programs they would get 3 % of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RAY_ADDRESS", "AIRSWEEP_STORE"):
    os.environ.pop(name, None)

import ctypes
import random
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psutil
import pytest
from hypothesis.internal.conjecture import providers

from air_core.tools.arithmetic import sums_in_one_order
from orchestrator.environment import environment
from orchestrator.planning import Resolver
from orchestrator.planning.resources import this_machine
from orchestrator.spec import presets
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore, open_store
from tests.helpers.sweeps import in_this_process

if TYPE_CHECKING:
    from tests.helpers.machines import Network
    from tests.helpers.servers import S3Server

sums_in_one_order()  # before any test computes

# Every process that a test starts inherits this variable, and no process with it outlives the run.
RUN = "AIRSWEEP_TEST_RUN"
IS_FIRST = RUN not in os.environ  # the workers of pytest-xdist inherit it as well
RUN_ID = os.environ.setdefault(RUN, uuid.uuid4().hex)
os.environ["SPT_NOENV"] = "1"  # otherwise Ray's agents overwrite their environment with their title

# Examples are the same in each run (`--hypothesis-profile=default` draws others), and a busy
# machine may take any time for them.
hypothesis.settings.register_profile(
    "airsweep",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("airsweep")
# It would also draw constants of those modules of airsweep that are loaded, so that a new setting
# or another order of the tests would change the examples.
providers._get_local_constants = lambda: providers._local_constants


def pytest_configure() -> None:
    if IS_FIRST:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # as after Ctrl-C


def pytest_unconfigure() -> None:
    if IS_FIRST:
        end_processes_of_this_run()


def end_processes_of_this_run() -> None:
    """Kill every process that the tests have started and that still runs."""
    deadline = time.monotonic() + 60
    while found := processes_of_this_run():
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert time.monotonic() < deadline, f"these processes do not end: {found}"
        time.sleep(0.1)


def processes_of_this_run() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN) == RUN_ID:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed the global generators, so that a test draws the same numbers alone and after others."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpus(request, monkeypatch) -> None:
    """Hide the GPUs of this machine from the sweeps of tests that are not marked for them."""
    if this_machine()["GPU"] and not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def tiny_clip():
    from air_core.backbone.loading import load_backbone
    from air_core.models.weights import tiny_folder

    return load_backbone(tiny_folder())


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Chunks of a few rows, where a plain reference has all rows; whole trials have one chunk."""
    monkeypatch.setattr("air_core.tools.chunks.ELEMENTS", 20)
    monkeypatch.setattr("air_core.auxiliary.COSINES", 100)


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
def features(trial, tmp_path_factory) -> Path:
    """A store with the features of the digits."""
    from orchestrator.stages.context import WorkerContext
    from orchestrator.stages.features import build

    store = ArtifactStore(tmp_path_factory.mktemp("features") / "runs")
    build(trial("fpl").features, WorkerContext(store))
    return store.root


@pytest.fixture
def encoded(features, tmp_path) -> Path:
    """A new store, where a sweep of the digits starts with its trials, seconds earlier."""
    return Path(shutil.copytree(features, tmp_path / "runs"))


@pytest.fixture(scope="module", autouse=True)
def freed_memory() -> Iterator[None]:
    """Return memory to the system after each module; glibc keeps 0.2 GB of a model of CLIP."""
    yield
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from orchestrator.cluster import session

    with session.ray_session():
        yield


# Files, the longest first.
LONG = """
    test_nodes test_families_sweep test_preflight test_slurm test_submit test_trusted test_runs
    test_stream test_api test_encoded_blocks test_chaos test_docs
    test_bucket test_unlabelled_sweeps test_tracking test_browsing test_any_trial test_bundles
    test_onnx test_deploy test_classify
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first: a long file at the end would leave the other cores idle."""
    place = {name: number for number, name in enumerate(LONG.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def drawn_digits(tmp_path_factory) -> Path:
    """A folder of ready images: 16 drawn digits per class, white on black, shifted and rotated."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from air_core.datasets.digits import CLASSNAMES

    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for digit, name in enumerate(CLASSNAMES):
        (folder / name).mkdir()
        for index in range(16):
            image = Image.new("L", (32, 32))
            font = ImageFont.load_default(size=int(rng.integers(24, 32)))
            position = (8 + int(rng.integers(-3, 4)), int(rng.integers(-4, 2)))
            ImageDraw.Draw(image).text(position, str(digit), fill=255, font=font)
            rotated = image.rotate(float(rng.uniform(-12, 12))).convert("RGB")
            rotated.save(folder / name / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def wires() -> Iterator[Network]:
    """A network for virtual machines of a test, which all see the same disk."""
    from tests.helpers.machines import network

    with network() as found:
        yield found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server on loopback with the bucket `air`, set as endpoint in the environment."""
    from tests.helpers.servers import S3Server

    server = S3Server()
    known = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
    }
    with environment(known):
        server.start()
        server.make_bucket("air")
        yield server
        server.stop()


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch) -> str:
    """The URI of an empty store; its caches are in the folder of the test."""
    monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / "mirrors"))
    return f"s3://air/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def machine(address, tmp_path, monkeypatch) -> Callable[[str], ArtifactStore]:
    """Open the store at the fixture `address` on a machine, given by name."""

    def opened(name: str) -> ArtifactStore:
        monkeypatch.setenv("AIRSWEEP_CACHE", str(tmp_path / name))
        return open_store(address)

    return opened


@pytest.fixture
def command() -> Callable[..., tuple[int, str, str]]:
    """Run airsweep in this process; returns its exit code, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        done = in_this_process([*map(str, words)])
        return done.returncode, done.stdout, done.stderr

    return run
