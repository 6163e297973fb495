"""Store: artifacts by content key, the event log of each sweep, locks and backends."""

from orchestrator.store.artifacts import (
    ArtifactStore,
    open_store,
    smoke_store,
    store_of_smoke,
    user_name,
)
from orchestrator.store.buckets import is_bucket, store_folder
from orchestrator.store.event_log import EventLog
from orchestrator.store.location import (
    SweepLocation,
    read_outcome,
    read_resolved,
    recorded_locations,
)
from orchestrator.store.records import TrialRecord, read_trial
