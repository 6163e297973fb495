"""What a running sweep shows: bars on a terminal, one line per event elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.plan import Need, Plan

if TYPE_CHECKING:
    from orchestrator.dispatch import Outcome

LINE_EVERY = 10.0  # seconds between two lines about one long thing, off a terminal
WORDS = {
    "features": "CLIP features",
    "labels": "pseudo-labels",
    "lora": "LoRA",
    "images": "image blocks",
}


class Screen(Protocol):
    """Is told what happens."""

    def say(self, text: str) -> None: ...

    def started(self, plan: Plan) -> None: ...

    def prepared(self, need: Need) -> None: ...

    def progress(self, need: Need, done: int, total: int) -> None: ...

    def outcome(self, outcome: Outcome) -> None: ...

    def close(self) -> None: ...


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
        if failed:
            text += f"  {len(failed)} failed ({failed[0].failure_class}): {failed[0].message}"
        if all(o.state == "reused" for o in together):
            text += "  reused"
        return text


class Lines:
    """For logs: a line when something happens, and now and then while something long goes on."""

    def __init__(self) -> None:
        self.rows = Rows(1)
        self.counts: dict[str, list[int]] = {}
        self.spoken: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def started(self, plan: Plan) -> None:
        self.rows = Rows(len(plan.sweep.seeds.values))
        self.counts = {str(need.key): [0, need.total()] for need in plan.needs}
        self.say(
            f"{plan.sweep.name}: {plan.total} trials in {len(plan.cells)} cells, "
            f"{plan.to_run} to run, {plan.reused} reused, {plan.done} done"
        )

    def prepared(self, need: Need) -> None:
        count = self.counts.setdefault(str(need.key), [0, need.total()])
        count[0] += 1
        if need.stage != "images":
            self.say(f"{WORDS[need.stage]}: {need.key.slug} ready")
        else:
            self._now_and_then(need, *count)

    def progress(self, need: Need, done: int, total: int) -> None:
        self._now_and_then(need, done, total)

    def outcome(self, outcome: Outcome) -> None:
        row = self.rows.add(outcome)
        if row is not None and not outcome.known:
            self.say(row)

    def close(self) -> None:
        pass

    def _now_and_then(self, need: Need, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.spoken.get(str(need.key), 0.0) > LINE_EVERY:
            self.spoken[str(need.key)] = now
            self.say(f"{WORDS[need.stage]}: {need.key.slug} {done}/{total}")


class Bars(Lines):
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
        )

        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}
        self.trials: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def started(self, plan: Plan) -> None:
        super().started(plan)
        self.bars.start()
        self.trials = self.bars.add_task("trials", total=plan.total, completed=plan.done)

    def outcome(self, outcome: Outcome) -> None:
        if not outcome.known:
            self.bars.advance(self.trials)
        super().outcome(outcome)

    def close(self) -> None:
        self.bars.stop()

    def prepared(self, need: Need) -> None:
        if need.stage != "images":
            self._bar(need, 1, 1)
            return
        count = self.counts.setdefault(str(need.key), [0, need.total()])
        count[0] += 1
        self._now_and_then(need, *count)

    def _now_and_then(self, need: Need, done: int, total: int) -> None:
        self._bar(need, done, total)

    def _bar(self, need: Need, done: int, total: int) -> None:
        key = str(need.key)
        if key not in self.tasks:
            name = f"{WORDS[need.stage]} {need.key.slug}"
            self.tasks[key] = self.bars.add_task(name[:44], total=total)
        known = self.bars.tasks[self.tasks[key]]
        if total == 1 and known.total != 1:
            done = int(known.total or 1)  # it was counted in steps: now it is whole
        self.bars.update(self.tasks[key], completed=done, visible=done < (known.total or 1))


class Silence(Lines):
    """`--quiet`: nothing but errors, which are not said here."""

    def say(self, text: str) -> None:
        pass


def make_screen(quiet: bool) -> Screen:
    """The one that fits where stderr goes."""
    if quiet:
        return Silence()
    return Bars() if sys.stderr.isatty() else Lines()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
