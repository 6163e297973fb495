"""What our rows are beside published numbers, or beside those of another sweep.

Two numbers are compared where backbone, test images, splits, seeds, shots, classes and measure are
the same; else the verdict says what differs. Nothing is averaged over what differs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.marked_yaml import shown as said
from orchestrator.output import aligned
from orchestrator.paper_file import Paper, Published, PublishedGain
from orchestrator.report import Results, Row, percent, settings_text, signed
from orchestrator.statistics import ALPHA, Difference, corrected, paired_difference

Verdict = Literal["reproduced", "within interval", "lower", "higher", "not comparable"]
WIDE = 0.05  # an interval wider than 5 points holds a number without having reproduced it


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One of our rows beside another number, or why not."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: Mapping[str, Any]
    verdict: Verdict
    reasons: tuple[str, ...] = ()  # why not comparable, or what to know
    ours: tuple[float, float, float] | None = None  # mean, low, high
    other: tuple[float, float] | None = None  # the other number; two where it is a range
    difference: tuple[float, float, float] | None = None  # ours minus it
    p_corrected: float | None = None
    verified: bool = True
    gates: bool = False  # comparable, verified, and lower

    def as_json(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """All rows of a sweep beside a paper or another sweep."""

    what: str  # "GRIP, NeurIPS 2023"
    source: str
    cells: tuple[Judged, ...]
    gains: tuple[Judged, ...] = ()
    missing: tuple[str, ...] = ()  # what has no row here

    @property
    def regressed(self) -> bool:
        return any(one.gates for one in (*self.cells, *self.gains))

    def counts(self) -> dict[str, int]:
        return dict(Counter(one.verdict for one in (*self.cells, *self.gains)))

    def as_json(self) -> dict[str, Any]:
        return {
            "against": self.what,
            "source": self.source,
            "cells": [one.as_json() for one in self.cells],
            "gains": [one.as_json() for one in self.gains],
            "missing": list(self.missing),
            "verdicts": self.counts(),
            "regressed": self.regressed,
        }


def beside_paper(rows: Sequence[Row], results: Results, paper: Paper) -> Judgement:
    """Each row beside the number of its dataset, paradigm, modality and method.

    reproduced: the number lies in our interval, which is no wider than 5 points; within interval:
    it lies in a wider one; lower, higher: our interval leaves it out.
    """
    published = {cell.place: cell for cell in paper.cells}
    cells, met = [], set()
    for row in rows:
        cell = published.get((row.dataset, row.paradigm, row.modality, row.method))
        reasons = _differ_from_paper(row, paper)
        if cell is not None:
            met.add(cell.place)
        elif not reasons or row.dataset in {one.dataset for one in paper.cells}:
            reasons.append(f"no {row.method} in {row.paradigm}/{row.modality} is published")
        cells.append(_beside(row, cell, reasons))
    missing = [" ".join(cell.place) for cell in paper.cells if cell.place not in met]
    return Judgement(
        what=paper.title,
        source=paper.source,
        cells=tuple(cells),
        gains=tuple(_beside_gain(rows, results, gain, paper) for gain in paper.gains),
        missing=tuple(missing),
    )


def _differ_from_paper(row: Row, paper: Paper) -> list[str]:
    """What of a row's protocol is not the paper's."""
    ours, theirs = row.protocol, paper.protocol
    known = {one.dataset for one in paper.cells} | {d for g in paper.gains for d in g.datasets}
    reasons = []
    if row.dataset not in known:
        reasons.append(f"no number for {row.dataset} is published")
    if ours.backbone not in theirs.backbone:
        reasons.append(f"backbone {ours.backbone}, published with {theirs.backbone[0]}")
    images = theirs.test_images.get(row.dataset)
    if images is not None and row.n_test != images:
        reasons.append(f"{row.n_test:,} test images, published on {images:,}")
    if ours.splits < theirs.splits:
        reasons.append(f"{ours.splits} of {theirs.splits} splits")
    if 0 < ours.seeds < theirs.seeds:
        reasons.append(f"{ours.seeds} of {theirs.seeds} seeds")
    if ours.shots is not None and theirs.shots not in (None, ours.shots):
        reasons.append(f"{ours.shots} shots, published with {theirs.shots}")
    if ours.class_seed is not None and theirs.class_seed not in (None, ours.class_seed):
        reasons.append(f"class_seed {ours.class_seed}, published with {theirs.class_seed}")
    if row.dataset in known and ours.leaky_pool != (row.dataset in theirs.leaky_pool):
        word = "without" if ours.leaky_pool else "with"
        reasons.append(f"published {word} test images in the pool (leaky_pool)")
    if not ours.whole_pool:
        reasons.append("the pool was made smaller or imbalanced")
    return reasons


def _place(row: Row) -> dict[str, Any]:
    return {
        "dataset": row.dataset,
        "paradigm": row.paradigm,
        "modality": row.modality,
        "method": row.method,
        "settings": row.settings,
    }


def _beside(row: Row, cell: Published | None, reasons: Sequence[str]) -> Judged:
    ours = (row.mean, row.low, row.high)
    verified = cell is None or cell.verified
    if cell is None or reasons:
        other = None if cell is None else (cell.value, cell.value)
        return Judged(
            **_place(row),
            verdict="not comparable",
            reasons=tuple(reasons),
            ours=ours,
            other=other,
            verified=verified,
        )
    verdict = _verdict(row.low - cell.value, row.high - cell.value)
    return Judged(
        **_place(row),
        verdict=verdict,
        reasons=(cell.note,) if cell.note else (),
        ours=ours,
        other=(cell.value, cell.value),
        difference=tuple(v - cell.value for v in ours),  # type: ignore[arg-type]
        verified=verified,
        gates=verdict == "lower" and verified,
    )


def _verdict(low: float, high: float, wide: float = WIDE) -> Verdict:
    """From the interval of a difference, ours minus the other."""
    if high < 0:
        return "lower"
    if low > 0:
        return "higher"
    return "reproduced" if high - low <= wide else "within interval"


def _beside_gain(
    rows: Sequence[Row], results: Results, gain: PublishedGain, paper: Paper
) -> Judged:
    """Our mean gain over all of the datasets.

    They are independent of each other, so half widths add in squares.
    """
    place: dict[str, Any] = {
        "dataset": f"mean of {len(gain.datasets)} datasets",
        "paradigm": gain.paradigm,
        "modality": gain.modality,
        "method": f"{gain.method} - {gain.over}",
        "settings": {},
        "verified": gain.verified,
        "other": (gain.low, gain.high),
    }
    reasons, found = [], []
    missing = []
    for dataset in gain.datasets:
        world = (dataset, gain.paradigm, gain.modality)
        own = [row for row in rows if row.world == world and row.method == gain.method]
        if not own:
            missing.append(dataset)
            continue
        if len(own) > 1:
            reasons.append(f"{len(own)} settings of {gain.method} on {dataset}")
            continue
        other = results.partner(own[0], gain.over)
        difference = results.difference(own[0], other) if other else None
        reasons += [f"{dataset}: {reason}" for reason in _differ_from_paper(own[0], paper)]
        if difference is None:
            reasons.append(f"{dataset}: no {gain.over}")
        else:
            found.append(difference)
    if missing:
        reasons.insert(0, f"no {gain.method} on {', '.join(missing)}")
    if reasons:
        return Judged(**place, verdict="not comparable", reasons=tuple(reasons))
    count = len(found)
    mean = sum(d.mean for d in found) / count
    low = mean - math.hypot(*(d.mean - d.low for d in found)) / count
    high = mean + math.hypot(*(d.high - d.mean for d in found)) / count
    verdict = _verdict(low - gain.high, high - gain.low, WIDE + gain.high - gain.low)
    return Judged(
        **place,
        verdict=verdict,
        reasons=(gain.note,) if gain.note else (),
        ours=(mean, low, high),
        gates=verdict == "lower" and gain.verified,
    )


# ---------------------------------------------------------------- another sweep


def beside_sweep(
    rows: Sequence[Row], results: Results, others: Sequence[Row], theirs: Results, what: str
) -> Judgement:
    """Each row beside the row of the same settings in another sweep, image by image.

    lower and higher are told after Holm's correction over all rows that can be compared.
    """
    pairs: list[tuple[Row, Row | None, list[str], Difference | None]] = []
    for row in rows:
        other, reasons = _counterpart(row, others)
        found = None
        if other is not None:
            reasons += _differ(row, other)
            a, b = results.runs(row), theirs.runs(other)
            found = paired_difference(a, b) if a and b and not reasons else None
            if found is None and not reasons:
                reasons.append("no split and seed in common")
        pairs.append((row, other, reasons, found))
    p_values = iter(corrected([found for *_, found in pairs if found is not None]))
    cells = []
    for row, other, reasons, found in pairs:
        if other is None or found is None:
            cells.append(_not_comparable(row, other, reasons))
            continue
        p = next(p_values)
        told = p < ALPHA and not found.reason_not_tested
        verdict: Verdict = "lower" if found.mean < 0 else "higher"
        if not told:
            narrow = found.high - found.low <= WIDE
            verdict = "reproduced" if narrow or not found.differing else "within interval"
        note = found.reason_not_tested if found.differing else ""
        cells.append(
            Judged(
                **_place(row),
                verdict=verdict,
                reasons=(note,) if note else (),
                ours=(row.mean, row.low, row.high),
                other=(other.mean, other.mean),
                difference=(found.mean, found.low, found.high),
                p_corrected=p,
                gates=verdict == "lower",
            )
        )
    return Judgement(
        what=what, source="paired by image and run", cells=tuple(cells), missing=_left(rows, others)
    )


def _not_comparable(row: Row, other: Row | None, reasons: Sequence[str]) -> Judged:
    return Judged(
        **_place(row),
        verdict="not comparable",
        reasons=tuple(reasons),
        ours=(row.mean, row.low, row.high),
        other=None if other is None else (other.mean, other.mean),
    )


def _counterpart(row: Row, others: Sequence[Row]) -> tuple[Row | None, list[str]]:
    """The row of the same method and world, with the settings that both sweeps vary."""
    same = [other for other in others if _same(row, other)]
    if len(same) == 1:
        return same[0], []
    if not same:
        return None, ["no such row there"]
    keys = sorted({key for other in same for key in other.settings if key not in row.settings})
    return None, [f"{len(same)} rows there, which differ in {', '.join(keys)}"]


def _same(row: Row, other: Row) -> bool:
    shared = row.settings.keys() & other.settings.keys()
    return (
        row.world == other.world
        and row.method == other.method
        and all(row.settings[key] == other.settings[key] for key in shared)
    )


def _left(rows: Sequence[Row], others: Sequence[Row]) -> tuple[str, ...]:
    return tuple(
        " ".join((*other.world, other.method, settings_text(other, other.settings))).strip()
        for other in others
        if not any(_same(row, other) for row in rows)
    )


def _differ(row: Row, other: Row) -> list[str]:
    """What of two protocols differs."""
    a, b = row.protocol, other.protocol
    reasons = []
    if row.metric != other.metric:
        reasons.append(f"{row.metric} here, {other.metric} there")
    names = {"backbone": (a.backbone, b.backbone), "dataset": (row.dataset, other.dataset)}
    for name, (ours, theirs) in names.items():
        # Content decides; trials of long ago may know names alone.
        digests = [one.digests.get(name) for one in (a, b)]
        if all(digests) and digests[0] != digests[1] and ours == theirs:
            reasons.append(f"{name} {ours} is other content there")
        elif digests[0] != digests[1] if all(digests) else ours != theirs:
            reasons.append(f"{name} {ours}, there {theirs or 'not said'}")
    if a.digests.get("test_dataset") != b.digests.get("test_dataset") and all(
        one.digests for one in (a, b)
    ):
        reasons.append("tested on other content there")
    for name in ("shots", "class_seed", "leaky_pool"):
        if getattr(a, name) != getattr(b, name):
            reasons.append(f"{name} {said(getattr(a, name))}, there {said(getattr(b, name))}")
    if not (a.whole_pool and b.whole_pool) and a != b:
        reasons.append("a pool was made smaller or imbalanced")
    return reasons


# ---------------------------------------------------------------- words


def lines(found: Judgement, width: int = 80) -> Iterator[str]:
    """The judgement for a terminal: one line a row, and why rows cannot be compared, once each."""
    reasons: dict[str, int] = {}
    for judged in (found.cells, found.gains):
        if judged and judged is found.gains:
            yield ""
        yield from _block(judged, reasons, width)
    if reasons:
        yield ""
    for reason, number in reasons.items():
        yield f"[{number}] {reason}"


def _block(judged: Sequence[Judged], reasons: dict[str, int], width: int) -> Iterator[str]:
    header = ("", "here", "there", "difference", "verdict")
    body = [_line(one, judged, reasons) for one in judged]
    kept = [i for i in range(len(header)) if i in (0, 4) or any(line[i] for line in body)]
    if body:
        yield from aligned([[line[i] for i in kept] for line in (header, *body)], width)


def _line(one: Judged, judged: Sequence[Judged], reasons: dict[str, int]) -> tuple[str, ...]:
    shown = signed if " - " in one.method else percent
    here = there = difference = ""
    if one.ours is not None:
        mean, low, high = map(shown, one.ours)
        here = mean if one.p_corrected is not None else f"{mean} [{low}, {high}]"
    if one.other is not None:
        there = " to ".join(dict.fromkeys(map(shown, one.other)))
    if one.difference is not None and one.p_corrected is not None:
        mean, low, high = map(signed, one.difference)
        difference = f"{mean} [{low}, {high}]"
    verdict: str = one.verdict
    if not one.verified and one.other is not None:
        verdict += ", unverified"
    if one.reasons:
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in one.reasons]
        verdict += f" [{', '.join(numbers)}]"
    return _name(one, judged), here, there, difference, verdict


def _name(one: Judged, judged: Sequence[Judged]) -> str:
    words = [one.method]
    for key in ("dataset", "paradigm", "modality"):
        if len({getattr(other, key) for other in judged}) > 1:
            words.append(getattr(one, key))
    settings = ", ".join(f"{key} {value}" for key, value in one.settings.items())
    return " ".join(words) + (f" ({settings})" if settings else "")
