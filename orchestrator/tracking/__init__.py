"""MLflow tracking: publishes the results of a store, while a sweep runs or afterwards."""

from orchestrator.tracking.export import Publisher
