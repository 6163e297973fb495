"""Lines of a running sweep off a terminal."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest

from orchestrator.execution import _progress as progress
from orchestrator.execution import screen
from orchestrator.planning import Outcome


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, how: str) -> str:
        return time.strftime(how, time.gmtime(self.now))

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(screen, "time", fake)
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_progress_of_long_work_has_the_remaining_time(clock, capsys):
    lines = screen.Screen()
    lines.show_progress("LoRA a", 10, 110, "steps")
    clock.now += 20
    lines.show_progress("LoRA a", 30, 110, "steps")
    clock.now += 1
    lines.show_progress("LoRA a", 31, 110)  # too soon for another line
    clock.now += 79
    lines.show_progress("LoRA a", 110, 110)  # `show_prepared` reports finished work
    assert capsys.readouterr().err.splitlines() == [
        "00:16:40 LoRA a: 10/110 steps",
        "00:17:00 LoRA a: 30/110 steps, about 1 min 20 s left",
    ]
    for second in range(3600):  # another one with the same title
        lines.show_progress("LoRA a", second, 3601)
        clock.now += 1
    assert 30 < len(capsys.readouterr().err.splitlines()) < 60


def test_the_row_of_a_point_has_the_number_of_ended_trials(clock, capsys):
    lines = screen.Screen()
    cell = SimpleNamespace(id="digits-cpl")
    plan = SimpleNamespace(
        sweep=SimpleNamespace(name="a", seeds=SimpleNamespace(values=(1, 2))),
        cells=[cell], requirements=[], total=15, ended=10, to_run=5,
        results=Counter(done=10),
    )  # fmt: skip
    lines.show_start(plan)
    for seed in (1, 2):
        slot = SimpleNamespace(id=f"digits-cpl/0/seed={seed}", cell=cell, point=0, params={})
        lines.show_outcome(
            Outcome(slot, "failed", failure_class="nan", message="the loss is not finite")
        )
    row = capsys.readouterr().err.splitlines()[-1]
    assert row.startswith("00:16:40 12 of 15 trials: digits-cpl")
    assert row.endswith("2 failed (nan): the loss is not finite")


def test_waiting_for_another_process_is_reported_and_more_rarely_over_time(clock, capsys):
    lines = screen.Screen()
    for second in range(5, 3600):
        lines.show_wait(lambda: "waiting for team/other to make it", second, "LoRA a")
    for second in range(5, 16):
        lines.show_wait(lambda: "waiting for team/third to make it", second, "LoRA a")
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "00:16:40 LoRA a: waiting for team/other to make it (15 s so far)"
    assert printed[-1] == "00:16:40 LoRA a: waiting for team/third to make it (15 s so far)"
    assert len(printed) == 14


@pytest.mark.parametrize("kind", [screen.Screen, screen.BarScreen])
def test_control_characters_in_a_message_are_escaped(kind, capsys):
    kind().message("a\x1b]0;pwned\x07.png cannot be read")
    assert capsys.readouterr().err.endswith("a\\u001b]0;pwned\\u0007.png cannot be read\n")


def test_long_work_is_reported_each_second_and_its_curves_more_rarely(clock):
    sent = []
    actor = SimpleNamespace(write=SimpleNamespace(remote=lambda *report: sent.append(report)))
    reporter = progress.ProgressReporter(actor, "trial a", "steps")
    reporter(100, 200)
    reporter(200, 200)
    assert sent == []  # short work sends no report
    reporter = progress.ProgressReporter(actor, "trial b", "steps")
    for step in range(201):
        reporter(step, 200)
        clock.now += 0.1
    assert 4 <= len(sent) <= 8
    assert sent[-1] == ("trial b", "progress", 200, 200, "steps")
    sent.clear()
    reporter = progress.ProgressReporter(actor, "trial c", "steps")
    for rounds in range(1, 16):
        clock.now += 3
        reporter.report_curves({"train/loss": [0.5] * rounds})
    assert [len(curves["train/loss"]) for _, _, curves, _ in sent] == [6, 10, 14]


def test_a_block_that_does_not_return_is_reported_meanwhile(monkeypatch, capsys):
    monkeypatch.setattr(screen, "WAIT_INTERVAL", 1.0)
    with screen.Screen().waiting("waiting for Ray to start"):
        time.sleep(2.5)
    assert "waiting for Ray to start (1 s so far)" in capsys.readouterr().err
