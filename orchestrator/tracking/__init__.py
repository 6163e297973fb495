"""MLflow tracking: publishes the results of a store, while a sweep runs or afterwards."""

from orchestrator.tracking.publish import Publisher
from orchestrator.tracking.reconcile import make_tracker, reconcile

__all__ = [
    "Publisher",
    "make_tracker",
    "reconcile",
]
