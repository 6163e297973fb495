"""Who waits for what others hold hears so; who works is left alone."""

from __future__ import annotations

import threading

import pytest

from orchestrator import stall
from orchestrator.stall import Stall, wanting
from orchestrator.sweep import GeneratorResources, Resources, TrialResources
from tests.sweeps import TIMEOUT

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
    monkeypatch.setattr(stall, "QUIET", 2.0)
    said, heard = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    watch = Stall(Resources(), lambda: {"CPU": (0, 2)}, say, every=0.01)
    for _ in range(60):
        watch.news()
        assert not heard.wait(0.05)
    assert heard.wait(TIMEOUT)
    watch.close()
    assert "a trial asks for 1 CPU and 0 of 2 are free" in said[0]
