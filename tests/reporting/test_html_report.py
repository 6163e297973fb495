"""The HTML report: content, self-containment and reproducible bytes.

The sweeps run with a trivial trainable; `test_runs.py` reports a real sweep.
"""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from air_core.datasets import get_dataset
from orchestrator.planning import plan_of
from orchestrator.planning.recorded import read_sweep
from orchestrator.reporting.html_report import frequent_confusions, page
from orchestrator.reporting.screens import status_report, status_screen, summary_screen
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.store import open_store
from orchestrator.store.location import recorded_location
from tests.helpers.browser import CHROMIUM, MISSING, Browser
from tests.helpers.golden import check_refusals
from tests.helpers.outcomes import by_method, record_sweep
from tests.helpers.servers import serve
from tests.helpers.sweeps import airsweep, write_sweep
from tests.helpers.trials import one_line

GRID = """
grid:
  method: [cpl, air, cpl_real]
  paradigm: [ul, ssl]
  images_per_class: [4, 8, 16]
fixed: {{generator: "folder:{folder}", generation.block: 8}}
seeds: [1, 2]
"""


def run_sweep(spec: Path) -> Path:
    """Run a sweep and return its store."""
    store = spec.parent / "runs"
    words = ("run", spec, "--store", store, "--tracking-uri", "none")
    airsweep(*words, module="tests.helpers.trivial")
    return store


@pytest.fixture(scope="module")
def grid(tmp_path_factory, drawn_digits) -> Path:
    text = GRID.format(folder=drawn_digits)
    return run_sweep(write_sweep(tmp_path_factory.mktemp("grid"), "grid", text))


def report(store: Path, name: str) -> str:
    return page(*read_sweep(recorded_location(open_store(store), "default", name), None))


class Outline(HTMLParser):
    """Sections, pictures and cells of a page; fails if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.cells.append(data)


def charts_of(outline: Outline) -> Iterator[str]:
    """The charts as SVG text."""
    for picture in outline.pictures:
        kind, _, content = (picture["src"] or "").partition(";base64,")
        if kind == "data:image/svg+xml":
            yield base64.b64decode(content).decode()


def test_the_report_of_a_grid_has_all_sections_in_order(grid):
    outline = Outline(report(grid, "grid"))
    assert outline.sections == [
        *("answer", "table", "differences", "settings", "curves", "images", "confusion"),
    ]
    assert all(picture["alt"] for picture in outline.pictures)
    titles = [text for chart in charts_of(outline) for text in labels_of(chart)]
    assert "images_per_class" in titles  # the axis of a curve
    assert {"digits, ul/text", "digits, ssl/text"} <= set(titles)
    # Chance is in the picture of all rows, in the curves of the setting and of pseudo-labels.
    assert {"best classifier", "chance"} <= set(titles)
    assert sum("chance 10.0" in title for title in titles) >= 3


def labels_of(chart: str) -> list[str]:
    root = xml.fromstring(chart)
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_report_has_the_numbers_of_the_table(grid):
    text = airsweep("table", "grid", "--store", grid, "--format", "csv").stdout
    means = [f"{100 * float(line.split(',')[8]):.1f}" for line in text.splitlines()[1:]]
    assert len(means) > 6
    cells = Outline(report(grid, "grid")).cells
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
    sweep, location = read_sweep(recorded_location(open_store(tmp_path), "default", "mine"), None)
    [slot] = plan_of(sweep, location).slots
    build_features(slot.spec.features, WorkerContext(location.store))
    facts = {"drawn": 14, "redrawn": 0, "holes": 2}
    location.event_log().append(
        "artifact_prepared",
        stage="images",
        key="k",
        seconds=1.0,
        facts=facts,
        hole_files=["six/1.png"],
    )
    status = status_report(location)
    shown = [status_screen(status), summary_screen(sweep, location)]
    for text in [report(tmp_path, "mine"), *map(one_line, shown)]:
        assert f"1 unreadable ({folder.name}/3.png); skipped: 1 .mov" in text
        assert "2 of 16 synthetic images given up, blank or unreadable (six/1.png)" in text
    [unused] = status["unused"].values()
    assert unused["files"] == {f"{folder.name}/3.png": "it is empty"}


def test_a_report_is_self_contained_and_reproducible(grid):
    text = report(grid, "grid")
    assert report(grid, "grid") == text
    assert len(text) < 5_000_000
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text


def test_text_of_a_sweep_file_is_escaped(tmp_path):
    text = "# <script>alert(1)</script> & more\nversion: 1\nname: odd\n"
    (tmp_path / "odd.yaml").write_text(text + "fixed: {method: zero_shot}\nseeds: [1]\n")
    shown = report(run_sweep(tmp_path / "odd.yaml"), "odd")
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown


POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="[^"]*">\n')
LOADED = "document.readyState === 'complete' && document.images.length > 0"
COUNT_VIOLATIONS = """
window.refused = [];
document.addEventListener("securitypolicyviolation", event => refused.push(event.blockedURI));
"""
MARKUP = """
<base href="/base/">
<link rel="stylesheet" href="/link"><style>@import "/import";
body { background: url(/background) } @font-face { font-family: x; src: url(/font) }
h1 { font-family: x }</style>
<img src="/image"><iframe src="/frame"></iframe><object data="/object"></object>
<script src="/script"></script><script>document.title = "ran"; fetch("/fetch")</script>
<img src="data:," onerror="document.title = 'ran'">
"""


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@contextmanager
def pages(texts: dict[str, str], reached: set[str]) -> Iterator[str]:
    """The URL of a server of pages, which adds other requested paths to `reached`."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in (*texts, "/favicon.ico"):
                reached.add(self.path)
            body = texts.get(self.path, "").encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with serve(Pages) as url:
        yield url


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_shows_the_whole_report_under_its_content_security_policy(grid, browser):
    browser.send("Page.enable")
    browser.send("Page.addScriptToEvaluateOnNewDocument", source=COUNT_VIOLATIONS)
    with pages({"/report": report(grid, "grid")}, set()) as url:
        browser.open(f"{url}/report", LOADED)
        images = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(images) > 5
        assert all(images)
        assert browser.evaluate("getComputedStyle(document.body).margin") == "0px"
        assert browser.evaluate("refused") == []


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_policy_of_a_report_blocks_scripts_and_requests_of_injected_markup(grid, browser):
    """Without the policy the markup runs scripts and sends requests."""
    text = report(grid, "grid").replace("<nav", f"{MARKUP}<nav", 1)
    texts = {"/closed": text, "/open": POLICY.sub("", text)}
    assert texts["/open"] != text
    reached: set[str] = set()
    with pages(texts, reached) as url:
        browser.open(f"{url}/open", f"{LOADED} && document.title === 'ran'")
        assert {"/link", "/image", "/frame", "/script", "/fetch"} <= reached
        reached.clear()
        browser.open(f"{url}/closed", LOADED)
        assert browser.evaluate("document.title") == "grid · airsweep"
        assert reached == set()


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


# ---------------------------------------------------------------- parts


def test_the_most_confused_pairs_come_first():
    matrix = np.array([[5, 5, 0], [1, 9, 0], [0, 8, 2]])
    assert list(frequent_confusions(matrix, ["a", "b", "c"], 3)) == [
        ("c", "b", 0.8),
        ("a", "b", 0.5),
        ("b", "a", 0.1),
    ]
    assert list(frequent_confusions(np.diag([3, 3]), ["a", "b"])) == []
