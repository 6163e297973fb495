"""Debian's chromium without a window, driven through a pipe: what a page shows, and its picture.

The DevTools protocol is JSON between zero bytes on file descriptors 3 and 4 of the browser, so
neither a port nor a package is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.helpers.sweeps import TIMEOUT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = "chromium is not here: apt-get install -y --no-install-recommends chromium"


class Browser:
    """One process with one page.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM is not None, MISSING
        (to_it, from_us), (to_us, from_it) = _pipe(), _pipe()
        arguments = [
            CHROMIUM,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            f"--window-size={width},{height}",
            "--no-sandbox",  # as root, in a container
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "about:blank",
        ]
        quiet = os.open(os.devnull, os.O_WRONLY)
        self._pid = os.posix_spawn(
            CHROMIUM,
            arguments,
            {**os.environ, "HOME": str(folder)},
            file_actions=[  # in this order: `quiet` may itself be 3 or 4
                (os.POSIX_SPAWN_DUP2, quiet, 1),
                (os.POSIX_SPAWN_DUP2, quiet, 2),
                (os.POSIX_SPAWN_DUP2, to_it, 3),
                (os.POSIX_SPAWN_DUP2, from_it, 4),
            ],
            setsid=True,  # its helpers go with it
        )
        for end in (to_it, from_it, quiet):
            os.close(end)
        self._out, self._in, self._left = from_us, to_us, b""
        self._number, self._session = 0, ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._resize(width, height)

    def open(self, url: str, until: str, timeout: float = TIMEOUT) -> float:
        """Go to a page and wait until an expression of JavaScript is true; return the seconds."""
        began = time.monotonic()
        self._ask("Page.navigate", url="about:blank")  # a new fragment alone would load nothing
        self._ask("Page.navigate", url=url)
        self.wait(until, timeout)
        return time.monotonic() - began

    def wait(self, until: str, timeout: float = TIMEOUT) -> None:
        deadline = time.monotonic() + timeout
        tried = f"(() => {{ try {{ return Boolean({until}) }} catch {{ return false }} }})()"
        while not self.evaluate(tried):  # between two pages there is no document to ask
            assert time.monotonic() < deadline, f"never came: {until}; the page:\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def evaluate(self, expression: str) -> Any:
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path, width: int = 1280, height: int = 900) -> None:
        self._resize(width, height)
        time.sleep(1.0)  # charts draw themselves
        shot = self._ask("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._out)
        os.close(self._in)

    def _resize(self, width: int, height: int) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT
        while True:
            for answer in self._received(deadline):
                if answer.get("id") == self._number:
                    assert "error" not in answer, (method, answer["error"])
                    return answer["result"]

    def _received(self, deadline: float) -> list[dict[str, Any]]:
        ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, "chromium does not answer"
        data = os.read(self._in, 1 << 20)
        assert data, "chromium has ended"
        *messages, self._left = (self._left + data).split(b"\0")
        return [json.loads(message) for message in messages]


def _pipe() -> tuple[int, int]:
    """Ends that are none of 3 and 4, which the other would be put on."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
