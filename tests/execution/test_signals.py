"""A signal stops a run, also where other code drops what its handler raises."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.helpers.sweeps import TIMEOUT, environment

DEAF = """
import os, signal, sys, time
from orchestrator.execution import (driver)
from orchestrator.execution._run import Run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
run = Run(*[None] * 7)
driver._heed_signals(run)
try:
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(5)
    except BaseException:
        pass  # as Ray's callbacks and Python's finalizers do
    run.check()  # the driver's loop calls it some ten times a second
    print("went on")
except KeyboardInterrupt:
    print("interrupted", run.stopped)
except SystemExit as stop:
    print("exit", stop.code, run.stopped)
driver._restore_interrupts()
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
