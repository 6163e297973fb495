"""airsweep from Python: what commands do, without ending the process."""

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
class Done:
    """A run, and what this process was before and after it."""

    outcome: api.Outcome
    before: Any
    after: Any


@pytest.fixture(scope="module")
def done(spec, tmp_path_factory) -> Done:
    store = tmp_path_factory.mktemp("store") / "runs"
    before = process()
    outcome = api.run(spec, store=store, sets={"train.steps": 2}, quiet=True)
    return Done(outcome, before, process())


def process() -> Any:
    return dict(os.environ), signal.getsignal(signal.SIGTERM), os.fstat(1).st_ino


# ---------------------------------------------------------------- the module


def test_to_import_it_costs_nothing():
    heavy = "{'torch', 'ray', 'mlflow', 'numpy', 'pandas', 'pydantic', 'yaml', 'typer'}"
    code = f"import sys, orchestrator.api\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_what_is_installed_as_airsweep_passes_on_all_of_it():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    source = {to: at for at, to in wheel["targets"]["wheel"]["force-include"].items()}
    found = importlib.util.spec_from_file_location("airsweep", ROOT / source["airsweep.py"])
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for name in api.__all__:
        assert getattr(module, name) is getattr(api, name)
    assert module.__doc__ == api.__doc__


# Options of the command line that have no sense here, or another name.
ELSEWHERE = {"as_json", "explain", "form"}


@pytest.mark.parametrize(
    "name", ["validate", "plan", "prepare", "run", "retry", "status", "init", "schema"]
)
def test_a_function_takes_what_its_command_takes(name):
    command = typer.main.get_command(app).commands[name]
    options = {param.name for param in command.params} - ELSEWHERE
    assert options <= set(inspect.signature(getattr(api, name)).parameters)


@pytest.mark.parametrize("name", REMOVED)
def test_what_was_removed_ends_with_2_and_says_what_to_use_instead(name, command):
    words = ["plan", "quickstart", name] if name.startswith("--") else name.split()
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err == f"airsweep: `{name}` was removed: {REMOVED[name]}\n"


# ---------------------------------------------------------------- what is asked


def test_values_of_python_are_options_of_the_command_line(spec):
    asked = api.load(spec, sets={"seeds": [4], "lora": None}, only={"method": ["fpl"]})
    assert asked.spec.seeds.values == ((4,),)
    assert asked.spec.fixed["lora"] is None
    assert asked.spec.methods == ("fpl",)
    assert asked.origin["sets"] == ["seeds=[4]", "lora=null"]
    assert api.load(asked) is asked
    with pytest.raises(ValueError, match="was loaded already"):
        api.load(asked, smoke=True)


def test_bad_input_is_the_sentence_of_the_command(spec, tmp_path):
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
def test_a_run_ends_with_its_code_and_leaves_the_process_as_it_was(done):
    outcome, before, after = done.outcome, done.before, done.after
    assert (outcome.exit_code, outcome.name) == (0, "default/small")
    assert after == before
    assert "fpl" in str(outcome)


@pytest.mark.ray
def test_functions_and_commands_say_the_same(spec, done):
    store = done.outcome.location.store.root
    planned = api.plan(spec, store=store, sets={"train.steps": 2})
    said = airsweep("plan", spec, "--store", store, "--set", "train.steps=2", "--json").stdout
    assert planned.json() == json.loads(said)
    shown = airsweep("plan", spec, "--store", store, "--set", "train.steps=2").stdout
    assert str(planned) == shown.rstrip("\n")
    told = json.loads(airsweep("status", "small", "--store", store, "--json").stdout)
    assert api.status("small", store=store) == told == api.status(done.outcome)
    rows = table(store, "small")
    frame = api.table("small", store=store)
    assert frame["mean"].tolist() == [row["mean"] for row in rows]
    assert frame["method"].tolist() == [row["method"] for row in rows]


@pytest.mark.ray
def test_results_and_curves_are_of_the_sweep_as_it_was_run(done):
    trials = api.results(done.outcome)
    assert trials["state"].tolist() == ["done", "reused", "done", "done"]
    assert trials["test/accuracy"].between(0, 1).all()
    curves = api.curves(done.outcome)
    assert set(curves["trial"]) == set(trials["trial"][2:])
    assert (curves["iteration"] == 0).all()  # FPL has one


@pytest.mark.ray
def test_stdout_is_the_callers(spec, tmp_path):
    """Ray prints to the descriptor itself, so the process is looked at from outside."""
    code = (
        "from orchestrator import api\n"
        f"done = api.run({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print(done.exit_code)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout == "0\n"
    assert "small: 4 trials in 2 cells" in ended.stderr


@pytest.mark.ray
def test_who_has_started_ray_keeps_it(spec, tmp_path):
    code = (
        "import ray\n"
        "from orchestrator import api\n"
        "ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        f"done = api.prepare({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print(done.exit_code, ray.is_initialized())\n"
    )
    more = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, env=environment(**more), capture_output=True, text=True)
    assert ended.stdout == "0 True\n", ended.stderr
    assert list((tmp_path / "runs" / "artifacts" / "features").iterdir())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code", "before"),
    [
        (signal.SIGINT, "KeyboardInterrupt", ""),
        (signal.SIGTERM, 143, ""),
        # The signal comes while Ray Tune makes a trial: it takes a SystemExit for a bad option.
        (0, 143, "config_parser._to_argv = lambda spec: os.kill(os.getpid(), signal.SIGTERM)\n"),
    ],
)
def test_who_is_stopped_in_a_run_stops_when_all_is_closed(tmp_path, number, code, before):
    spec = write_sweep(tmp_path, "long", "fixed: {method: fpl, train.steps: 100000}\nseeds: [1]\n")
    script = (
        "import os, signal\n"
        "from orchestrator import api\n"
        "from ray.tune.experiment import config_parser\n"
        f"{before}"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        f"api.run({str(spec)!r}, store={str(tmp_path / 'runs')!r})\n"
        "print('went on')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    event_log = tmp_path / "runs" / "sweeps" / "default" / "long" / "events.jsonl"

    def has_begun() -> bool:
        assert process.poll() is None, process.communicate()
        return event_log.exists() and "trials_started" in event_log.read_text()

    try:
        if number:
            wait_until(has_begun)
            process.send_signal(number)
        said, complained = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert said == "", complained
    if code == 143:
        assert process.returncode == 143, complained
    else:
        assert code in complained
    assert '"sweep_ended"' in event_log.read_text(), complained
