"""airsweep with work that takes no time: the real planner, driver, event log, search, store and
tracker over trials that derive their numbers from their key. Run it like the command:

    python -m tests.helpers.trivial run sweep.yaml --store runs

Without arguments it reads commands from stdin and runs each in a fork of itself, for `Trivial`,
which tests use: `airsweep(..., trivial=True)`.

Environment:
    AIRSWEEP_SAID, AIRSWEEP_FAILS_AS: message and class of the failure of all trials.
    AIRSWEEP_BUILT: the file to which `count_build` appends.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from air_core.tools.seal import BLANK, sealed
from orchestrator.execution._queue import Made, Row
from orchestrator.failures import Failure
from orchestrator.keys import artifact_key
from orchestrator.planning import requirements_of
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore
from orchestrator.store.records import PREDICTIONS
from tests.helpers.sweeps import environment

TESTED = 40  # images
SLOTS = 3  # trials at a time


def count_build(store: ArtifactStore, spec: Any, *block: int) -> None:
    """Append a line for each time that an artifact, or a block of images, is computed."""
    file = os.environ.get("AIRSWEEP_BUILT") or store.root / "built.log"
    with open(file, "a") as handle:
        handle.write(f"{'/'.join(map(str, (artifact_key(spec), *block)))}\n")


def run_trial(spec: TrialSpec, store: ArtifactStore) -> None:
    missing = [
        str(requirement.key)
        for requirement in requirements_of([spec])
        if requirement.have(store) < requirement.total()
    ]
    assert not missing, f"{artifact_key(spec)} was started without {missing}"

    def build(folder: Path) -> dict[str, Any]:
        count_build(store, spec)
        rng = np.random.default_rng(int(artifact_key(spec).digest[:12], 16))
        labels = np.arange(TESTED, dtype=np.int32) % 10
        predictions = np.where(rng.random(TESTED) < 0.6, labels, 0).astype(np.int32)
        arrays = {"index": np.arange(TESTED), "predictions": predictions, "labels": labels}
        save_file(arrays | {"text": predictions}, folder / PREDICTIONS)
        accuracy = float((predictions == labels).mean())
        return {
            "metrics": {
                **dict.fromkeys(("test/accuracy", "test/accuracy_text"), accuracy),
                **{"pseudo/accuracy": 0.5, "time/train_s": 0.0},
            },
            "curves": {"train/loss": [2.0, 1.0], "pseudo/accuracy": [0.4, 0.5]},
            "objectives": {"mutual_information": float(rng.random())},
            "per_class": [1.0] * 10,
        }

    store.get_or_build(spec, build)


def run_points(
    scheduler: Any,
    worker: Any,
    resources: Any,
    max_jobs: Any,
    tick: Any,
    progress_actor: Any,
) -> None:
    """Run a few jobs at a time, in a fixed order, so that a driver can die between any two."""
    running: list[Any] = []
    while not scheduler.is_complete:
        tick()
        while len(running) < SLOTS and (job := scheduler.next()) is not None:
            running.append(job)
        if not running:
            break
        job = running.pop(0)
        message = os.environ.get("AIRSWEEP_SAID")
        failures: dict[str, Failure] = {}
        if message:
            name = os.environ.get("AIRSWEEP_FAILS_AS", "data")
            failures = dict.fromkeys(job.keys, Failure(name, message))
        else:
            for spec in job.trials:
                run_trial(spec, worker.store)
        scheduler.complete(job.number, failures)


class Workers:
    """Makes everything at once."""

    def __init__(self, worker: Any, *others: Any) -> None:
        self.worker = worker

    def stream(self, kind: str, size: int, specs: Any) -> Stream:
        return Stream(self.worker.store, specs)


class Stream:
    problem: Exception | None = None

    def __init__(self, store: ArtifactStore, specs: Any) -> None:
        self.store, self.specs = store, specs
        self.rows: list[tuple[Row, list[Made]]] = []

    def release(self, row: Row, thrift: int) -> None:
        spec, made = self.specs[row.key], []
        for index in row.indices:
            if spec.rows:
                count_build(self.store, spec, index, row.block)
                for each in spec.rows:
                    self.store.open_row(each).publish(index, row.block, sealed(BLANK.encode()))
            else:
                count_build(self.store, spec)
                self.store.get_or_build(spec, lambda folder: {})
            made.append(Made(0.0, FACTS if spec.rows else {"startup": 0.0}))
        self.rows.append((row, made))

    def returned(self) -> list[tuple[Row, list[Made]]]:
        rows, self.rows = self.rows, []
        return rows

    def end(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


FACTS: dict[str, Any] = {
    **dict.fromkeys(("redrawn", "holes", "pairs", "encoded"), 0),
    **{"drawn": 1, "startup": 0.0, "on_device": 0.0},
}


def pixel_png() -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (1, 1)).save(png, "PNG")
    return png.getvalue()


@contextmanager
def ray_session(
    on_death: Any = None, keep_logs: Callable[[], bool] = lambda: False
) -> Iterator[tuple[dict[str, float]]]:
    yield ({"CPU": 2.0},)
    if keep_logs():
        print("Ray's logs are kept", file=sys.stderr)


class ProgressMonitor:
    actor = None

    def read(self) -> dict[tuple[str, str], tuple[Any, ...]]:
        return {}


class MemoryPeak:
    def stop(self) -> int:
        return 0


MODULES = {
    "orchestrator.execution._tuning": {"run_points": run_points},
    "orchestrator.execution._stream": {
        "Workers": Workers,
        "draw_contact_sheet": lambda *arguments: (pixel_png(), {}),
        "find_copies": lambda *arguments: [],
        "start_task": lambda function, *arguments: partial(function),
        "ended_tasks": lambda functions: [(each, each) for each in functions],
    },
    "orchestrator.cluster.session": {
        "check_address": lambda: None,
        "kill_local_ray": lambda: None,
        "ray_session": ray_session,
        "machines": lambda: ({"CPU": 2.0},),
        "free_resources": lambda: {"CPU": (2.0, 2.0)},
        "waits_for_resources": lambda: False,
        "MemoryPeak": MemoryPeak,
    },
    "orchestrator.execution._progress": {"ProgressMonitor": ProgressMonitor},
    # The real report takes 1.5 s.
    "orchestrator.reporting.html_report": {"page": lambda *arguments: ""},
}


class Trivial:
    """Runs commands, each in a fork of one process that has imported all modules, so that none
    takes the seconds of a start.

    Args:
        inside: the prefix of the process's command, such as `nsenter` into other mounts.
    """

    def __init__(self, inside: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.helpers.trivial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._folder = tempfile.TemporaryDirectory(prefix="trivial")

    def run(self, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command with environment variables of this process and `more`."""
        files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        request = {
            "arguments": [*map(str, arguments)],
            "environment": environment(**more),
            "folder": os.getcwd(),
            "files": [*map(str, files)],
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


@cache
def of_this_process() -> Trivial:
    """For all tests of a process; ends with it."""
    return Trivial()


def run_forked() -> None:
    """Run the commands that stdin has, and print the exit code of each to stdout."""
    inherited = {*os.environ}
    import orchestrator

    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
        if module.name != "orchestrator.__main__" and module.name not in MODULES:
            with suppress(ImportError):  # of names that MODULES lack and no command here uses
                importlib.import_module(module.name)
    with redirect_stdout(io.StringIO()), suppress(SystemExit):  # code versions, once for all forks
        sys.argv[1:] = ["plan", "quickstart", "--store", "/nowhere"]
        main()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # MLflow imports it when it connects
    import scipy.special  # noqa: F401  # tables need it

    assert threading.active_count() == 1  # a fork has one thread, and would wait for others
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            for name in inherited - request["environment"].keys():
                os.environ.pop(name, None)  # imports set others, such as MLflow's settings
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            for number, file in enumerate(request["files"], 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv[1:] = request["arguments"]
            code = 0
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            sys.stdout.flush()
            os._exit(code)  # Python would free what the fork shares, which takes a second
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    from orchestrator.__main__ import main

    sys.argv[0] = "airsweep"
    main() if sys.argv[1:] else run_forked()
