"""A signal stops a run even if other code drops the exception of its handler."""

from __future__ import annotations

import signal

import pytest

from tests.helpers.sweeps import python

SCRIPT = """
import os, signal, sys, time
from orchestrator.environment import redirect_descriptor
from orchestrator.execution._signals import handle_signals, restore_interrupts
from orchestrator.execution._state import RunState
from orchestrator.execution.screen import Screen
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
state = RunState(None, None, Screen(), *[None] * 4)
handle_signals(state)
try:
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(5)
    except BaseException:
        pass  # as Ray's callbacks and Python's finalizers do
    state.check()  # the driver calls it about ten times a second
    print("not stopped")
except KeyboardInterrupt:
    print("interrupted", state.signal_exit_code)
except SystemExit as stop:
    print("exit", stop.code, state.signal_exit_code)
restore_interrupts()
print("closed", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("number", "output"),
    [(signal.SIGINT, "interrupted 130"), (signal.SIGTERM, "exit 143 143")],
)
def test_a_dropped_signal_is_raised_again(number, output):
    done = python("-c", SCRIPT, str(int(number)))
    assert done.stdout.splitlines() == [output, "closed True"]


TWICE = (
    SCRIPT[: SCRIPT.index("try:")]
    + """
state.screen.total = 5
try:
    os.kill(os.getpid(), signal.SIGINT)
finally:  # closes what is open, which may take long
    with redirect_descriptor(2, None):  # as while Ray starts
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
)


def test_a_second_interrupt_ends_the_process_and_says_what_is_left():
    done = python("-c", TWICE, check=False)
    assert done.returncode == 130
    assert done.stderr.split("\n\n") == [
        "\nstopping; what is finished is kept; press Ctrl-C again to stop now",
        "stopped; 5 of 5 trials left; the same command resumes\n",
    ]
