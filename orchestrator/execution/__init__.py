"""Run a sweep on Ray: prepare artifacts, schedule trials, show progress."""

from orchestrator.execution._checks import check_start
from orchestrator.execution.driver import run_sweep
from orchestrator.execution.screen import make_screen
