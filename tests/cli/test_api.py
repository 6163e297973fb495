"""The Python API: results of the commands, exceptions, and a process that stays as it was."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image

from air_core.tools.seal import sealed_json
from orchestrator import api
from orchestrator.__main__ import app
from orchestrator.errors import Refused
from orchestrator.git import commit
from orchestrator.planning import requests
from orchestrator.planning.ledger import LEDGER, ledger_json, read_ledger
from orchestrator.store import EventLog, open_store, user_name
from tests.helpers.outcomes import by_method, record_sweep
from tests.helpers.plugins import MARGIN
from tests.helpers.sweeps import (
    TIMEOUT,
    airsweep,
    environment,
    python,
    table,
    wait_until,
    write_sweep,
)

ROOT = Path(__file__).parents[2]
SWEEP = """
grid: {method: [zero_shot, fpl]}
fixed: {train.steps: 3, prompt.length: 2}
seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("spec"), "small", SWEEP)


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory) -> api.Outcome:
    """A run, which leaves this process as it was and prints nothing to stdout."""
    store, printed = (tmp_path_factory.mktemp("store") / name for name in ("runs", "stdout"))
    stdout = os.dup(1)  # Ray writes to the file descriptor directly
    with printed.open("w") as file, redirect_stdout(file):
        os.dup2(file.fileno(), 1)
        try:
            before = process_state()
            outcome = api.run(spec, store=store, sets={"train.steps": 2})
            assert process_state() == before
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
    assert printed.read_text() == ""
    return outcome


def process_state() -> Any:
    return dict(os.environ), signal.getsignal(signal.SIGTERM), os.fstat(1).st_ino


# ---------------------------------------------------------------- the module


