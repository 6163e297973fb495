"""Finished trials -> rows, and what one row gains over another.

A row is one setting over its runs. With a search it is one point of its cell: the best one by the
search's objective if that objective ranked the sweep's points by test accuracy, else the default.
No point is picked by a test label. Knows predictions and metrics; neither files nor how they came.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from air_core.flat import from_flat, trial_keys
from air_core.normal import normalised
from orchestrator.formatting import counted, percent, shown
from orchestrator.reporting._ranking import Ranking, ranking, sentences
from orchestrator.reporting._statistics import (
    ALPHA,
    Array,
    Collapse,
    Difference,
    Interval,
    Run,
    Runs,
    collapsed,
    corrected,
    mean_interval,
    mean_score,
    paired_difference,
)
from orchestrator.spec.presets import METHODS, named_refs

EMPTY = "no finished trial yet"


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One trial of a sweep with its outcome."""

    cell: str
    method: str
    flat: dict[str, Any]  # every setting by its dotted name
    settings: dict[str, Any]  # what the sweep varies here, beside dataset, paradigm, ..., method
    point: int
    seed: int
    split_seed: int
    objective: float | None  # of the point, mean over its runs; None without a search
    metrics: dict[str, float]  # "test/accuracy_fused", "pseudo/accuracy", ...
    image_ids: Array  # (T,) test images, by their index in the dataset
    predictions: Array  # (T,)
    labels: Array  # (T,)
    unseen: Array | None = None  # (T,) bool: TRZSL, images of classes without labels
    digests: Mapping[str, str] = field(default_factory=dict)  # of dataset and backbone: content
    # Where it comes from, for reports.
    key: str = ""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # a value per iteration
    seconds: float = 0.0
    made: Mapping[str, Any] = field(default_factory=dict)  # commit, versions, device, ...


@dataclass(frozen=True, kw_only=True)
class Row(Interval):
    """One setting over its runs, each distinct computation once."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: dict[str, Any]
    metric: str = "accuracy"  # harmonic_mean (of seen and unseen classes) in TRZSL
    # Where the row comes from; not in its JSON.
    cell: str
    point: int
    protocol: Protocol
    choice: Choice | None = None  # None: there was nothing to choose from
    pruned: int = 0  # points of the cell that were stopped early

    def as_json(self) -> dict[str, Any]:
        chosen = {} if self.choice is None else self.choice.as_json(self.point)
        stopped = {"pruned": self.pruned} if self.pruned else {}
        shown = {name: getattr(self, name) for name in COLUMNS}
        return shown | {"protocol": asdict(self.protocol)} | chosen | stopped

    @property
    def world(self) -> tuple[str, str, str]:
        """Only rows of one world are compared."""
        return self.dataset, self.paradigm, self.modality


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What must be equal before two numbers of different tables are compared."""

    backbone: str
    splits: int
    seeds: int  # in a split, at most; 0: the method draws nothing
    shots: int | None  # ssl
    class_seed: int | None  # trzsl
    leaky_pool: bool
    whole_pool: bool  # not made smaller or imbalanced on purpose
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why a row of a searched cell is the point that it is."""

    objective: str
    default: bool  # the default setting, since the objective is no guide
    ranking: Ranking  # of the cell
    pooled: Ranking  # of all cells of the sweep, which decides

    def as_json(self, point: int) -> dict[str, Any]:
        return {
            "point": point,
            "chosen_by": "default" if self.default else self.objective,
            "rank_correlation": {
                "objective": self.objective,
                "cell": asdict(self.ranking),
                "pooled": asdict(self.pooled),
            },
        }


Role = Literal["host", "control"]
MARKS: dict[Role, str] = {"host": "†", "control": "‡"}
WORSE = "↓"

COLUMNS = (
    *("dataset", "paradigm", "modality", "method", "settings", "metric", "n", "n_test"),
    *("mean", "std", "low", "high", "interval"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row minus the row that presets compare it with."""

    row: Row
    other: Row
    role: Role  # of `other`
    difference: Difference  # paired by image and run
    p_corrected: float  # over all comparisons of the table

    @property
    def methods(self) -> tuple[str, str]:
        return self.row.method, self.other.method

    @property
    def significant(self) -> bool:
        """Different from 0 after correction, with enough runs for a test."""
        return self.p_corrected < ALPHA and not self.difference.reason_not_tested

    @property
    def verdict(self) -> str:
        """Significant: yes, no, or not tested."""
        if self.difference.reason_not_tested:
            return "not tested"
        return "yes" if self.significant else "no"

    @property
    def mark(self) -> str:
        """† for the host, ‡ for the control; with an arrow where the row is worse; else nothing."""
        if not self.significant:
            return ""
        return MARKS[self.role] + (WORSE if self.difference.mean < 0 else "")

    @property
    def word(self) -> str:
        """The mark in letters, for spreadsheets: `host+` is better than the host, `host-` worse."""
        return f"{self.role}{'-' if self.difference.mean < 0 else '+'}" if self.significant else ""

    def as_json(self) -> dict[str, Any]:
        found = self.difference
        return {
            "role": self.role,
            "method": self.other.method,
            "settings": self.other.settings,
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
            "n": found.n,
            "interval": found.interval,
            "p": found.p,
            "p_corrected": self.p_corrected,
            "marked": self.significant,
            "untold": found.reason_not_tested,
            "images_needed": found.images_needed,
        }


