"""MLflow tracking: publishes the results of a store, while a sweep runs or afterwards."""

from orchestrator.tracking.publish import Publisher
from orchestrator.tracking.reconcile import reconcile

__all__ = [
    "Publisher",
    "reconcile",
]
