"""A run that waits for taken resources is reported; a run that works is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.execution._state import RunState, shortage
from orchestrator.spec import Resources
from orchestrator.spec.resources import GeneratorResources, TrialResources

GPU = Resources(
    trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1, custom={"sd": 1})
)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"CPU": (4, 8), "GPU": (1, 2), "sd": (1, 1)}, ""),
        ({"CPU": (0, 8), "GPU": (1, 2), "sd": (1, 1)}, "a trial needs 1 CPU, but 0 of 8"),
        ({"CPU": (4, 8), "GPU": (0.5, 2), "sd": (1, 1)}, "a generator needs 1 GPU, but 0.5 of 2"),
        ({"CPU": (4, 8), "GPU": (1, 2)}, "a generator needs 1 sd, but 0 of 0"),
    ],
)
def test_the_message_names_the_taken_resource_and_the_process_that_needs_it(free, message):
    assert shortage(GPU, free).startswith(message)
    assert bool(shortage(GPU, free)) == bool(message)


def test_a_wait_has_a_reason_after_a_minute_in_which_no_process_works(monkeypatch):
    waiting = [True]
    monkeypatch.setattr("orchestrator.cluster.session.waits_for_resources", lambda: waiting[0])
    monkeypatch.setattr("orchestrator.cluster.session.free_resources", lambda: {"CPU": (0, 2)})
    state = RunState(SimpleNamespace(resources=Resources()), *[None] * 5)
    assert state._awaited() == "waiting for the last tasks"
    state.worked -= 60
    reason = "; a trial needs 1 CPU, but 0 of 2 are free; `ray status` shows what is in use"
    assert state._awaited() == f"waiting for the last tasks{reason}"
    waiting[0] = False  # the cores belong to a process of this sweep that starts slowly
    assert state._awaited() == "waiting for the last tasks"
