"""Results of sweeps: rows with intervals, comparisons, tables, charts, HTML report and bundles.

Modules that import pandas are not imported here.
"""

from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.results import results_of
from orchestrator.reporting.screens import plan_report, plan_screen, summary_screen
