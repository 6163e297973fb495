"""Screens of a running sweep, on stderr: bars on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from air_core.tools.printable import printable
from orchestrator.environment import originals
from orchestrator.formatting import format_duration, plural, printable_lines, show
from orchestrator.planning import Plan, Requirement, artifact_title
from orchestrator.planning.history import results_text

if TYPE_CHECKING:
    from orchestrator.planning import Outcome

# Off a terminal, two lines about the same work are at least this many seconds apart, and this share
# of its time so far: an hour prints some forty lines instead of 360.
LINE_INTERVAL, LINE_SHARE = 10.0, 0.1
WAIT_INTERVAL = 15.0  # seconds until the first line about a wait, and the least between two
NAME_WIDTH = 44


class PointRows:
    """Collects outcomes into table rows: one row for each point, when all its seeds are over."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.outcomes: dict[tuple[str, int], list[Outcome]] = {}

    def add(self, outcome: Outcome) -> str | None:
        """The row that this outcome completes, if any."""
        point = self.outcomes.setdefault((outcome.slot.cell.id, outcome.slot.point), [])
        point.append(outcome)
        if len(point) < self.seeds:
            return None
        params = " ".join(f"{key}={_short(value)}" for key, value in outcome.slot.params.items())
        name = f"{outcome.slot.cell.id} {params}".strip()
        scores = [
            100 * score for o in point if o.record and (score := o.record.headline) is not None
        ]
        failed = [o for o in point if o.state == "failed"]
        text = f"{name:<{NAME_WIDTH}}"
        if scores:
            distinct = len({o.slot.key for o in point if o.record})
            spread = f" ± {stdev(scores):.1f}" if distinct > 1 else ""
            text += f" test {fmean(scores):5.1f} %{spread}"
        if failed:
            text += f"  {len(failed)} failed ({failed[0].failure_class}): {failed[0].message}"
        if all(o.state == "reused" for o in point):
            text += "  from the store"
        return text


@dataclass
class WorkPace:
    """Speed of a long piece of work since its first report."""

    started: float
    first: int
    last_line: float = 0.0

    def remaining(self, now: float, done: int, total: int) -> str:
        """The remaining time at this pace, as the end of a line."""
        if done <= self.first:
            return ""
        seconds = (now - self.started) / (done - self.first) * (total - done)
        return f", about {format_duration(seconds)} left"


