"""Run real sweeps, in subprocesses if the command starts anything, and read their results."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from air_core.tools.seal import intact, sealed_json
from orchestrator.files import file_digest

TIMEOUT = 900  # seconds; long enough for a busy machine, short enough to end a hanging test


def search_sweep(folder: Path, block: int = 8) -> str:
    """Cells without training, with training, and with a search of the number of images.

    Args:
        folder: folder of ready images.
        block: images to encode at a time.
    """
    return f"""
grid: {{method: [zero_shot, fpl, air_fpl]}}
fixed: {{generator: "folder:{folder}", generation.block: {block}, train.steps: 20}}
search:
  points: 4
  width: 2
  space:
    images_per_class: {{values: [4, 8, 16]}}
    fusion_weight: {{min: 0.1, max: 0.9}}
seeds: [1, 2]
resources: {{generator: {{actors: 1}}}}
"""


def many_trials(count: int) -> str:
    """A sweep with `count` trials that take a moment each."""
    rates = [round(0.001 * n, 3) for n in range(1, count + 1)]
    return f"""
grid: {{train.learning_rate: {rates}}}
fixed: {{method: fpl, train.steps: 200}}
seeds: [1]
"""


def wait_until(
    condition: Callable[[], object], details: Callable[[], object] = lambda: "", every: float = 0.05
) -> None:
    """Wait for a condition.

    Args:
        details: describes the state if the condition is not met within TIMEOUT.
        every: seconds between two evaluations.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, details()
        time.sleep(every)


def write_sweep(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(f"version: 1\nname: {name}\n{body}")
    return file


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **more}


# Commands that run in this process, because starting Python takes seconds: those that start no
# process, and with the fixture `ray_session` those that start only Ray.
READ_ONLY = ("cache", "init", "plan", "report", "status", "table")
WITH_RAY = (*READ_ONLY, "run")


