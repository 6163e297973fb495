"""airsweep with work that takes no time: the real planner, driver, ledger, search, store and
tracker over a trainable that writes numbers from its key. Run like the command.

    python -m tests.helpers.trivial run sweep.yaml --store runs

Without words it runs the commands that it reads, each in a fork of itself; `Trivial` asks it to.
AIRSWEEP_GATE is a folder in which every driver says that it could begin, and waits until `open` is
there; a trial takes AIRSWEEP_TRIAL_SECONDS.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from air_core.normal import normalised
from air_core.specs import SyntheticFeaturesSpec, TrialSpec
from orchestrator.failures import Failure
from orchestrator.keys import artifact_key
from orchestrator.planning import requirements_of
from orchestrator.stages.trial import WHOLE, Segments, is_over
from orchestrator.store import ArtifactStore
from orchestrator.store.checkpoints import (
    drop_checkpoint,
    keep_checkpoint,
    learned_by,
    read_checkpoint,
)
from orchestrator.store.records import PREDICTIONS

TESTED = 40  # images
SLOTS = 3  # trials at a time


def built(store: ArtifactStore, spec: Any, *block: int) -> None:
    """Count how often something was computed, of images each block."""
    place = os.environ.get("AIRSWEEP_BUILT") or store.root / "built.log"
    with open(place, "a") as handle:
        handle.write(f"{'/'.join(map(str, (artifact_key(spec), *block)))}\n")


def objective(spec: TrialSpec, iterations: int) -> dict[str, float]:
    """As a trial that is no nearer to its end has it."""
    words = f"{artifact_key(learned_by(spec)).digest} after {iterations}"
    return {"mutual_information": random.Random(words).random()}


def run_trial(spec: TrialSpec, store: ArtifactStore, segments: Segments = WHOLE) -> None:
    lacking = [
        str(requirement.key)
        for requirement in requirements_of([spec])
        if requirement.have(store) < requirement.total()
    ]
    assert not lacking, f"{artifact_key(spec)} was started without {lacking}"
    time.sleep(float(os.environ.get("AIRSWEEP_TRIAL_SECONDS", "0")))
    begun = read_checkpoint(spec, store)
    end = normalised(spec).iterations if segments.until is None else segments.until
    with open(store.root / "iterations.log", "a") as handle:
        if not is_over(spec, store, segments.until):
            for iteration in range(begun.iterations, end):
                handle.write(f"{artifact_key(spec)} {iteration}\n")
    passed = {rung: objective(spec, rung) for rung in segments.rungs if rung <= end}
    if segments.until is not None:
        keep_checkpoint(spec, store, replace(begun, iterations=end, rungs=passed))
        return

    def build(folder: Path) -> dict[str, Any]:
        built(store, spec)
        rng = np.random.default_rng(int(artifact_key(spec).digest[:12], 16))
        labels = np.arange(TESTED, dtype=np.int32) % 10
        predictions = np.where(rng.random(TESTED) < 0.6, labels, 0).astype(np.int32)
        arrays = {"index": np.arange(TESTED), "predictions": predictions, "labels": labels}
        save_file(arrays, folder / PREDICTIONS)
        accuracy = float((predictions == labels).mean())
        return {
            "metrics": {"test/accuracy": accuracy, "pseudo/accuracy": 0.5, "time/train_s": 0.0},
            "curves": {"train/loss": [2.0, 1.0], "pseudo/accuracy": [0.4, 0.5]},
            "objectives": {"mutual_information": float(rng.random())},
            "per_class": [1.0] * 10,
            "rungs": {str(rung): found for rung, found in passed.items()},
        }

    store.get_or_build(spec, build)
    drop_checkpoint(spec, store)


def run_points(
    scheduler: Any, worker: Any, resources: Any, folder: Path, slots: Any, tick: Any, board: Any
) -> Any:
    """Some jobs at a time, in whose order a driver may die."""
    pass_gate()
    running: list[Any] = []
    while not scheduler.finished:
        tick()
        while len(running) < SLOTS and (job := scheduler.next()) is not None:
            running.append(job)
        if not running:
            break
        job = running.pop(0)
        said = os.environ.get("AIRSWEEP_SAID")  # of what all trials fail
        name = os.environ.get("AIRSWEEP_FAILS_AS", "data")
        for spec in () if said else job.trials:
            run_trial(spec, worker.store, job.segments)
        scheduler.complete(job.number, dict.fromkeys(job.keys, Failure(name, said)) if said else {})
    return types.SimpleNamespace(wall=0.0, overhead=None)


def pass_gate() -> None:
    if gate := os.environ.get("AIRSWEEP_GATE"):
        Path(gate, f"{os.getpid()}").touch()
        while not Path(gate, "open").exists():
            time.sleep(0.1)


def prepare(requirements: Any, context: Any) -> Iterator[None]:
    store, watcher = context.worker.store, context.watcher
    store.refresh_listings()
    for requirement in requirements:
        if not isinstance(requirement.spec, SyntheticFeaturesSpec):
            if requirement.have(store) < requirement.total():
                built(store, requirement.spec)
                store.get_or_build(requirement.spec, lambda folder: {})
                watcher.prepared(requirement, 0.0, {})
                yield
            continue
        for c, block in requirement.missing(store):
            built(store, requirement.spec, c, block)
            for spec, suffix in (
                (requirement.spec.images, ".parquet"),
                (requirement.spec, ".safetensors"),
            ):
                store.open_row(spec).publish(c, block, suffix, b"")
            watcher.prepared(requirement, 0.0, {"drawn": 1, "redrawn": 0, "holes": 0})
            yield


def at_once(result: Any) -> Generator[None, None, Any]:
    """A coroutine that ends at once."""
    yield from ()
    return result


def a_pixel() -> bytes:
    png = io.BytesIO()
    Image.new("RGB", (1, 1)).save(png, "PNG")
    return png.getvalue()


@contextmanager
def ray_session(
    lost: Any = None, keep: Callable[[], bool] = lambda: False
) -> Iterator[tuple[dict[str, float]]]:
    yield ({"CPU": 2.0},)
    if keep():
        print("Ray's logs are kept", file=sys.stderr)


class Progress:
    def __init__(self, watcher: Any) -> None:
        self.board = None

    def read(self) -> None: ...


class MemoryPeak:
    def stop(self) -> int:
        return 0


MODULES = {
    "orchestrator.execution._tuning": {"run_points": run_points},
    "orchestrator.execution._prepare": {
        "prepare": prepare,
        "lost_with": lambda requirement: [requirement.spec],
        "contact_sheet": lambda *of: at_once((a_pixel(), {})),
        "audit": lambda *of: at_once({}),
    },
    "orchestrator.cluster.session": {
        "ray_session": ray_session,
        "machines": lambda: ({"CPU": 2.0},),
        "free_resources": lambda: {"CPU": (2.0, 2.0)},
        "MemoryPeak": MemoryPeak,
    },
    "orchestrator.execution._progress": {"Progress": Progress},
    # 0.15 s for each trial, and 1.5 s for each run
    "orchestrator.reporting.charts": {
        "confusion_picture": lambda *of: b"",
        "pictures": lambda *of: {},
    },
    # Importing the real one costs a second for torch.
    "orchestrator.stages.context": {
        "Workshop": lambda store, *more: types.SimpleNamespace(store=store),
    },
}


class Trivial:
    """Runs commands, each in a fork of one process that has imported all: 0.3 s instead of 4 s.

    Args:
        inside: what the process begins with, such as `nsenter` into other mounts.
    """

    def __init__(self, inside: Sequence[str] = ()) -> None:
        from tests.helpers.sweeps import environment

        self._process = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.helpers.trivial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._folder = tempfile.TemporaryDirectory(prefix="trivial")

    def run(self, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        asked = {
            "words": [*map(str, words)],
            "environment": environment,
            "files": [*map(str, files)],
        }
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


def run_forked() -> None:
    """Run what is asked for on stdin, and say the exit code of each command on stdout."""
    import orchestrator

    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
        if module.name != "orchestrator.__main__" and module.name not in MODULES:
            with suppress(ImportError):  # of what MODULES leave out, and no command here needs
                importlib.import_module(module.name)
    assert threading.active_count() == 1  # a fork has one thread, and would wait for the others
    for line in sys.stdin:
        asked = json.loads(line)
        if (pid := os.fork()) == 0:
            os.environ.update(asked["environment"])
            for number, file in enumerate(asked["files"], 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv[1:] = asked["words"]
            main()
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    from orchestrator.__main__ import main

    sys.argv[0] = "airsweep"
    main() if sys.argv[1:] else run_forked()
