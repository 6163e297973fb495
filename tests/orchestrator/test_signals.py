"""Who stops a run is heard, also where other code drops what a signal handler raises."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.sweeps import TIMEOUT, environment

DEAF = """
import os, signal, sys, time
from types import SimpleNamespace
from orchestrator import driver
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
run = SimpleNamespace(stopped=None)
driver._heed_signals(run)
try:
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(5)
    except BaseException:
        pass  # as Ray's callbacks and Python's finalizers do
    time.sleep(30)
    print("went on")
except KeyboardInterrupt:
    print("interrupted", run.stopped)
except SystemExit as stop:
    print("exit", stop.code, run.stopped)
driver._heard()
time.sleep(1.5)  # nothing is raised any more
print("closed", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted 130"), (signal.SIGTERM, "exit 143 143")],
)
def test_a_signal_that_is_dropped_is_raised_again(number, said):
    done = subprocess.run(
        [sys.executable, "-c", DEAF, str(int(number))],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT,
        check=True,
    )
    assert done.stdout.splitlines() == [said, "closed True"]
