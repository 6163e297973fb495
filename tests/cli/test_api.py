"""The Python API: results of the commands, exceptions, and a process that stays as it was."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator import api
from orchestrator.__main__ import app
from orchestrator.cli.common import REMOVED
from orchestrator.errors import Refused
from tests.helpers.sweeps import TIMEOUT, airsweep, environment, table, wait_until, write_sweep

ROOT = Path(__file__).parents[2]
SWEEP = """
grid: {method: [zero_shot, fpl]}
fixed: {train.steps: 3, prompt.length: 2}
seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("spec"), "small", SWEEP)


@dataclass(frozen=True)
class FinishedRun:
    """A run, and the state of this process before and after it."""

    outcome: api.Outcome
    before: Any
    after: Any


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory) -> FinishedRun:
    store = tmp_path_factory.mktemp("store") / "runs"
    before = process_state()
    outcome = api.run(spec, store=store, sets={"train.steps": 2}, quiet=True)
    return FinishedRun(outcome, before, process_state())


def process_state() -> Any:
    return dict(os.environ), signal.getsignal(signal.SIGTERM), os.fstat(1).st_ino


# ---------------------------------------------------------------- the module


def test_importing_the_api_imports_no_heavy_library():
    heavy = "{'torch', 'ray', 'mlflow', 'numpy', 'pandas', 'pydantic', 'yaml', 'typer'}"
    code = f"import sys, orchestrator.api\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_the_installed_module_airsweep_exports_the_whole_api():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    source = {to: at for at, to in wheel["targets"]["wheel"]["force-include"].items()}
    spec = importlib.util.spec_from_file_location("airsweep", ROOT / source["airsweep.py"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in api.__all__:
        assert getattr(module, name) is getattr(api, name)
    assert module.__doc__ == api.__doc__


ONLY_COMMAND_LINE = {"as_json", "explain", "form"}  # options without a counterpart in the API


@pytest.mark.parametrize(
    "name", ["validate", "plan", "prepare", "run", "retry", "status", "init", "schema"]
)
def test_a_function_has_the_parameters_of_its_command(name):
    command = typer.main.get_command(app).commands[name]
    options = {param.name for param in command.params} - ONLY_COMMAND_LINE
    assert options <= set(inspect.signature(getattr(api, name)).parameters)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_command_or_option_exits_with_2_and_its_replacement(name, command):
    words = ["plan", "quickstart", name] if name.startswith("--") else name.split()
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err == f"airsweep: `{name}` was removed: {REMOVED[name]}\n"


# ---------------------------------------------------------------- loading


def test_python_values_equal_options_of_the_command_line(spec):
    request = api.load(spec, sets={"seeds": [4], "lora": None}, only={"method": ["fpl"]})
    assert request.spec.seeds.values == ((4,),)
    assert request.spec.fixed["lora"] is None
    assert request.spec.methods == ("fpl",)
    assert request.origin["sets"] == ["seeds=[4]", "lora=null"]
    assert api.load(request) is request
    with pytest.raises(ValueError, match="is already loaded"):
        api.load(request, smoke=True)


def test_bad_input_raises_with_the_message_of_the_command(spec, tmp_path):
    bad = write_sweep(tmp_path, "bad", "grid: {method: [fpl, cpll]}\n")
    with pytest.raises(ValueError, match="did you mean cpl") as caught:
        api.run(bad, store=tmp_path / "runs")
    assert str(caught.value) == airsweep("run", bad, check=False).stderr.strip()
    with pytest.raises(ValueError, match="no sweep default/nothing"):
        api.results("nothing", store=tmp_path)
    with pytest.raises(Refused, match="requires 99 CPU"):
        api.run(spec, store=tmp_path / "runs", sets={"resources.trial.cpu": 99})


# ---------------------------------------------------------------- a run


@pytest.mark.ray
def test_a_run_returns_its_exit_code_and_restores_the_process(finished):
    outcome, before, after = finished.outcome, finished.before, finished.after
    assert (outcome.exit_code, outcome.name) == (0, "default/small")
    assert after == before
    assert "fpl" in str(outcome)


@pytest.mark.ray
def test_functions_return_what_commands_print(spec, finished):
    store = finished.outcome.location.store.root
    planned = api.plan(spec, store=store, sets={"train.steps": 2})
    output = airsweep("plan", spec, "--store", store, "--set", "train.steps=2", "--json").stdout
    assert planned.json() == json.loads(output)
    screen = airsweep("plan", spec, "--store", store, "--set", "train.steps=2").stdout
    assert str(planned) == screen.rstrip("\n")
    status = json.loads(airsweep("status", "small", "--store", store, "--json").stdout)
    assert api.status("small", store=store) == status == api.status(finished.outcome)
    rows = table(store, "small")
    frame = api.table("small", store=store)
    assert frame["mean"].tolist() == [row["mean"] for row in rows]
    assert frame["method"].tolist() == [row["method"] for row in rows]


@pytest.mark.ray
def test_results_and_curves_belong_to_the_sweep_as_it_was_run(finished):
    trials = api.results(finished.outcome)
    assert trials["state"].tolist() == ["done", "reused", "done", "done"]
    assert trials["test/accuracy"].between(0, 1).all()
    curves = api.curves(finished.outcome)
    assert set(curves["trial"]) == set(trials["trial"][2:])
    assert (curves["iteration"] == 0).all()  # FPL has one iteration


@pytest.mark.ray
def test_stdout_has_only_what_the_caller_prints(spec, tmp_path):
    """In a subprocess, because Ray writes to the file descriptor directly."""
    code = (
        "from orchestrator import api\n"
        f"outcome = api.run({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print(outcome.exit_code)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert process.stdout == "0\n"
    assert "small: 4 trials in 2 cells" in process.stderr


@pytest.mark.ray
def test_a_ray_that_the_caller_has_started_keeps_running(spec, tmp_path):
    code = (
        "import ray\n"
        "from orchestrator import api\n"
        "ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        f"outcome = api.prepare({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print(outcome.exit_code, ray.is_initialized())\n"
    )
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, check=False
    )
    assert process.stdout == "0 True\n", process.stderr
    assert list((tmp_path / "runs" / "artifacts" / "features").iterdir())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code", "before"),
    [
        (signal.SIGINT, "KeyboardInterrupt", ""),
        (signal.SIGTERM, 143, ""),
        # The signal arrives while Ray Tune makes a trial, where it turns SystemExit into an error.
        (0, 143, "config_parser._to_argv = lambda spec: os.kill(os.getpid(), signal.SIGTERM)\n"),
    ],
)
def test_a_signal_stops_a_run_after_the_event_log_is_closed(tmp_path, number, code, before):
    spec = write_sweep(tmp_path, "long", "fixed: {method: fpl, train.steps: 100000}\nseeds: [1]\n")
    script = (
        "import os, signal\n"
        "from orchestrator import api\n"
        "from ray.tune.experiment import config_parser\n"
        f"{before}"
        # Background jobs of a shell ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"api.run({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print('continued')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    event_log = tmp_path / "runs" / "sweeps" / "default" / "long" / "events.jsonl"

    def trials_have_started() -> bool:
        assert process.poll() is None, process.communicate()
        return event_log.exists() and "trials_started" in event_log.read_text()

    try:
        if number:
            wait_until(trials_have_started)
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert stdout == "", stderr
    if code == 143:
        assert process.returncode == 143, stderr
    else:
        assert code in stderr
    assert '"sweep_ended"' in event_log.read_text(), stderr
