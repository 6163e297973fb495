"""What a running sweep shows: bars on a terminal, one line per event elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from air_core.printable import printable
from orchestrator.formatting import clock, printable_lines, show
from orchestrator.planning import Plan, Requirement, name_of

if TYPE_CHECKING:
    from orchestrator.planning import Outcome

# Seconds between two lines about one long thing, off a terminal; and as a share of its time so far,
# so that an hour does not print 360 of them.
LINE_EVERY, LINE_SHARE = 10.0, 0.1


class Rows:
    """Table rows as they finish: one for each point whose seeds are all in."""

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.found: dict[tuple[str, int], list[Outcome]] = {}

    def add(self, outcome: Outcome) -> str | None:
        """The row that this outcome completes, if it does."""
        place = (outcome.slot.cell.id, outcome.slot.point)
        together = self.found.setdefault(place, [])
        together.append(outcome)
        if len(together) < self.seeds:
            return None
        params = " ".join(f"{key}={_short(value)}" for key, value in outcome.slot.params.items())
        name = f"{outcome.slot.cell.id} {params}".strip()
        scores = [100 * o.record.headline for o in together if o.record]
        failed = [o for o in together if o.state == "failed"]
        text = f"{name:<44}"
        if scores:
            distinct = len({o.slot.key for o in together if o.record})
            spread = f" ± {stdev(scores):.1f}" if distinct > 1 else ""
            text += f" test {fmean(scores):5.1f} %{spread}"
        if together[0].pruned is not None:
            text += f"  pruned after iteration {together[0].pruned.rung}"
        if failed:
            text += f"  {len(failed)} failed ({failed[0].failure_class}): {failed[0].message}"
        if all(o.state == "reused" for o in together):
            text += "  reused"
        return text


@dataclass
class Pace:
    """How fast something long gets on, since it was first heard of."""

    started: float
    first: int
    spoken: float = 0.0

    def left(self, now: float, done: int, total: int) -> str:
        """The time that is left at this pace, for the end of a line."""
        if done <= self.first:
            return ""
        seconds = (now - self.started) / (done - self.first) * (total - done)
        return f", about {clock(seconds)} left"


class Screen:
    """For logs: a line when something happens, and now and then while something long goes on."""

    def __init__(self) -> None:
        self.rows = Rows(1)
        self.counts: dict[str, list[int]] = {}
        self.paces: dict[str, Pace] = {}
        self.waits: dict[str, float] = {}  # seconds at which it was last said

    def say(self, text: str) -> None:
        show(text, file=sys.stderr, flush=True)

    def started(self, plan: Plan) -> None:
        self.rows = Rows(len(plan.sweep.seeds.values))
        self.counts = {
            str(requirement.key): [0, requirement.total()] for requirement in plan.requirements
        }
        self.say(
            f"{plan.sweep.name}: {plan.total} trials in {len(plan.cells)} cells, "
            f"{plan.to_run} to run, {plan.reused} reused, {plan.done} done"
            + (f", {len(plan.pruned)} pruned" if plan.pruned else "")
        )
        if plan.edit is not None:
            self.say(str(plan.edit))

    def prepared(self, requirement: Requirement) -> None:
        count = self.counts.setdefault(str(requirement.key), [0, requirement.total()])
        count[0] += 1
        if requirement.stage != "images" or count[0] == count[1]:
            self.say(f"{name_of(requirement.key)}: ready")
        else:
            self.progress(name_of(requirement.key), *count)

    def progress(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        pace = self.paces.setdefault(name, Pace(now, done))
        wait = max(LINE_EVERY, LINE_SHARE * (now - pace.started))
        if done < total and now - pace.spoken > wait:
            pace.spoken = now
            self.say(f"{name}: {done}/{total}{pace.left(now, done, total)}")

    def waiting(self, name: str, holder: str, seconds: float) -> None:
        said = self.waits.get(name, 0.0)
        if seconds < said:  # another wait
            said = 0.0
        if not said or seconds > 2 * said:  # an hour is ten lines
            self.waits[name] = seconds
            self.say(f"{name}: {holder} makes it, waiting for {clock(seconds)}")

    def outcome(self, outcome: Outcome) -> None:
        row = self.rows.add(outcome)
        if row is not None and not outcome.known:
            self.say(row)

    def close(self) -> None:
        pass


class Bars(Screen):
    """For terminals: a bar for each thing under way, rows above them."""

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
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}
        self.trials: Any = None

    def say(self, text: str) -> None:
        self.console.print(printable_lines(text), markup=False, soft_wrap=True)

    def started(self, plan: Plan) -> None:
        super().started(plan)
        self.bars.start()
        self.trials = self.bars.add_task(
            "trials", total=plan.total, completed=plan.done + len(plan.pruned)
        )

    def outcome(self, outcome: Outcome) -> None:
        if not outcome.known:
            self.bars.advance(self.trials)
        super().outcome(outcome)

    def close(self) -> None:
        self.bars.stop()

    def prepared(self, requirement: Requirement) -> None:
        if requirement.stage != "images":
            self.progress(name_of(requirement.key), 1, 1)
            return
        count = self.counts.setdefault(str(requirement.key), [0, requirement.total()])
        count[0] += 1
        self.progress(name_of(requirement.key), *count)

    def progress(self, name: str, done: int, total: int) -> None:
        # An end may come in another unit than the steps before it.
        if name not in self.tasks:
            shown = printable(name if len(name) <= 44 else f"{name[:20]}...{name[-21:]}")
            self.tasks[name] = self.bars.add_task(shown, total=total)
        self.bars.update(self.tasks[name], completed=done, total=total, visible=done < total)


class Silence(Screen):
    """`--quiet`: nothing but errors, which are not said here."""

    def say(self, text: str) -> None:
        pass


def make_screen(quiet: bool) -> Screen:
    """The one that fits where stderr goes."""
    if quiet:
        return Silence()
    return Bars() if sys.stderr.isatty() else Screen()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
