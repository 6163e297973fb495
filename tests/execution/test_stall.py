"""Who waits for what others hold hears so; who works is left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.execution import _stall as stall
from orchestrator.execution._stall import Stall, wanting
from orchestrator.spec import Resources
from orchestrator.spec.sweep import GeneratorResources, TrialResources

GPU = Resources(
    trial=TrialResources(gpu=0.25), generator=GeneratorResources(gpu=1, custom={"sd": 1})
)


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ({"CPU": (4, 8), "GPU": (1, 2), "sd": (1, 1)}, ""),
        ({"CPU": (0, 8), "GPU": (1, 2), "sd": (1, 1)}, "a trial asks for 1 CPU and 0 of 8"),
        ({"CPU": (4, 8), "GPU": (0.5, 2), "sd": (1, 1)}, "a generator asks for 1 GPU and 0.5 of 2"),
        ({"CPU": (4, 8), "GPU": (1, 2)}, "a generator asks for 1 sd and 0 of 0"),
    ],
)
def test_what_is_taken_is_named_with_who_asks_for_it(free, said):
    assert wanting(GPU, free).startswith(said)
    assert bool(wanting(GPU, free)) == bool(said)


def test_it_is_said_once_nothing_has_happened_for_a_while_and_not_while_something_does(monkeypatch):
    now, said = [1000.0], []
    monkeypatch.setattr(stall, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Stall(Resources(), lambda: {"CPU": (0, 2)}, said.append)
    for _ in range(60):
        now[0] += 10
        watch.news()
        watch.check()
    assert said == []
    for _ in range(20):
        now[0] += 10
        watch.check()
    assert [line.partition(":")[0] for line in said] == [
        "no news for 60 s",
        "no news for 120 s",
    ]
    assert "a trial asks for 1 CPU and 0 of 2 are free" in said[0]
