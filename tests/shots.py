"""Takes the pictures of docs/tracking.md from a store of the finished quickstart.

python -m tests.shots runs quickstart docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser
from tests.servers import MlflowServer
from tests.sweeps import all_runs
from tests.test_browsing import VIEW, shown

CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"
# What a pointer would have hidden: there is none.
TIDY = """(() => { const style = document.createElement('style');
    style.textContent = '.modebar { display: none !important }';
    document.head.append(style); })()"""
UNFOLD = "[...document.querySelectorAll('span')].find(e => e.innerText === 'Show more')"


def main(store: Path, sweep: str, folder: Path) -> None:
    runs = [run for run in all_runs(store) if run.data.tags["air.sweep"] == sweep]
    parent = next(run for run in runs if run.data.tags["air.kind"] == "sweep")
    settings = [run for run in runs if run.data.tags["air.kind"] == "point"]
    best = max(settings, key=lambda run: run.data.metrics["test/accuracy"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        server, browser = MlflowServer(store, Path(scratch, "log")), Browser(Path(scratch, "home"))
        server.start()
        runs_page = f"{server.url}/#/experiments/{parent.info.experiment_id}/runs"

        def shot(name: str, url: str, until: str, height: int, unfold: bool = False) -> None:
            browser.open(url, until)
            if browser.evaluate(f"Boolean(document.querySelector({CLOSE!r}))".replace('"', "`")):
                browser.evaluate(f"document.querySelector({CLOSE!r}).click()".replace('"', "`"))
            if unfold:
                browser.wait(UNFOLD)
                browser.evaluate(f"{UNFOLD}.click()")
            browser.evaluate(TIDY)
            file = folder / f"mlflow_{name}.png"
            browser.screenshot(file, 1280, height)
            with Image.open(file) as whole:
                few = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(file, optimize=True)

        try:
            page = f"{runs_page}/{parent.info.run_id}{VIEW}"
            shot("parent", page, shown("has the highest mean"), 1300, unfold=True)
            page = f"{runs_page}/{best.info.run_id}{VIEW}"
            shot("point", page, shown("Mean over"), 1250, unfold=True)
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