def airsweep(
    *arguments: str | Path, check: bool = True, trivial: bool = False, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run airsweep.

    Args:
        check: assert that the exit code is 0.
        trivial: with work that takes no time; see `tests.helpers.trivial`.
        more: environment variables.
    """
    words = [*map(str, arguments)]
    has_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if trivial:
        from tests.helpers.trivial import of_this_process

        done = of_this_process().run(*words, **more)
    elif words[0] in (WITH_RAY if has_ray else READ_ONLY) and not more:
        done = in_this_process(words)
    else:
        done = python("-m", "orchestrator", *words, check=False, **more)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(
    *arguments: str | Path, check: bool = True, inside: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run Python.

    Args:
        arguments: such as `-c`, a program and its arguments.
        check: assert that the exit code is 0.
        inside: a prefix of the command, such as `nsenter` into other mounts.
        more: environment variables.
    """
    command = [*inside, sys.executable, *map(str, arguments)]
    return run_command(command, check, env=environment(**more))


def run_command(
    command: Sequence[str], check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command. If it fails or does not end, the error shows its output.

    Args:
        check: assert that the exit code is 0.
        options: of `subprocess.run`.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False, **options
        )
    except subprocess.TimeoutExpired as expired:
        for output in (expired.stdout, expired.stderr):
            expired.add_note((output or b"").decode())
        raise
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def in_this_process(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run airsweep in this process."""
    from orchestrator.__main__ import main

    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["airsweep", *words])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


# Runs a module. Its process stops after the first event with a name, or about a stage's artifact.
STOPPING = """
import os, runpy, signal, sys
from orchestrator.store.event_log import EventLog

def append_and_stop(log, event, **fields):
    global stop
    time = append(log, event, **fields)
    if stop in (event, fields.get("stage")):
        stop = ""
        os.kill(os.getpid(), signal.SIGSTOP)
    return time

stop, module = sys.argv[1:3]
del sys.argv[1:3]
append, EventLog.append = EventLog.append, append_and_stop
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@contextmanager
def stopped_at(
    event: str, *words: str | Path, module: str = "orchestrator", **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start airsweep; during the block its process is stopped (SIGSTOP), so a test is never late.

    Args:
        event: the process stops when it has logged the first event with this name, or the first
            about an artifact of this stage.
        module: a module with the same arguments.
        options: of `subprocess.Popen`.
    """
    command = [sys.executable, "-c", STOPPING, event, module, *map(str, words)]
    process = subprocess.Popen(command, **options)

    def is_stopped() -> bool:
        if process.poll() is not None:
            output = process.communicate() if process.stderr else ""
            raise AssertionError(f"exit code {process.returncode} before {event}", output)
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED

    wait_until(is_stopped, lambda: f"no {event}")
    yield process
    process.send_signal(signal.SIGCONT)


def stopping_python(folder: Path, event: str) -> tuple[Path, Path]:
    """Write an interpreter whose first `-m orchestrator` stops itself at an event, as `stopped_at`.

    Returns:
        The interpreter, and the script that `wait_for_stopped` searches.
    """
    folder.mkdir()
    interpreter, script = folder / "python", folder / "stopping.py"
    script.write_text(STOPPING)
    interpreter.write_text(f"""#!/bin/sh
if [ "$1 $2" = "-m orchestrator" ] && mkdir {folder}/started 2>/dev/null; then
    shift 2
    exec {sys.executable} {script} {event} orchestrator "$@"
fi
exec {sys.executable} "$@"
""")
    interpreter.chmod(0o755)
    return interpreter, script


def wait_for_stopped(script: str | Path, log: Callable[[], str]) -> psutil.Process:
    """Wait until a process that runs STOPPING has stopped itself.

    Args:
        script: the file with STOPPING, as the command line of the process has it.
        log: output of the process; raises an error once the process cannot stop any more.
    """
    found: list[psutil.Process] = []

    def is_stopped() -> bool:
        log()
        found[:] = [
            process
            for process in psutil.process_iter(["status", "cmdline"])
            if process.info["status"] == psutil.STATUS_STOPPED
            and str(script) in (process.info["cmdline"] or ())
        ]
        return bool(found)

    wait_until(is_stopped, log, every=0.3)
    return found[0]


def continue_with(process: psutil.Process, number: signal.Signals) -> None:
    """Let a stopped process continue once it has received a signal, which it then handles first."""

    def is_received() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        pending = int(status.partition("ShdPnd:")[2].split()[0], 16)
        return bool(pending >> (number - 1) & 1) or process.status() != psutil.STATUS_STOPPED

    with suppress(OSError, psutil.NoSuchProcess):  # the signal has ended it
        wait_until(is_received)
        process.send_signal(signal.SIGCONT)


def run_and_kill(
    spec: Path, store: Path, victim: str, event: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a sweep and kill a process of Ray with SIGKILL.

    Args:
        victim: name of the process, or the beginning of its title.
        event: the process is killed as soon as it exists after this event (see `stopped_at`).
        more: environment variables.
    """
    store.mkdir(parents=True, exist_ok=True)
    with (store / "stderr.txt").open("w+") as stderr:

        def is_killed() -> bool:
            assert process.poll() is None, f"ended before {victim} started"
            for worker in _workers(process.pid, victim)[:1]:
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    worker.kill()
                    return True
            return False

        options = {"stdout": subprocess.DEVNULL, "stderr": stderr, "env": environment(**more)}
        try:
            with stopped_at(event, "run", spec, "--store", store, **options) as process:
                killed = is_killed()
            wait_until(lambda: killed or is_killed(), lambda: f"no {victim}", every=0.02)
            code = process.wait(TIMEOUT)
        except Exception as error:
            error.add_note(Path(stderr.name).read_text())
            raise
        return subprocess.CompletedProcess(process.args, code, stderr=Path(stderr.name).read_text())


def _workers(driver: int, name: str) -> list[psutil.Process]:
    """Child processes of a driver by name, or by the beginning of their title."""
    workers = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if process.name() == name or process.cmdline()[0].startswith(name):
                workers.append(process)
    return workers


def events(store: Path, name: str) -> list[dict[str, Any]]:
    file = store / "sweeps" / "default" / name / "events.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]


def result_slots(recorded: list[dict[str, Any]]) -> list[str]:
    """Slot of each result in the event log. A slot twice means that its trial ran twice.

    A trial can write its record before a kill and have its event in the next run: the event is
    then `trial_reused`, and the state of the trial is `recovered`.
    """
    return [one["slot"] for one in recorded if one["event"] in ("trial_done", "trial_reused")]


def begun_twice(log: Path, calm_log: Path) -> tuple[Counter[str], Counter[str]]:
    """Count the trials and the preparations that a sweep started more often than a calm run.

    Each log has one line per started trial or preparation. Both logs must have the same lines.
    """
    started, calm = (Counter(file.read_text().splitlines()) for file in (log, calm_log))
    assert started.keys() == calm.keys(), log
    assert started >= calm, log
    trials: Counter[str] = Counter()
    prepared: Counter[str] = Counter()
    for line, times in (started - calm).items():
        (trials if line.startswith("trials/") else prepared)[line] = times
    return trials, prepared


def table(store: Path, name: str) -> list[dict[str, Any]]:
    done = airsweep("table", name, "--store", store, "--format", "json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def children(store: Path, name: str) -> list[Any]:
    """The trial runs of a sweep, from the MLflow database of the store."""
    return all_runs(store, f"tags.`air.sweep` = '{name}' and tags.`air.kind` = 'trial'")


def all_runs(store: Path, query: str = "") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("air/default")
    return list(client.search_runs([experiment.experiment_id], query, max_results=1000))


def damaged_files(store: Path) -> list[Path]:
    """Artifact files that match neither their own checksum nor their digest in the record."""
    damaged = []
    for file in (store / "artifacts").glob("*/*/[!.]*/[!.]*"):
        record = file.with_name("record.json")
        if file != record and record.is_file():
            digest = json.loads(record.read_text())["files"].get(file.name)
            if file_digest(file) != digest:
                damaged.append(file)
        elif not intact(file.read_bytes()):
            damaged.append(file)
    return damaged


def record_again(folder: Path) -> None:
    """Update the digests in the record of an artifact to its changed files."""
    path = folder / "record.json"
    record = json.loads(path.read_text())
    record["files"] = {name: file_digest(folder / name) for name in record["files"]}
    path.write_bytes(sealed_json(record))
