"""The store: artifacts by content key, the event log of each sweep, locks and backends."""

from orchestrator.store.artifacts import ArtifactStore, open_store, smoke_store
from orchestrator.store.buckets import folder_of, is_bucket
from orchestrator.store.event_log import Ledger
from orchestrator.store.location import Place, read_outcome, read_resolved, recorded_places, whoami
from orchestrator.store.records import TrialRecord, read_trial

__all__ = [
    "ArtifactStore",
    "Ledger",
    "Place",
    "TrialRecord",
    "folder_of",
    "is_bucket",
    "open_store",
    "read_outcome",
    "read_resolved",
    "read_trial",
    "recorded_places",
    "smoke_store",
    "whoami",
]
