"""Results of sweeps: rows with intervals, comparisons, tables, charts, the HTML report and bundles.

Only what needs no pandas is imported here."""

from orchestrator.reporting.results import results_of, standing
from orchestrator.reporting.rows import Results
from orchestrator.reporting.screens import plan_screen, summary_screen

__all__ = [
    "Results",
    "plan_screen",
    "results_of",
    "standing",
    "summary_screen",
]
