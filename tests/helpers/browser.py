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
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 60  # seconds until a page without the expected content is a failure
MISSING = "chromium is missing: apt-get install -y --no-install-recommends chromium"
OPTIONS = """
    --headless=new --remote-debugging-pipe --no-sandbox --disable-dev-shm-usage --disable-gpu
    --disable-background-networking --no-first-run --hide-scrollbars
"""  # no sandbox: as root, in a container


class Browser:
    """A chromium process with one page.

    Args:
        folder: for the profile of the browser.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM is not None, MISSING
        (child_in, self._out), (self._in, child_out) = _pipe(), _pipe()
        command = f'exec {CHROMIUM} "$@" 3<&{child_in} 4>&{child_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", *OPTIONS.split(), f"--user-data-dir={folder}"],
            env={**os.environ, "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(child_in, child_out),
            start_new_session=True,  # so that `close` ends its child processes too
        )
        os.close(child_in)
        os.close(child_out)
        self._rest, self._number, self._session = b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def open(self, url: str, until: str) -> None:
        """Open a page and wait until a JavaScript expression is true."""
        for address in ("about:blank", url):  # a change of the fragment alone loads nothing
            self.send("Page.navigate", url=address)
        self.wait(until)

    def wait(self, until: str) -> None:
        deadline = time.monotonic() + WAIT
        guarded = f"(() => {{ try {{ return Boolean({until}) }} catch {{ return false }} }})()"
        while not self.evaluate(guarded):  # between two pages no document exists
            assert time.monotonic() < deadline, f"still false: {until}; the page:\n{self.text()}"
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
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            ready, _, _ = select.select([self._in], [], [], WAIT)
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, "chromium does not answer or has ended"
            *messages, self._rest = (self._rest + data).split(b"\0")
            for answer in map(json.loads, messages):
                if answer.get("id") == self._number:
                    assert "error" not in answer, (method, answer["error"])
                    return answer["result"]


def _pipe() -> tuple[int, int]:
    """The ends of a pipe, with file descriptors above 4 because the browser needs 3 and 4."""
    ends = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return read, write