# ---------------------------------------------------------------- rows


def rows(
    entries: Sequence[Entry],
    search_objective: str | None,
    pruned: Mapping[str, int] = MappingProxyType({}),
) -> list[Row]:
    """One row per setting in order of first appearance; with a search, one per cell.

    Args:
        pruned: points without entries that the search stopped early, by cell.
    """
    points: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        points.setdefault((entry.cell, entry.point), []).append(entry)
    if search_objective is None:
        return [_row(group, None) for group in points.values()]
    cells: dict[str, list[list[Entry]]] = {}
    for (cell, _), group in points.items():
        cells.setdefault(cell, []).append(group)
    scores = {cell: _scores(groups) for cell, groups in cells.items() if len(groups) > 1}
    pooled = ranking(list(scores.values()))
    found = []
    for cell, groups in cells.items():
        own = ranking([scores[cell]]) if cell in scores else None
        row = _chosen(groups, search_objective, own, pooled)
        found.append(replace(row, pruned=pruned.get(cell, 0)))
    return found


def _chosen(
    groups: Sequence[list[Entry]], objective: str, own: Ranking | None, pooled: Ranking
) -> Row:
    """The row of a searched cell."""
    if own is None:
        return _row(groups[0], None)
    first = [group for group in groups if group[0].point == 0]  # it may have failed
    default = bool(first) and not pooled.trusted
    choice = Choice(objective=objective, default=default, ranking=own, pooled=pooled)
    return _row(first[0] if default else max(groups, key=_promise), choice)


def _scores(groups: Iterable[Sequence[Entry]]) -> tuple[Array, Array]:
    """Objective and test accuracy of different points that have both, (P,) each."""
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        objective, settings = group[0].objective, repr(sorted(group[0].settings.items()))
        if objective is not None and not math.isnan(objective) and settings not in found:
            found[settings] = (objective, mean_score(_runs(_distinct(group))))
    scores = np.array(list(found.values()), dtype=float).reshape(-1, 2)
    return scores[:, 0], scores[:, 1]


def choice_notes(rows: Sequence[Row]) -> list[str]:
    """Why searched rows show the settings that they show; empty without a search."""
    stopped = sum(row.pruned for row in rows)
    words = f"{counted(stopped, 'point')} pruned early: no candidate, not tested."
    notes = [words] if stopped else []
    chosen = {row.cell: row.choice for row in rows if row.choice is not None}
    if not chosen:
        return notes
    first = next(iter(chosen.values()))
    by_cell = {cell: choice.ranking for cell, choice in chosen.items()}
    return [*sentences(first.objective, first.pooled, by_cell), *notes]


def _promise(group: Sequence[Entry]) -> tuple[float, int]:
    """What the best point of a cell has most of; of equal ones the earlier point is taken."""
    objective = group[0].objective
    if objective is None or math.isnan(objective):
        objective = -math.inf
    return objective, -group[0].point


