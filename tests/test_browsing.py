"""MLflow pages of a real sweep on a real server, opened in headless chromium."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest

from orchestrator.tracking.database import run_tables
from tests.helpers.browser import CHROMIUM, MISSING, Browser
from tests.helpers.servers import MlflowServer
from tests.helpers.sweeps import airsweep, all_runs, write_sweep

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason=MISSING),
]

SWEEP = """
grid: {{method: [zero_shot, cpl, air], images_per_class: [4, 8]}}
fixed: {{generator: "folder:{folder}", generation.block: 4}}
seeds: [1, 2, 3]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, drawn_digits) -> Iterator[MlflowServer]:
    """A server over a sweep of trivial trials, recorded with the real tracker."""
    folder = tmp_path_factory.mktemp("browsing")
    spec = write_sweep(folder, "browsed", SWEEP.format(folder=drawn_digits))
    spec.write_text(f"# How many images are enough?\n{spec.read_text()}")
    store = folder / "runs"
    words = ("run", spec, "--store", store)
    airsweep(*words, "--tracking-uri", "none", trivial=True)
    airsweep(*words)
    server = MlflowServer(store, folder / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"), width=1920, height=1200)
    yield browser
    browser.close()


def shows(text: str) -> str:
    """A JavaScript expression: whether the page shows a text."""
    return f"document.body.innerText.includes({text!r})"


def test_a_sweep_run_shows_the_answer_and_has_the_report(server, browser):
    [run] = all_runs(server.store, "tags.`air.kind` = 'sweep'")
    place = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    address = f"{server.url}/#/{place}?workflowType=machine_learning"
    browser.open(address, shows("Best classifier: * "))
    browser.wait(shows("Child runs"))
    assert "How many images are enough?" in browser.text()
    address = f"{server.url}/#/{place}/artifacts/report.html?workflowType=machine_learning"
    browser.open(address, "document.querySelector('iframe')")  # the page, from another origin


def test_the_address_that_ui_prints_opens_the_table_of_runs_without_telemetry(server, browser):
    [page] = run_tables(server.store / "mlflow.db")
    browser.open(f"{server.url}/{page}", shows("browsed"))
    browser.wait(shows("test/accuracy_text"))  # a column
    assert "Sort: best/test/accuracy" in browser.text()
    assert "5 matching runs" in browser.text()  # a sweep with its four settings, without trials
    assert "GET /" not in server.log.read_text()
    telemetry = f"{server.url}/ajax-api/3.0/mlflow/ui-telemetry"
    with urllib.request.urlopen(telemetry, timeout=60) as response:
        assert json.load(response)["disable_ui_telemetry"]
