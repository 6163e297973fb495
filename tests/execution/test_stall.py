"""A run that waits for taken resources is reported; a run that works is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.execution import _stall as stall
from orchestrator.execution._stall import StallMonitor, shortage
from orchestrator.spec import Resources
from orchestrator.spec.sweep import GeneratorResources, TrialResources

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


def test_a_stall_is_reported_after_a_minute_without_progress_and_then_more_rarely(monkeypatch):
    now, messages = [1000.0], []
    monkeypatch.setattr(stall, "time", SimpleNamespace(monotonic=lambda: now[0]))
    waiting = [True]
    monitor = StallMonitor(
        Resources(), lambda: {"CPU": (0, 2)}, lambda: waiting[0], messages.append
    )
    for _ in range(60):
        now[0] += 10
        monitor.reset()
        monitor.check()
    assert messages == []
    for _ in range(20):
        now[0] += 10
        monitor.check()
    assert [line.partition(":")[0] for line in messages] == [
        "no process of this sweep has worked for 60 s",
        "no process of this sweep has worked for 120 s",
    ]
    assert "a trial needs 1 CPU, but 0 of 2 are free" in messages[0]
    waiting[0] = False  # the cores belong to a process of this sweep that starts slowly
    now[0] += 1000
    monitor.check()
    assert len(messages) == 2