def _row(group: Sequence[Entry], choice: Choice | None) -> Row:
    first = group[0]
    return Row(
        **vars(mean_interval(_runs(_distinct(group)))),
        dataset=tested_on(first.flat),
        paradigm=str(first.flat["paradigm"]),
        modality=str(first.flat["modality"]),
        method=first.method,
        settings=dict(first.settings),
        metric="accuracy" if first.unseen is None else "harmonic_mean",
        cell=first.cell,
        point=first.point,
        protocol=_protocol(group),
        choice=choice,
    )


def _protocol(group: Sequence[Entry]) -> Protocol:
    flat = group[0].flat
    seeds = Counter(split for split, seed in _distinct(group) if seed is not None)
    pool = {"pool_size": None, "pool_ratio": 1.0, "pool_missing": 0.0}
    return Protocol(
        backbone=str(flat.get("backbone", "")),
        splits=len({entry.split_seed for entry in group}),
        seeds=max(seeds.values(), default=0),
        shots=flat.get("shots", 2) if flat["paradigm"] == "ssl" else None,
        class_seed=flat.get("class_seed", 500) if flat["paradigm"] == "trzsl" else None,
        leaky_pool=bool(flat.get("leaky_pool", False)),
        whole_pool=all(flat.get(key, value) == value for key, value in pool.items()),
        digests=dict(group[0].digests),
    )


def tested_on(flat: Mapping[str, Any]) -> str:
    """The dataset of a table, `a -> b` where a prompt learned on one is tested on another."""
    names = (flat["dataset"], flat.get("test_dataset"))
    return " -> ".join(dict.fromkeys(str(name) for name in names if name is not None))


def _runs(distinct: Mapping[tuple[int, int | None], Entry]) -> Runs:
    return tuple(
        Run(
            split_seed=split_seed,
            seed=seed,
            image_ids=entry.image_ids,
            correct=entry.predictions == entry.labels,
            unseen=entry.unseen,
        )
        for (split_seed, seed), entry in distinct.items()
    )


def _distinct(group: Iterable[Entry]) -> dict[tuple[int, int | None], Entry]:
    """One entry per computation: trials that a seed cannot change are one, with seed None."""
    distinct: dict[tuple[int, int | None], Entry] = {}
    seedless: bool | None = None
    for entry in group:
        if seedless is None:
            seedless = _ignores_seed(entry.flat)
        distinct.setdefault((entry.split_seed, None if seedless else entry.seed), entry)
    return distinct


def _ignores_seed(flat: dict[str, Any]) -> bool:
    """Do two seeds of these settings share one key?"""
    settings = {key: value for key, value in flat.items() if key in _trial_names()}
    refs = named_refs(settings)
    one, other = (normalised(from_flat(settings | {"seed": seed}, refs, ())) for seed in (0, 1))
    return one == other


@functools.cache
def _trial_names() -> frozenset[str]:
    return frozenset(trial_keys())


# ---------------------------------------------------------------- comparisons


def partners(method: str) -> list[tuple[Role, str]]:
    """What presets compare a method with."""
    if method not in METHODS:
        return []
    known = METHODS[method]
    pairs: list[tuple[Role, str | None]] = [("host", known.host), ("control", known.control)]
    return [(role, name) for role, name in pairs if name is not None]


def has_images(method: str) -> bool:
    """Does a method have synthetic images?"""
    return method in METHODS and "images_per_class" not in METHODS[method].pins


