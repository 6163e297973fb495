"""Take the screenshot of docs/tracking.md from a store with the finished quickstart.

python -m tests.helpers.shots runs quickstart docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

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
            page = f"{server.url}/#/experiments/{parent.experiment_id}/runs/{parent.run_id}{VIEW}"
            browser.open(page, shows("has the highest mean"))
            if browser.evaluate(f"Boolean(document.querySelector({CLOSE!r}))".replace('"', "`")):
                browser.evaluate(f"document.querySelector({CLOSE!r}).click()".replace('"', "`"))
            browser.wait(SHOW_MORE)
            browser.evaluate(f"{SHOW_MORE}.click()")
            file = folder / "mlflow_parent.png"
            browser.screenshot(file, 1280, 1300)
        finally:
            browser.close()
            server.stop()
    with Image.open(file) as screenshot:
        reduced = screenshot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