class Screen:
    """For logs: a line for each event, and a line now and then while long work runs."""

    def __init__(self) -> None:
        self.rows = PointRows(1)
        self.total = self.ended_before = 0  # trials
        self.ended: set[str] = set()  # slots that ended in this run
        self.counts: dict[str, list[int]] = {}
        self.paces: dict[str, WorkPace] = {}
        self.waits: dict[str, float] = {}  # seconds of waiting at the last line, by work

    def message(self, text: str) -> None:
        show(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def show_start(self, plan: Plan) -> None:
        self.rows = PointRows(len(plan.sweep.seeds.values))
        self.total, self.ended_before = plan.total, plan.ended
        self.counts = {
            str(requirement.key): [0, requirement.total()] for requirement in plan.requirements
        }
        self.message(
            f"{plan.sweep.name}: {plural(plan.total, 'trial')} in "
            f"{plural(len(plan.cells), 'cell')}, "
            f"{plan.to_run} to run, {results_text(plan.results)}"
        )

    def show_prepared(self, requirement: Requirement) -> None:
        count, title = self._count(requirement), artifact_title(requirement.key)
        if not requirement.rows or count[0] == count[1]:
            self.paces.pop(title, None)  # another artifact can have the same title
            self.message(f"{title}: ready")
        else:
            self.show_progress(title, count[0], count[1])

    def show_progress(self, name: str, done: int, total: int, unit: str = "") -> None:
        now = time.monotonic()
        pace = self.paces.get(name)
        if pace is None or done < pace.first:  # that was a late report of another artifact
            pace = self.paces[name] = WorkPace(now, done)
        interval = max(LINE_INTERVAL, LINE_SHARE * (now - pace.started))
        if done < total and now - pace.last_line > interval:
            pace.last_line = now
            count = f"{done}/{total} {unit}".rstrip()
            self.message(f"{name}: {count}{pace.remaining(now, done, total)}")

    def show_wait(self, wait: Callable[[], str], seconds: float, name: str = "") -> None:
        """Show a wait that has lasted some seconds so far; of each piece of work one at a time."""
        last = self.waits.get(name, 0.0)
        if seconds < last:  # another wait has begun
            self.waits[name] = last = 0.0
        if seconds >= last + max(WAIT_INTERVAL, last / 2):  # an hour is 13 lines
            self.waits[name] = seconds
            self.message(f"{name}{': ' * bool(name)}{wait()} ({format_duration(seconds)} so far)")

    @contextmanager
    def waiting(self, wait: str) -> Iterator[None]:
        """Show the wait for the block, which does not return for long."""
        started, ended = time.monotonic(), threading.Event()

        def report() -> None:
            while not ended.wait(1.0):
                self.show_wait(lambda: wait, time.monotonic() - started)

        threading.Thread(target=report, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def show_outcome(self, outcome: Outcome) -> None:
        row = self.rows.add(outcome)
        if outcome.already_logged:
            return
        self.ended.add(outcome.slot.id)
        if row is not None:
            self.message(self._numbered(row))

    def _numbered(self, row: str) -> str:
        count = f"{self.ended_before + len(self.ended):>{len(str(self.total))}} of {self.total}"
        return f"{count} trials: {row}"

    def close(self) -> None:
        pass

    def _count(self, requirement: Requirement) -> list[int]:
        """[complete, all] parts of a requirement, after one more part is complete."""
        count = self.counts.setdefault(str(requirement.key), [0, requirement.total()])
        count[0] += 1
        return count


class BarScreen(Screen):
    """For terminals: a bar for each piece of running work, table rows above the bars."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn(f"{{task.description:<{NAME_WIDTH}}}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}
        self.trials: Any = None

    def message(self, text: str) -> None:
        if 2 in originals:  # Ray starts: the text replaces the bar, which is drawn again afterwards
            os.write(originals[2], f"\r\x1b[2K{printable_lines(text)}\n".encode())
        else:
            self.console.print(printable_lines(text), markup=False, soft_wrap=True)

    def show_start(self, plan: Plan) -> None:
        super().show_start(plan)
        self.bars.start()
        self.trials = self.bars.add_task("trials", total=plan.total, completed=plan.ended, unit="")

    def show_outcome(self, outcome: Outcome) -> None:
        if not outcome.already_logged:
            self.bars.advance(self.trials)
        super().show_outcome(outcome)

    def close(self) -> None:
        self.bars.stop()

    def show_prepared(self, requirement: Requirement) -> None:
        count = self._count(requirement) if requirement.rows else [1, 1]
        self.show_progress(artifact_title(requirement.key), count[0], count[1])

    def _numbered(self, row: str) -> str:
        return row  # the bar of the trials has the count

    def show_progress(self, name: str, done: int, total: int, unit: str = "") -> None:
        # The last report of some work has another unit than the reports before it.
        if name not in self.tasks:
            shown = printable(name if len(name) <= NAME_WIDTH else f"{name[:20]}...{name[-21:]}")
            self.tasks[name] = self.bars.add_task(shown, total=total, unit=unit)
        self.bars.update(self.tasks[name], completed=done, total=total, visible=done < total)


class SilentScreen(Screen):
    """`--quiet`: prints nothing; the command itself prints errors."""

    def message(self, text: str) -> None:
        pass


def make_screen(quiet: bool) -> Screen:
    """The screen that suits what stderr is connected to."""
    if quiet:
        return SilentScreen()
    return BarScreen() if sys.stderr.isatty() else Screen()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