class Results:
    """The rows of a table, the trials behind each, and what one row gains over another.

    Args:
        entries: all trials of the sweep; of a search also those of points without a row.
    """

    def __init__(self, rows: Sequence[Row], entries: Sequence[Entry]) -> None:
        self.rows, self.entries = rows, entries
        self._points: dict[tuple[str, int], list[Entry]] = {}
        values: dict[str, dict[str, set[str]]] = {}
        for entry in entries:
            self._points.setdefault((entry.cell, entry.point), []).append(entry)
            for key, value in entry.settings.items():
                values.setdefault(entry.cell, {}).setdefault(key, set()).add(repr(value))
        # What differs within a cell was searched: each method stands at its own best.
        self._searched = {
            cell: {key for key, seen in keys.items() if len(seen) > 1}
            for cell, keys in values.items()
        }
        self._distinct: dict[tuple[str, int], dict[tuple[int, int | None], Entry]] = {}

    @functools.cached_property
    def worlds(self) -> list[tuple[str, str, str]]:
        return worlds_of(self.rows)

    @functools.cached_property
    def varied(self) -> list[str]:
        """Settings with more than one value in the sweep, in order of appearance."""
        seen: dict[str, set[str]] = {}
        of_all = (*(row.settings for row in self.rows), *(e.settings for e in self.entries))
        for settings in of_all:
            for key, value in settings.items():
                seen.setdefault(key, set()).add(repr(value))
        return [key for key, values in seen.items() if len(values) > 1]

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """Each row minus its method's host and minus its control, where they were run too.

        p values are corrected over all of them: over what one table shows.
        """
        found = []
        for row in self.rows:
            for role, name in partners(row.method):
                other = self.partner(row, name)
                difference = self.difference(row, other) if other else None
                if other is not None and difference is not None:
                    found.append((row, other, role, difference))
        p_values = corrected([difference for *_, difference in found])
        return [
            Comparison(row=row, other=other, role=role, difference=difference, p_corrected=p)
            for (row, other, role, difference), p in zip(found, p_values, strict=True)
        ]

    def gains(self, row: Row) -> dict[Role, Comparison]:
        """The comparisons of a row."""
        return {one.role: one for one in self.comparisons if one.row is row}

    def best(self, world: tuple[str, str, str]) -> Row:
        """The row with the highest mean; of equal ones the first."""
        return max((row for row in self.rows if row.world == world), key=lambda row: row.mean)

    def distinct(self, row: Row) -> dict[tuple[int, int | None], Entry]:
        """The trials behind a row by split and seed, each computation once."""
        at = (row.cell, row.point)
        if at not in self._distinct:
            self._distinct[at] = _distinct(self._points[at])
        return self._distinct[at]

    def runs(self, row: Row) -> Runs:
        return _runs(self.distinct(row))

    def mean(self, row: Row, metric: str) -> float | None:
        """Mean of a metric over the runs of a row; None where no run has it."""
        found = self.values(row, metric)
        return sum(found) / len(found) if found else None

    def values(self, row: Row, metric: str) -> list[float]:
        """A metric of each run of a row that has it."""
        found = [entry.metrics.get(metric, math.nan) for entry in self.distinct(row).values()]
        return [value for value in found if not math.isnan(value)]

    def curve(self, row: Row, metric: str) -> Array | None:
        """A metric by iteration of each run of a row, (R, I); None where the runs have none."""
        found = [entry.curves.get(metric, ()) for entry in self.distinct(row).values()]
        lengths = {len(curve) for curve in found}
        if len(lengths) != 1 or lengths == {0}:
            return None
        return np.array(found, dtype=float)

    def partner(self, row: Row, method: str) -> Row | None:
        """The row of another method with the settings that the two share; the most shared wins."""
        found: dict[int, Row] = {}
        for other in self.rows:
            if other.method != method or other.world != row.world or other is row:
                continue
            searched = self._searched.get(row.cell, set()) | self._searched.get(other.cell, set())
            shared = (row.settings.keys() & other.settings.keys()) - searched
            if all(row.settings[key] == other.settings[key] for key in shared):
                found.setdefault(len(shared), other)
        return found[max(found)] if found else None

    def difference(self, row: Row, other: Row) -> Difference | None:
        return paired_difference(self.runs(row), self.runs(other))

    def collapsed(self, row: Row) -> list[Collapse]:
        """Its runs that are far below the others."""
        return collapsed(self.runs(row))


# ---------------------------------------------------------------- words and numbers


