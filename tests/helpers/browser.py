"""Headless chromium, driven through a pipe: text and JavaScript of a page.

The DevTools protocol is JSON with terminating zero bytes on file descriptors 3 and 4 of the
browser, so no port and no package is needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 60  # seconds until a page without the expected content is a failure
MISSING = "chromium is missing: apt-get install -y --no-install-recommends chromium"


class Browser:
    """A chromium process with one page.

    Args:
        folder: for the profile of the browser.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM is not None, MISSING
        (child_in, our_out), (our_in, child_out) = _pipe(), _pipe()
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
        devnull = os.open(os.devnull, os.O_WRONLY)
        self._pid = os.posix_spawn(
            CHROMIUM,
            arguments,
            {**os.environ, "HOME": str(folder)},
            file_actions=[  # in this order, because `devnull` may be 3 or 4
                (os.POSIX_SPAWN_DUP2, devnull, 1),
                (os.POSIX_SPAWN_DUP2, devnull, 2),
                (os.POSIX_SPAWN_DUP2, child_in, 3),
                (os.POSIX_SPAWN_DUP2, child_out, 4),
            ],
            setsid=True,  # so that `close` ends its child processes too
        )
        for end in (child_in, child_out, devnull):
            os.close(end)
        self._out, self._in, self._rest = our_out, our_in, b""
        self._number, self._session = 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._resize(width, height)

    def open(self, url: str, until: str, timeout: float = WAIT) -> float:
        """Open a page and wait until a JavaScript expression is true; return the seconds."""
        began = time.monotonic()
        self.send(
            "Page.navigate", url="about:blank"
        )  # a change of the fragment alone loads nothing
        self.send("Page.navigate", url=url)
        self.wait(until, timeout)
        return time.monotonic() - began

    def wait(self, until: str, timeout: float = WAIT) -> None:
        deadline = time.monotonic() + timeout
        guarded = f"(() => {{ try {{ return Boolean({until}) }} catch {{ return false }} }})()"
        while not self.evaluate(guarded):  # between two pages no document exists
            assert time.monotonic() < deadline, (
                f"still false after {timeout} s: {until}; the page:\n{self.text()}"
            )
            time.sleep(0.05)

    def text(self) -> str:
        """The visible text of the page."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def evaluate(self, expression: str) -> Any:
        parameters = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", **parameters)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._out)
        os.close(self._in)

    def _resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def send(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + WAIT
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
        *messages, self._rest = (self._rest + data).split(b"\0")
        return [json.loads(message) for message in messages]


def _pipe() -> tuple[int, int]:
    """The ends of a pipe, with file descriptors above 4 because the browser needs 3 and 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
