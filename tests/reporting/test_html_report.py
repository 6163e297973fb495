"""The HTML report: content, self-containment and reproducible bytes.

The sweeps run with a trivial trainable; `test_runs.py` reports a real sweep.
"""

from __future__ import annotations

import base64
import csv
import re
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from air_core.datasets import get_dataset
from orchestrator.planning import plan_of, read_request
from orchestrator.planning.ledger import read_ledger
from orchestrator.reporting import results_of
from orchestrator.reporting.html_report import frequent_confusions, page
from orchestrator.reporting.screens import status_report, status_screen, summary_screen
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.store import SweepLocation, open_store
from tests.helpers.browser import CHROMIUM, MISSING, Browser
from tests.helpers.golden import check_refusals
from tests.helpers.outcomes import by_method, record_sweep
from tests.helpers.sweeps import airsweep, write_sweep
from tests.helpers.trials import one_line

SVG = "http://www.w3.org/2000/svg"
GRID = """
grid:
  method: [cpl, air, cpl_real]
  paradigm: [ul, ssl]
  images_per_class: [4, 8, 16]
fixed: {{generator: "folder:{folder}", generation.block: 8}}
seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory, drawn_digits) -> Path:
    text = GRID.format(folder=drawn_digits)
    spec = write_sweep(tmp_path_factory.mktemp("grid"), "grid", text)
    spec.write_text(f"# <script>alert(1)</script> & more\n{spec.read_text()}")
    store = spec.parent / "runs"
    words = ("run", spec, "--store", store, "--tracking-uri", "none")
    airsweep(*words, trivial=True)
    return store


def report(store: Path, name: str) -> str:
    location = SweepLocation(open_store(store), "default", name, None)
    ledger = read_ledger(location)
    return page(ledger, location, results_of(ledger, location.store))


def labels_of(text: str) -> Iterator[str]:
    """The texts of all charts of a page."""
    for content in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text):
        for element in xml.fromstring(base64.b64decode(content)).iter(f"{{{SVG}}}text"):
            yield "".join(element.itertext())


def test_the_report_of_a_grid_has_all_sections_in_order(grid):
    text = report(grid, "grid")
    sections = "answer table differences settings curves images confusion"
    assert " ".join(re.findall(r'<section id="(\w+)">', text)) == sections
    for tag in set(re.findall(r"<(\w+)", text)) - {"img", "meta"}:
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>")
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', text))
    titles = [*labels_of(text)]
    assert {"images_per_class", "digits, ul/text", "digits, ssl/text"} <= set(titles)
    # Chance is in the picture of all rows, in the curves of the setting and of pseudo-labels.
    assert {"best classifier", "chance"} <= set(titles)
    assert sum("chance 10.0" in title for title in titles) >= 3


def test_the_report_has_the_numbers_of_the_table(grid):
    text = airsweep("table", "grid", "--store", grid, "--format", "csv").stdout
    means = [f"{100 * float(row['mean']):.1f}" for row in csv.DictReader(text.splitlines())]
    assert len(means) > 6
    cells = re.findall(r"<td[^>]*>(?:\* )?([^<]*)", report(grid, "grid"))
    for mean in means:
        assert any(cell.startswith(mean) for cell in cells), mean


@pytest.mark.filterwarnings("error:constrained_layout")  # the long path of the folder in a chart
def test_unused_images_are_named_in_report_status_and_closing_screen(tmp_path):
    for name in get_dataset("digits").classnames:
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(11):
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"")
    (folder / "phone.mov").write_bytes(b"")
    body = f"fixed: {{method: zero_shot, dataset: 'folder:{tmp_path / 'images'}'}}\nseeds: [1]\n"
    record_sweep(tmp_path, "mine", body, by_method({"zero_shot": 0.5}))
    location = SweepLocation(open_store(tmp_path), "default", "mine", None)
    [slot] = plan_of(read_request(location.folder / "spec.yaml").spec, location).slots
    build_features(slot.spec.features, WorkerContext(location.store))
    facts = {"drawn": 14, "redrawn": 0, "holes": 2}
    location.event_log().append(
        "artifact_prepared",
        stage="images",
        key="k",
        seconds=1.0,
        facts=facts,
    )
    status = status_report(location)
    shown = [status_screen(status), summary_screen(location)]
    for text in [report(tmp_path, "mine"), *map(one_line, shown)]:
        assert f"1 unreadable ({folder.name}/3.png); skipped: 1 .mov" in text
        assert "2 of 16 synthetic images given up, blank or unreadable" in text
    [unused] = status["unused"].values()
    assert unused["files"] == {f"{folder.name}/3.png": "it is empty"}
    (location.store.get(slot.spec.features).path / "record.json").write_bytes(b"{}")
    assert status_report(location)["unused"] == {}  # not worth an error


def test_a_report_is_self_contained_and_has_the_same_bytes_in_another_process(grid, tmp_path):
    text = report(grid, "grid")
    airsweep("report", "grid", "--store", grid, "-o", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    assert len(text) < 5_000_000
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text  # of the sweep file


POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="[^"]*">\n')
LOADED = "document.readyState === 'complete' && document.images.length > 0"
INJECTED = '<script>document.title = "ran"</script>'


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_shows_the_whole_report_whose_policy_blocks_injected_scripts(grid, tmp_path):
    text = report(grid, "grid")
    closed = text.replace("<nav", f"{INJECTED}<nav", 1)
    assert POLICY.search(closed)
    with closing(Browser(tmp_path / "profile")) as browser:

        def show(content: str, until: str = LOADED) -> None:
            (tmp_path / "page.html").write_text(content)
            browser.open((tmp_path / "page.html").as_uri(), until)

        show(text)
        images = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(images) > 5
        assert all(images)
        assert browser.evaluate("getComputedStyle(document.body).margin") == "0px"
        show(POLICY.sub("", closed), f"{LOADED} && document.title === 'ran'")
        show(closed)
        assert browser.evaluate("document.title") == "grid · airsweep"


def test_bad_input_equals_the_golden_messages(tmp_path, command):
    body = "fixed: {method: fpl}\nseeds: [1]\n"
    record_sweep(tmp_path / "runs", "empty", body, by_method({}), done=lambda index: False)
    new = tmp_path / "new"
    new.mkdir()
    check_refusals(
        "messages/report.txt",
        lambda *words: command("report", *words, "--store", tmp_path / "runs"),
        ("nothing", "-o", new / "x.html"),
        ("empty", "-o", new / "x.html"),
        ("empty", "-o", new / "no" / "x.html"),
        ("empty", "-o", new),
        store=tmp_path / "runs",
        new=new,
    )
    assert list(new.iterdir()) == []


def test_the_most_confused_pairs_come_first():
    matrix = np.array([[5, 5, 0], [1, 9, 0], [0, 8, 2]])
    pairs = [("c", "b", 0.8), ("a", "b", 0.5), ("b", "a", 0.1)]
    assert [*frequent_confusions(matrix, ["a", "b", "c"], 3)] == pairs
    assert [*frequent_confusions(np.diag([3, 3]), ["a", "b"])] == []
