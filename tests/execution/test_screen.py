"""What a running sweep says, where nobody watches a terminal."""

from __future__ import annotations

import pytest

from orchestrator.execution import _progress as progress
from orchestrator.execution import screen


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(screen, "time", found)
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_long_thing_is_told_with_the_time_that_is_left(clock, capsys):
    lines = screen.Screen()
    lines.progress("LoRA a", 10, 110)
    clock.now += 20
    lines.progress("LoRA a", 30, 110)
    clock.now += 1
    lines.progress("LoRA a", 31, 110)  # too soon for another line
    clock.now += 79
    lines.progress("LoRA a", 110, 110)  # what is ready is told by `prepared` and `outcome`
    assert capsys.readouterr().err.splitlines() == [
        "LoRA a: 10/110",
        "LoRA a: 30/110, about 1:20 left",
    ]


def test_the_longer_it_takes_the_rarer_are_the_lines(clock, capsys):
    lines = screen.Screen()
    for second in range(3600):
        lines.progress("trial a", second, 3601)
        clock.now += 1
    assert 30 < len(capsys.readouterr().err.splitlines()) < 60


def test_who_waits_for_somebody_says_so_and_the_longer_the_rarer(capsys):
    lines = screen.Screen()
    for second in range(5, 3600):
        lines.waiting("LoRA a", "team/other (there, process 7)", second)
    lines.waiting("LoRA a", "team/third (there, process 8)", 5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "LoRA a: team/other (there, process 7) makes it, waiting for 0:05"
    assert said[-1] == "LoRA a: team/third (there, process 8) makes it, waiting for 0:05"
    assert len(said) == 11


@pytest.mark.parametrize("kind", [screen.Screen, screen.Bars])
def test_a_message_does_not_steer_the_terminal(kind, capsys):
    kind().say("a\x1b]0;pwned\x07.png cannot be read")
    assert capsys.readouterr().err == "a\\u001b]0;pwned\\u0007.png cannot be read\n"


def test_short_work_leaves_no_note_and_long_work_one_a_second(clock):
    written = []

    class Remote:
        class write:
            @staticmethod
            def remote(name, kind, done, total):
                assert kind == "progress"
                written.append((name, done, total))

    note = progress.Note(Remote(), "trial a")
    note.share(0.5)
    note.share(1.0)
    assert written == []
    note = progress.Note(Remote(), "trial b")
    for tenth in range(201):
        note.share(tenth / 200)
        clock.now += 0.1
    assert 4 <= len(written) <= 8
    assert written[-1] == ("trial b", 100, 100)
