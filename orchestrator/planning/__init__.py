"""Planning: which trials and artifacts a sweep needs, which exist, and which are left to compute.

Also searches (one Optuna study per cell), and estimates of time and disk space.
"""

from orchestrator.planning.checks import unschedulable_reason, unused_gpus_reason
from orchestrator.planning.ledger import Slot
from orchestrator.planning.outcome import Outcome, OutcomeTracker
from orchestrator.planning.plan import Plan, changed_inputs, earlier_results
from orchestrator.planning.requests import SweepRequest, plan_of, read_request
from orchestrator.planning.requirements import (
    Requirement,
    artifact_title,
    contains_spec,
    requirements_of,
)
from orchestrator.planning.resolve import Resolver, refs_of, resolver_of
from orchestrator.planning.resources import Machine, ray_resources
