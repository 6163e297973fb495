"""What a sweep needs, what is there and what is left: plans, requirements, searches, estimates."""

from orchestrator.planning.inputs import refs_of
from orchestrator.planning.outcome import Outcome, OutcomeTracker
from orchestrator.planning.plan import (
    Need,
    Plan,
    Slot,
    changed_inputs,
    earlier_results,
    holds,
    name_of,
    needs_of,
    possible_trials,
)
from orchestrator.planning.requests import Asked, asked, plan_of
from orchestrator.planning.resolve import Resolver, resolver_of
from orchestrator.planning.resources import Machine, asked_of, does_not_fit

__all__ = [
    "Asked",
    "Machine",
    "Need",
    "Outcome",
    "OutcomeTracker",
    "Plan",
    "Resolver",
    "Slot",
    "asked",
    "asked_of",
    "changed_inputs",
    "does_not_fit",
    "earlier_results",
    "holds",
    "name_of",
    "needs_of",
    "plan_of",
    "possible_trials",
    "refs_of",
    "resolver_of",
]
