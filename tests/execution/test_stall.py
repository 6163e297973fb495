"""A run that waits for taken resources is reported; a run that works is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.execution._state import RunState
from orchestrator.spec import Resources
from orchestrator.spec.resources import GeneratorResources, TrialResources

GPU = Resources(
    trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1, custom={"sd": 1})
)


@pytest.mark.parametrize(
    ("free", "lack"),
    [
        ({"CPU": (4, 8), "GPU": (1, 2), "sd": (1, 1)}, None),
        ({"CPU": (0, 8), "GPU": (1, 2), "sd": (1, 1)}, "a trial needs 1 CPU, but 0 of 8"),
        ({"CPU": (4, 8), "GPU": (0.5, 2), "sd": (1, 1)}, "a generator needs 1 GPU, but 0.5 of 2"),
        ({"CPU": (4, 8), "GPU": (1, 2)}, "a generator needs 1 sd, but 0 of 0"),
    ],
)
def test_a_wait_names_what_it_lacks_after_a_minute_in_which_no_process_works(
    monkeypatch, free, lack
):
    waiting = [True]
    monkeypatch.setattr("orchestrator.cluster.session.waits_for_resources", lambda: waiting[0])
    monkeypatch.setattr("orchestrator.cluster.session.free_resources", lambda: free)
    state, plain = (
        RunState(SimpleNamespace(resources=GPU), *[None] * 5),
        "waiting for the last tasks",
    )
    assert state._awaited() == plain
    state.worked -= 60
    reason = f"; {lack} are free; `ray status` shows what is in use" if lack else ""
    assert state._awaited() == plain + reason
    waiting[0] = False  # the cores belong to a process of this sweep that starts slowly
    assert state._awaited() == plain