def test_the_installed_module_airsweep_exports_the_whole_api():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    source = {to: at for at, to in wheel["targets"]["wheel"]["force-include"].items()}
    spec = importlib.util.spec_from_file_location("airsweep", ROOT / source["airsweep.py"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in api.__all__:
        assert getattr(module, name) is getattr(api, name)
    assert module.__doc__ == api.__doc__


# Options without a counterpart in the API, and those of `Planned.check`.
ONLY_COMMAND_LINE = {"as_json", "explain", "form", "check", "tracking_uri"}


@pytest.mark.parametrize("name", ["plan", "run", "status", "init", "export", "report", "sample"])
def test_a_function_has_the_parameters_of_its_command(name):
    command = typer.main.get_command(app).commands[name]
    options = {param.name for param in command.params} - ONLY_COMMAND_LINE
    assert options <= set(inspect.signature(getattr(api, name)).parameters)


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


def test_a_sweep_is_also_a_dict(spec, tmp_path, monkeypatch):
    content = yaml.safe_load(spec.read_text())
    assert api.load(content).spec.grid == api.load(spec).spec.grid
    assert api.load({**content, "version": 1}).spec.source == "<dict>"
    with pytest.raises(ValueError, match=r"^<dict>:\d+:\d+: seeds: 'no' is not allowed"):
        api.load({**content, "seeds": "no"})
    with pytest.raises(ValueError, match="not plain data"):
        api.load({**content, "fixed": {"method": len}})
    monkeypatch.chdir(tmp_path)
    Path("margin.py").write_text(MARGIN)
    fixed = {"method": "pseudo", "pseudo_labels.kind": "margin"}
    plugged = api.load({"name": "plugged", "fixed": fixed}, plugins=["margin.py"])
    assert [plugin.name for plugin in plugged.spec.plugins] == ["margin.py"]
    with pytest.raises(ValueError, match="a sweep file names its own under `plugins:`"):
        api.load(spec, plugins=["margin.py"])


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
def test_a_run_returns_its_exit_code(finished):
    assert (finished.exit_code, finished.location.full_name) == (0, "default/small")
    assert "fpl" in str(finished)


@pytest.mark.ray
def test_functions_return_what_commands_print(spec, finished):
    store = finished.location.store.root
    planned = api.plan(spec, store=store, sets={"train.steps": 2})
    output = airsweep("plan", spec, "--store", store, "--set", "train.steps=2", "--json").stdout
    assert planned.json() == json.loads(output)
    screen = airsweep("plan", spec, "--store", store, "--set", "train.steps=2").stdout
    assert str(planned) == screen.rstrip("\n")
    status = json.loads(airsweep("status", "small", "--store", store, "--json").stdout)
    assert api.status("small", store=store) == status == api.status(finished)
    rows = table(store, "small")
    frame = api.table("small", store=store)
    assert frame["mean"].tolist() == [row["mean"] for row in rows]
    assert frame["method"].tolist() == [row["method"] for row in rows]


@pytest.mark.ray
def test_results_are_read_further_from_python(finished, tmp_path):
    done, store = finished, finished.location.store.root
    trials = api.results(done).set_index("trial")
    predicted = api.predictions(trials["key"].iloc[2], store=store)
    assert predicted["prediction"].isin(predicted["label"].unique()).all()
    correct = (predicted["prediction"] == predicted["label"]).mean()
    assert correct == pytest.approx(trials["test/accuracy"].iloc[2])
    assert len(predicted) == 540 == predicted["image"].nunique()

    assert api.table(done).equals(api.table("small", store=store))
    assert api.logs(done)[-1]["event"] == "sweep_ended"
    page = api.report(done, tmp_path / "report.html")
    assert page.read_text().startswith("<!")
    with pytest.raises(ValueError, match="existing folder"):
        api.report(done, tmp_path / "none" / "report.html")
    assert [sweep["sweep"] for sweep in api.sweeps(store=store)] == ["default/small"]

    image = tmp_path / "zero.png"
    Image.new("L", (8, 8)).save(image)
    folder = api.export(trials["key"].iloc[2], tmp_path / "bundle", sweep=done)  # finds the store
    (found,) = api.load_bundle(folder).classify([str(image)])
    assert found.top[0][0] in set(predicted["label"])
    rows = api.classify(folder, [image], topk=2)
    assert rows["class"].tolist() == [found.top[0][0]]
    assert rows["class_2"].tolist() == [found.top[1][0]]
    best = api.export("best", tmp_path / "best", sweep=done, by="test_accuracy")
    assert api.load_bundle(best).classnames == api.load_bundle(folder).classnames


@pytest.mark.ray
def test_a_ray_that_the_caller_has_started_keeps_running(spec, tmp_path):
    code = (
        "import ray\n"
        "from orchestrator import api\n"
        "ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        f"outcome = api.run({str(spec)!r}, prepare=True, store={str(tmp_path / 'runs')!r}, "
        "tracking_uri='none')\n"
        "print(outcome.exit_code, ray.is_initialized())\n"
    )
    process = python("-c", code, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    assert process.stdout == "0 True\n", process.stderr
    [record] = (tmp_path / "runs" / "artifacts" / "features").glob("*/*/record.json")
    content = json.loads(record.read_text())
    # The workers may be older than the sweep, whose variables they do not inherit.
    assert (content["user"], content["commit"]) == (user_name(), commit())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code", "before"),
    [
        (signal.SIGINT, "KeyboardInterrupt", ""),
        # The signal arrives while Ray Tune makes a trial, where it turns SystemExit into an error.
        (0, 143, "config_parser._to_argv = lambda spec: os.kill(os.getpid(), signal.SIGTERM)\n"),
        # It arrives in `ray.init`, which has a handler of its own.
        (0, 143, "worker.connect = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"),
    ],
)
def test_a_signal_stops_a_run_after_the_event_log_is_closed(
    tmp_path, encoded, number, code, before
):
    """`test_submit.py` sends SIGTERM while trials run."""
    spec = write_sweep(tmp_path, "long", "fixed: {method: fpl, train.steps: 100000}\nseeds: [1]\n")
    script = (
        "import os, signal\n"
        "from orchestrator import api\n"
        "from ray._private import worker\n"
        "from ray.tune.experiment import config_parser\n"
        f"{before}"
        # Background jobs of a shell ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"api.run({str(spec)!r}, store={str(encoded)!r}, tracking_uri='none')\n"
        "print('continued')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    event_log = encoded / "sweeps" / "default" / "long" / "events.jsonl"

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


# ---------------------------------------------------------------- commands


@pytest.mark.ray
def test_the_sweeps_of_a_store_are_listed_with_state_and_best_row(finished, command):
    store = finished.location.store.root
    code, out, _ = command("list", "--store", store)
    assert command("status", "--store", store)[1] == out
    header, line, options = out.splitlines()
    assert (code, header.split()[:3]) == (0, ["sweep", "state", "trials"])
    assert options.startswith("default/small: the sweep file with --set ")
    assert line.startswith("default/small  done   4 of 4")
    best = max(table(store, "small"), key=lambda row: row["mean"])
    assert f"{best['method']}" in line
    assert f"{100 * best['mean']:.1f}  [{100 * best['low']:.1f}, {100 * best['high']:.1f}]" in line
    (listed,) = json.loads(command("list", "--store", store, "--json")[1])
    assert (listed["state"], listed["finished"], listed["total"]) == ("done", 4, 4)
    assert command("list", "--store", store / "none")[1] == ""


def test_printed_commands_and_tables_have_the_options_of_the_last_run(
    tmp_path, command, monkeypatch
):
    smoke = tmp_path / "my runs-smoke"
    record_sweep(smoke, "old", SWEEP, by_method({"zero_shot": 0.5, "fpl": 0.6}), lambda i: False)
    location = requests.location_named("old", smoke)
    options = {"sets": ["seeds=[1]"], "only": ["method=fpl"], "smoke": True}
    origin = {**options, "source": "a b.yaml", "data_root": "/data", "inputs": None}
    location.write("resolved.json", sealed_json(origin))
    again = "airsweep run 'a b.yaml' --set 'seeds=[1]' --only method=fpl --smoke"
    changed = (
        "the sweep file with --set 'seeds=[1]' --only method=fpl; its other cells are left out"
    )
    ledger = read_ledger(location)
    changed_ledger = replace(ledger, about=replace(ledger.about, options=changed))
    location.write(LEDGER, ledger_json(changed_ledger, {}))
    with_store = f"{again} --store '{tmp_path / 'my runs'}' --data-root /data"
    for name in ("old", smoke / "files" / "old.yaml"):
        _, _, err = command("table", name, "--store", smoke)
        assert f"note: {changed}" in err
    assert f"old: {changed}" in command("list", "--store", smoke)[1]
    assert f"options   {changed}" in command("status", "old", "--store", smoke)[1]
    assert requests.run_command(location) == with_store
    monkeypatch.setenv("AIRSWEEP_STORE", str(tmp_path / "my runs"))
    monkeypatch.setenv("AIRSWEEP_DATA", "/data")
    assert requests.run_command(location) == again


def test_the_log_of_a_sweep_has_its_errors(tmp_path, command):
    spec, store = write_sweep(tmp_path, "small", SWEEP), tmp_path / "runs"
    run = ("run", spec, "--store", store, "--tracking-uri", "none")
    airsweep(*run, trivial=True, check=False, AIRSWEEP_SAID="broken image 7")
    _, out, _ = command("logs", "small", "--store", store)
    assert "sweep_started" in out
    assert "data: broken image 7" in out
    log = requests.location_named("small", store).event_log()
    log.lock()
    for key, seconds in (("a", 1.5), ("b", 9.0), ("a", 2.0)):
        log.append("artifact_prepared", stage="images", key=f"images/{key}", seconds=seconds)
    log.unlock()
    _, out, _ = command("logs", "small", "--store", store)
    assert [line.split()[3:] for line in out.splitlines() if "images/" in line] == [
        ["images/b", "seconds", "9"], ["images/a", "blocks", "2", "seconds", "3.5"]
    ]  # fmt: skip
    assert [
        json.loads(line)
        for line in command("logs", "small", "--store", store, "--json")[1].splitlines()
    ] == api.logs("small", store=store)
    assert "default/small  failed  " in command("list", "--store", store)[1]
    with (store / "sweeps" / "default" / "small" / "events.jsonl").open("a") as file:
        file.write("{\n")
    assert "default/small  damaged  " in command("list", "--store", store)[1]
    assert command("status", "small", "--store", store)[0] == 2  # names the line


def test_a_checked_plan_exits_with_3_if_the_sweep_would_not_start(spec, tmp_path, command):
    store = tmp_path / "deep" / "runs"
    check = ("plan", spec, "--store", store, "--check")
    code, out, err = command(*check)
    assert (code, err.partition(" ")[2]) == (0, "checked this machine: ok\n")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    code, out, err = command(*check, "--set", "resources.trial.cpu=99")
    assert (code, "requires 99 CPU" in err) == (3, True)
    assert out.startswith("small: 2 cells")
    open_store(store).initialize()
    log = EventLog(store / "sweeps" / "default" / "small")
    log.lock()
    log.append("sweep_started", pid=123, host="node1", user="mina")
    code, _, err = command(*check)
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    message = (
        rf"airsweep: another driver runs default/small, since {time}: process 123 on node1 of "
        rf"mina; wait for it, or stop it; `airsweep status small --store {store}` shows its "
        r"progress\n"
    )
    assert code == 3
    assert re.fullmatch(message, err), err
    log.unlock()


def test_every_command_has_a_short_option_for_help(command):
    def commands(group: Any, *path: str) -> list[tuple[str, ...]]:
        inner = getattr(group, "commands", {})
        return [path, *(p for name in inner for p in commands(inner[name], *path, name))]

    for path in commands(typer.main.get_command(app)):
        code, out, _ = command(*path, "-h")
        assert (code, "Usage: airsweep" in out) == (0, True), path
