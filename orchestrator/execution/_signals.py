"""SIGTERM, Ctrl-C and the death of a local Ray: each ends a run in order, with its exit code."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.cluster.session import kill_local_ray
from orchestrator.errors import FAILED, INTERRUPTED, TERMINATED
from orchestrator.execution._state import RunState
from orchestrator.formatting import plural, show

log = logging.getLogger(__name__)


def handle_signals(state: RunState) -> None:
    """Install the handlers of a run. Call it again after `ray.init`, which replaces them."""
    if not _in_main_thread():
        return
    signal.signal(signal.SIGTERM, functools.partial(_on_sigterm, state))
    if not _sigint_is_ignored():
        signal.signal(signal.SIGINT, functools.partial(_on_sigint, state))


def restore_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if _in_main_thread() and not _sigint_is_ignored():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def on_ray_death(state: RunState, logs: Path) -> None:
    """End the run after its local Ray has died. Runs on a thread, so it signals the main thread."""
    state.ray_died = True
    log.error(
        "Ray died on this machine: it was killed or ran out of memory; the same command resumes "
        f"the sweep (Ray's logs: {logs})"
    )
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _on_sigterm(state: RunState, number: int, frame: Any) -> None:
    # A second SIGTERM would interrupt the code that records how the run ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state.signal_exit_code = state.signal_exit_code or (FAILED if state.ray_died else TERMINATED)
    raise SystemExit(state.signal_exit_code)


def _on_sigint(state: RunState, number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, functools.partial(_on_second_sigint, state))
    state.signal_exit_code = state.signal_exit_code or INTERRUPTED
    _say("stopping; what is finished is kept; press Ctrl-C again to stop now")
    raise KeyboardInterrupt


def _on_second_sigint(state: RunState, number: int, frame: Any) -> None:
    screen = state.screen
    left = screen.total - screen.ended_before - len(screen.ended)
    _say(f"stopped; {left} of {plural(screen.total, 'trial')} left; the same command resumes")
    if hasattr(sys, "ps1"):  # a Python session or a notebook, which must not end
        signal.default_int_handler(number, frame)
    kill_local_ray()
    os._exit(INTERRUPTED)


def _say(text: str) -> None:
    with suppress(RuntimeError):  # the signal came while a line was printed
        show(f"\n{text}", file=sys.stderr, flush=True)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _sigint_is_ignored() -> bool:
    """Whether SIGINT is ignored, as in a background job of a shell."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
