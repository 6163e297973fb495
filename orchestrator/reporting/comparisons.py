"""All results of a sweep: its rows, comparisons between them, and its best classifiers.

- A **baseline** of a row is a row of the method's host or of its control (see
  `orchestrator.spec.presets`), in the same task and with the same shared settings.
- A **comparison** (`Comparison`) is a row minus one of its baselines, or minus the row of the same
  method with another value of a setting, paired by image and run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Any

from air_core.methods import METHODS
from air_core.settings.flat import trial_keys
from orchestrator.formatting import format_value
from orchestrator.reporting._statistics import (
    Difference,
    Interval,
    Verdict,
    paired_difference,
    table_tests,
    verdict,
)
from orchestrator.reporting.candidates import Candidate, best_candidate
from orchestrator.reporting.rows import (
    MODALITY,
    FinishedTrial,
    Row,
    Task,
    chosen_point,
    is_bound,
    row_of,
    signed_percent,
    task_text,
    tasks_of,
)
from orchestrator.spec import presets

BEST = "* "  # before the number of the best classifier
MARKS = {"host": "†", "control": "‡"}  # by role
WORSE = "↓"


@dataclass(frozen=True)
class Comparison:
    """A row minus a baseline: the difference, its interval and its significance."""

    row: Row
    baseline: Row
    # Of the baseline: host or control; default, of a search; else the key in whose value it differs
    role: str
    difference: Difference  # paired by image and run
    p_corrected: float  # over the comparisons of its question, see `compared`
    detectable: float  # the smallest difference that the test detects with 80 % power

    @property
    def methods(self) -> tuple[str, str]:
        return self.row.method, self.baseline.method

    @property
    def name(self) -> str:
        """What is compared, such as `air - cpl` or `cpl with prompt.length 8 vs 2`."""
        if self.role in MARKS:
            return " - ".join(self.methods)
        return f"{self.row.method} with {self.role} {' vs '.join(self.values)}"

    @property
    def values(self) -> list[str]:
        """The values of the setting in which row and baseline differ."""
        return [format_value(row.value(self.role)) for row in (self.row, self.baseline)]

    @property
    def verdict(self) -> Verdict:
        return verdict(self.difference, self.p_corrected)

    @property
    def is_significant(self) -> bool:
        return self.verdict in ("higher", "lower")

    @property
    def is_tested(self) -> bool:
        return self.verdict != "not tested"

    @property
    def significance(self) -> str:
        """significant, not significant or not tested"""
        return "significant" if self.is_significant else self.verdict

    @property
    def text(self) -> str:
        """The difference in points; with its interval, such as `+2.1 [+0.3, +4.0]`, if tested."""
        difference = self.difference
        ends = map(signed_percent, (difference.low, difference.high))
        return signed_percent(difference.mean) + f" [{', '.join(ends)}]" * self.is_tested

    @property
    def mark(self) -> str:
        """† for the host, ‡ for the control, with ↓ if the row is worse; empty: not significant."""
        if not self.is_significant:
            return ""
        return MARKS.get(self.role, "") + (WORSE if self.verdict == "lower" else "")

    def as_json(self) -> dict[str, Any]:
        difference = self.difference
        return {
            "role": self.role,
            "method": self.baseline.method,
            "settings": self.baseline.settings,
            "difference": difference.mean,
            **{name: getattr(difference, name) for name in ("low", "high", "n", "interval", "p")},
            "p_corrected": self.p_corrected,
            "marked": self.is_significant,
            "untold": difference.reason_not_tested,
            "detectable": None if difference.reason_not_tested else self.detectable,
        }


def compared(
    pairs: Iterable[tuple[Row, Row | None, str]], classifier: str | None = None
) -> list[Comparison]:
    """Comparisons of rows, baselines and roles, except pairs without a common run.

    p values are corrected within a question: what methods gain over their hosts, over their
    controls, or with other values of a setting, in one task. The runs of all given comparisons of a
    task give the common runs part.

    Args:
        classifier: of the rows. Default: the tested one.
    """
    found = [
        (row, baseline, role, difference)
        for row, baseline, role in pairs
        if baseline is not None
        and (difference := paired_difference(row.runs(classifier), baseline.runs(classifier)))
    ]
    tests: dict[int, tuple[float, float]] = {}  # p value and detectable difference, by position
    for task in {baseline.task for _, baseline, *_ in found}:
        of_task = {at: each for at, each in enumerate(found) if each[1].task == task}
        _, _, roles, differences = zip(*of_task.values(), strict=True)
        tests |= zip(of_task, table_tests(differences, roles), strict=True)
    return [Comparison(*each, *tests[at]) for at, each in enumerate(found)]


# ---------------------------------------------------------------- all results of a sweep


class Results:
    """The rows of a sweep's table, the trials behind each row and the comparisons between rows.

    Args:
        trials: all finished trials of the sweep. With a search this includes trials of points that
            no row shows.
        search_objective: the objective of the search; None: one row per setting.
        classes: number of classes of the test images, by the dataset of a row.
        is_smoke: whether the sweep is a smoke run, whose numbers mean nothing.
    """

    def __init__(
        self,
        trials: Sequence[FinishedTrial],
        search_objective: str | None = None,
        classes: Mapping[str, int] = MappingProxyType({}),
        is_smoke: bool = False,
    ) -> None:
        self.trials, self.classes, self.is_smoke = trials, classes, is_smoke
        self._points: dict[tuple[str, int], list[FinishedTrial]] = {}
        self._point_rows: dict[tuple[str, int], Row] = {}
        self._searched: set[str] = set()  # settings
        for trial in trials:
            self._points.setdefault((trial.cell, trial.point), []).append(trial)
            self._searched |= trial.searched
        self.rows = self.points() if search_objective is None else self._cells(search_objective)
        self._of_method: dict[tuple[str, ...], list[Row]] = {}  # in a dataset and paradigm
        self._fits: dict[tuple[tuple[str, ...], str, Any], set[int]] = {}
        for row in self.rows:
            self._of_method.setdefault((row.method, *row.task[:2]), []).append(row)

    def points(self) -> list[Row]:
        """One row per setting: also of a search one per point, in their order of appearance."""
        return [row for name in self._points if (row := self._point(*name)) is not None]

    def _cells(self, objective: str) -> list[Row]:
        """One row per cell of a search."""
        cells: dict[str, list[list[FinishedTrial]]] = {}
        for (cell, _), point in self._points.items():
            cells.setdefault(cell, []).append(point)
        rows = []
        for cell, points in cells.items():
            number, choice = points[0][0].point, None
            if len(points) > 1:
                number, choice = chosen_point(points, objective)
            rows += [replace(row, choice=choice) for row in [self._point(cell, number)] if row]
        return rows

    def _point(self, cell: str, number: int) -> Row | None:
        """The row of a point, kept since its interval is a bootstrap."""
        name = cell, number
        if name in self._points and name not in self._point_rows:
            self._point_rows[name] = row_of(self._points[name])
        return self._point_rows.get(name)

    @functools.cached_property
    def tasks(self) -> list[Task]:
        return tasks_of(self.rows)

    def task_text(self, task: Task, before: str = "", after: str = "") -> str:
        """A task between two texts; empty if all rows are of one task."""
        return f"{before}{task_text(task)}{after}" if len(self.tasks) > 1 else ""

    @property
    def tested(self) -> list[Row]:
        """The rows with test images."""
        return [row for row in self.rows if row.is_tested]

    @functools.cached_property
    def varied_settings(self) -> list[str]:
        """Settings that were searched or have several values, in order of appearance."""
        seen: dict[str, set[str]] = {}
        for settings in (*(r.settings for r in self.rows), *(t.settings for t in self.trials)):
            for key, value in settings.items():
                seen.setdefault(key, set()).add(repr(value))
        return [key for key, values in seen.items() if key in self._searched or len(values) > 1]

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """Each row minus the rows of its method's host and control, where the sweep has them."""
        pairs = []
        for row in self.rows:
            method = METHODS[row.method]
            named = {"host": method.host, "control": method.control}
            pairs += [(row, self.baseline(row, name), role) for role, name in named.items() if name]
        return compared(pairs)

    @functools.cached_property
    def value_comparisons(self) -> dict[str, list[Comparison]]:
        """By setting of the grid, and for the modality, each row minus the row with the default
        value, or else with the first one, where method, task and all other settings are equal.
        """
        keys = [*(key for key in self.varied_settings if key not in self._searched), MODALITY]
        found = {
            key: compared((row, self._at_default(row, key), key) for row in self.rows)
            for key in keys
        }
        return {key: comparisons for key, comparisons in found.items() if comparisons}

    @property
    def all_comparisons(self) -> list[Comparison]:
        """The comparisons with hosts and controls, then those of values."""
        return [*self.comparisons, *chain.from_iterable(self.value_comparisons.values())]

    def comparisons_of(self, row: Row) -> dict[str, Comparison]:
        """The comparisons of a row, by the role of the baseline."""
        return {c.role: c for c in self.comparisons if c.row is row}

    @functools.cached_property
    def search_gains(self) -> dict[str, Comparison]:
        """By searched cell, its best point by the objective minus the default point."""
        best = [points[0] for row in self.rows if (points := self.best_points(row))]
        pairs = [(row, self._point(row.cell, 0), "default") for row in best if row.point]
        return {c.row.cell: c for c in compared(pairs)}

    def best_points(self, row: Row, most: int = 3) -> list[Row]:
        """The best points of a searched cell by its objective, and the default point.

        Empty without a search, or if the cell has a single point.
        """
        if row.choice is None:
            return []
        found = (self._point(row.cell, n) for n in dict.fromkeys([*row.choice.points[:most], 0]))
        return [point for point in found if point is not None]

    def chance(self, row: Row) -> float | None:
        """Accuracy of guessing, 1 over the number of classes; None if that is unknown."""
        classes = self.classes.get(row.dataset)
        return 1 / classes if classes else None

    def is_at_chance(self, row: Row, interval: Interval | None = None) -> bool:
        """Whether a row's accuracy is not above that of guessing, by its interval.

        Args:
            interval: of one of its classifiers. Default: that of the row.
        """
        chance = self.chance(row)
        return chance is not None and row.metric == "accuracy" and (interval or row).low <= chance

    @functools.cached_property
    def best_classifiers(self) -> dict[Task, Candidate]:
        """The best classifier of each task, see `best_candidate`. A task of bounds has none."""
        best: dict[Task, Candidate] = {}
        for task in self.tasks:
            rows = [row for row in self.rows if row.task == task and not is_bound(row.method)]
            with suppress(ValueError):  # no candidate
                best[task] = best_candidate(rows)
        return best

    def best_of(self, row: Row) -> Candidate | None:
        """The best classifier of a row's task, if it is one of this row."""
        best = self.best_classifiers.get(row.task)
        return best if best is not None and best.row is row else None

    def baseline(self, row: Row, method: str) -> Row | None:
        """The row of another method in the same task to compare a row with.

        It has equal values for all settings that both rows have, searched settings excepted: each
        method is compared at its own best point. Of several such rows the one that shares the most
        settings is taken.
        """
        equal = self._equal_rows(row, method)
        others = (o for o in equal if o.task == row.task and o is not row)
        return max(others, key=equal.__getitem__, default=None)

    def _at_default(self, row: Row, key: str) -> Row | None:
        """The row with the default value of a setting, or else with the first one, and all else
        equal; None: it is this row, or the method learns no prompt and thus has no modality.
        """
        learns = METHODS[row.method].pins.get("iterations") != 0
        if not (learns if key == MODALITY else key in row.settings):
            return None
        equal = {
            other: shared
            for other, shared in self._equal_rows(row, row.method, key).items()
            if key == MODALITY or (other.modality == row.modality and key in other.settings)
        }
        chosen = {name: value for name, value in row.first.flat.items() if name != key}
        defaults = {name: known.default for name, known in trial_keys().items()}
        default = (defaults | presets.defaults(row.method, chosen)).get(key)
        values = [other.value(key) for other in equal]
        value = default if default in values else values[0]
        if row.value(key) == value:
            return None
        return max((o for o in equal if o.value(key) == value), key=equal.__getitem__)

    def _equal_rows(self, row: Row, method: str, key: str = "") -> dict[Row, int]:
        """The rows of a method, in the dataset and paradigm of a row, with equal values for all
        settings that both have, and the number of these.

        Args:
            key: a setting that may differ, like those that were searched.
        """
        group = (method, *row.task[:2])
        rows = self._of_method.get(group, [])
        own = {name: value for name, value in row.fixed.items() if name != key}
        fitting = [self._fitting(group, name, value) for name, value in own.items()]
        positions = sorted({*range(len(rows))}.intersection(*fitting))
        return {rows[at]: len(own.keys() & rows[at].fixed.keys()) for at in positions}

    def _fitting(self, group: tuple[str, ...], name: str, value: Any) -> set[int]:
        """Positions in a group of the rows with a value of a setting, or without the setting.

        Kept since tables of a thousand rows compare each with all others.
        """
        wanted = group, name, value
        if wanted not in self._fits:
            rows = enumerate(self._of_method.get(group, []))
            self._fits[wanted] = {at for at, row in rows if row.fixed.get(name, value) == value}
        return self._fits[wanted]
