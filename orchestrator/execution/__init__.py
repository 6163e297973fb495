"""Run a sweep on Ray: prepare artifacts, schedule trials, show progress."""

from orchestrator.execution._checks import check_start
from orchestrator.execution.driver import run_sweep
from orchestrator.execution.screen import Screen, make_screen

__all__ = [
    "Screen",
    "check_start",
    "make_screen",
    "run_sweep",
]
