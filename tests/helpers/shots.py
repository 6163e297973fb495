"""Take the screenshots of docs/tracking.md from a store with the finished quickstart.

python -m tests.helpers.shots runs quickstart docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from orchestrator.tracking.database import run_tables
from tests.helpers.browser import Browser
from tests.helpers.servers import MlflowServer
from tests.helpers.sweeps import all_runs
from tests.test_browsing import VIEW, shows

CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"
SHOW_MORE = "[...document.querySelectorAll('span')].find(e => e.innerText === 'Show more')"


def main(store: Path, sweep: str, folder: Path) -> None:
    query = f"tags.`air.kind` = 'sweep' and tags.`air.sweep` = '{sweep}'"
    (parent,) = (run.info for run in all_runs(store, query))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        server, browser = MlflowServer(store, Path(scratch, "log")), Browser(Path(scratch, "home"))
        server.start()
        try:
            browser.open(f"{server.url}/{run_tables(store / 'mlflow.db')[0]}", shows(sweep))
            browser.wait(shows("test/accuracy_low"))
            close_assistant(browser)
            take(browser, folder / "mlflow_table.png", 1600, 760)

            page = f"{server.url}/#/experiments/{parent.experiment_id}/runs/{parent.run_id}{VIEW}"
            browser.open(page, shows("has the highest mean"))
            close_assistant(browser)
            browser.wait(SHOW_MORE)
            browser.evaluate(f"{SHOW_MORE}.click()")
            take(browser, folder / "mlflow_parent.png", 1280, 1300)
        finally:
            browser.close()
            server.stop()


def close_assistant(browser: Browser) -> None:
    browser.evaluate(f"document.querySelector(`{CLOSE}`)?.click()")


def take(browser: Browser, file: Path, width: int, height: int) -> None:
    browser.screenshot(file, width, height)
    with Image.open(file) as screenshot:
        reduced = screenshot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
