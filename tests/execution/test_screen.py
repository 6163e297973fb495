"""Lines of a running sweep off a terminal."""

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
    fake = Clock()
    monkeypatch.setattr(screen, "time", fake)
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_progress_of_long_work_has_the_remaining_time(clock, capsys):
    lines = screen.Screen()
    lines.show_progress("LoRA a", 10, 110)
    clock.now += 20
    lines.show_progress("LoRA a", 30, 110)
    clock.now += 1
    lines.show_progress("LoRA a", 31, 110)  # too soon for another line
    clock.now += 79
    lines.show_progress("LoRA a", 110, 110)  # `show_prepared` reports finished work
    assert capsys.readouterr().err.splitlines() == [
        "LoRA a: 10/110",
        "LoRA a: 30/110, about 1:20 left",
    ]


def test_longer_work_has_rarer_lines(clock, capsys):
    lines = screen.Screen()
    for second in range(3600):
        lines.show_progress("trial a", second, 3601)
        clock.now += 1
    assert 30 < len(capsys.readouterr().err.splitlines()) < 60


def test_waiting_for_another_process_is_reported_and_more_rarely_over_time(capsys):
    lines = screen.Screen()
    for second in range(5, 3600):
        lines.show_wait("LoRA a", "team/other (host, process 7)", second)
    lines.show_wait("LoRA a", "team/third (host, process 8)", 5)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "LoRA a: waiting for team/other (host, process 7) to make it (0:05 so far)"
    assert (
        printed[-1] == "LoRA a: waiting for team/third (host, process 8) to make it (0:05 so far)"
    )
    assert len(printed) == 11


@pytest.mark.parametrize("kind", [screen.Screen, screen.BarScreen])
def test_control_characters_in_a_message_are_escaped(kind, capsys):
    kind().message("a\x1b]0;pwned\x07.png cannot be read")
    assert capsys.readouterr().err == "a\\u001b]0;pwned\\u0007.png cannot be read\n"


def test_short_work_sends_no_report_and_long_work_one_each_second(clock):
    sent = []

    class Remote:
        class write:
            @staticmethod
            def remote(name, kind, done, total):
                assert kind == "progress"
                sent.append((name, done, total))

    reporter = progress.ProgressReporter(Remote(), "trial a")
    reporter.report_fraction(0.5)
    reporter.report_fraction(1.0)
    assert sent == []
    reporter = progress.ProgressReporter(Remote(), "trial b")
    for tenth in range(201):
        reporter.report_fraction(tenth / 200)
        clock.now += 0.1
    assert 4 <= len(sent) <= 8
    assert sent[-1] == ("trial b", 100, 100)
