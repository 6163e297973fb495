"""MLflow: a view of what store and event log hold, filled while a sweep runs or later."""

from orchestrator.tracking.lookup import find_trial, named_trial
from orchestrator.tracking.publish import Publisher
from orchestrator.tracking.reconcile import reconcile
from orchestrator.tracking.types import make_tracker

__all__ = [
    "Publisher",
    "find_trial",
    "make_tracker",
    "named_trial",
    "reconcile",
]