def protocol_notes(rows: Sequence[Row]) -> list[str]:
    """Measure, splits and seeds, interval: sentences for a caption."""
    notes = []
    if any(row.metric == "harmonic_mean" for row in rows):
        notes.append("TRZSL: harmonic mean of the accuracies on seen and on unseen classes.")
    kinds = Counter(row.interval for row in rows)
    usual = kinds.most_common(1)[0][0]
    text = f"Interval: {usual}"
    for kind in kinds:
        if kind != usual:
            methods = dict.fromkeys(row.method for row in rows if row.interval == kind)
            text += f"; {', '.join(methods)}: {kind.removeprefix('95 % bootstrap ')}"
    return [*notes, splits_and_seeds(rows), text + "."]


def splits_and_seeds(rows: Sequence[Row]) -> str:
    """The number of splits, and of seeds in a split, that the rows have at most."""
    splits = max(row.protocol.splits for row in rows)
    seeds = max(1, *(row.protocol.seeds for row in rows))
    each = " each" if splits > 1 else ""
    return f"{counted(splits, 'split')}, {counted(seeds, 'seed')}{each}."


def collapse_notes(results: Results, most: int = 4) -> list[str]:
    """Runs that fell far below their siblings: sentences for readers."""
    fallen = [(row, one) for row in results.rows for one in results.collapsed(row)]
    notes = []
    for row, one in fallen[:most]:
        world = f"{world_text(row.world)}, " if len(results.worlds) > 1 else ""
        seed = "" if one.seed is None else f", seed {one.seed}"
        notes.append(
            f"Collapsed: {world}{named(row, list(row.settings))}, split {one.split_seed}{seed} has "
            f"{percent(one.score)} where the others have {percent(one.others)}; it counts like "
            "every run."
        )
    if len(fallen) > most:
        notes.append(f"{counted(len(fallen) - most, 'more run')} collapsed.")
    return notes


def mark_notes(found: Sequence[Comparison], *, marks: bool = True) -> list[str]:
    """What is significant, and which differences were not tested: sentences for a caption.

    Args:
        marks: explain those too.
    """
    untested = [c.difference.reason_not_tested for c in found]
    reasons = Counter(filter(None, untested))
    if sum(reasons.values()) == len(found):
        return [f"No difference is tested: {reason}." for reason in reasons]
    over = "" if len(found) == 1 else f", Holm-corrected over {len(found)} comparisons"
    notes = [f"Significant: p < {ALPHA:g}{over}."]
    if marks:
        words = {"host": "the host", "control": "the control without diffusion"}
        there = {c.role for c in found}
        signs = ", ".join(f"{MARKS[r]} from {words[r]}" for r in MARKS if r in there)
        worse = f" ({WORSE} below it)" if any(c.mark.endswith(WORSE) for c in found) else ""
        notes = [f"Significantly different: {signs}{worse} (p < {ALPHA:g}{over})."]
    notes += [f"{times} of them not tested: {reason}." for reason, times in reasons.items()]
    if all("1 split" in c.difference.interval for c in found):
        notes.append("One split: this holds for that split and its images alone.")
    return notes


def settings_text(row: Row, keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {shown(row.settings[key])}" for key in keys if key in row.settings)


def named(row: Row, keys: Sequence[str]) -> str:
    """A row by its method and these of its settings."""
    text = settings_text(row, keys)
    return f"{row.method}, {text}" if text else row.method


def world_text(world: tuple[str, str, str]) -> str:
    """
    >>> world_text(("digits", "ul", "text"))
    'digits, UL, text'
    """
    dataset, paradigm, modality = world
    return f"{dataset}, {paradigm.upper()}, {modality}"


def headline(found: Sequence[Row]) -> str:
    """What the rows are judged by, with its unit."""
    return f"{' or '.join(dict.fromkeys(row.metric for row in found)).replace('_', ' ')}, %"


def worlds_of(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(row.world for row in rows))


def mean_std(row: Row) -> str:
    return percent(row.mean) + ("" if row.std is None else f" ± {percent(row.std)}")


def signed_interval(found: Interval) -> str:
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def signed(value: float) -> str:
    """
    >>> signed(0.021), signed(-0.00001)
    ('+2.1', '+0.0')
    """
    return f"{round(100 * value, 1) + 0.0:+.1f}"
