"""Our rows beside published numbers, or beside those of another sweep.

Two numbers are compared where backbone, test images, splits, seeds, shots, classes and measure are
the same; else the verdict says what differs. Nothing is averaged over what differs. Published
numbers come with their protocol from a file; messages name its line and column.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from orchestrator.formatting import percent, shown
from orchestrator.reporting._layouts import screen_lines, without_empty
from orchestrator.reporting._statistics import ALPHA, Difference, corrected, paired_difference
from orchestrator.reporting.rows import Results, Row, settings_text, signed
from orchestrator.spec import SpecError
from orchestrator.spec.marked_yaml import allowed_choices, read
from orchestrator.spec.validation import CONFIG, LINE, NAME, Number, Version, Whole, validate

# ---------------------------------------------------------------- a file of published numbers

PAPERS = Path(__file__).with_name("papers")
PERCENT = "0 to 100, in %"


def _fraction(percent: float) -> float:
    return percent / 100


def _list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _ends(value: Any) -> Any:
    return value if isinstance(value, list) else [value, value]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("not from low to high; allowed: points, or [from, to]")
    return ends


def _accuracy(value: Any) -> Any:
    return value if isinstance(value, dict) else {"value": value}


Count = Annotated[Whole, Field(ge=1)]
Lines = Annotated[tuple[LINE, ...], Field(min_length=1), BeforeValidator(_list)]
Paradigm = Literal["ul", "ssl", "trzsl"]
Percent = Annotated[
    Number, Field(ge=0, le=100, json_schema_extra={"title": PERCENT}), AfterValidator(_fraction)
]
Points = Annotated[Number, Field(ge=-100, le=100), AfterValidator(_fraction)]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class PaperProtocol:
    """How a paper measured. None or empty: the file does not say, so nobody is held to it."""

    backbone: Lines  # names of one and the same model
    seeds: Count
    splits: Count = 1
    shots: Count | None = None
    class_seed: Annotated[Whole, Field(ge=0)] | None = None
    leaky_pool: Lines = ()  # datasets whose pool held test images
    test_images: dict[str, Count] = Field(default_factory=dict)


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Accuracy:
    """One published number; a fraction."""

    value: Percent
    verified: StrictBool | None = None  # read in a source, others never gate; None: as the file
    note: LINE = ""


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Gain:
    """A mean over datasets of one method minus another; fractions."""

    method: LINE
    over: LINE
    modality: LINE
    paradigm: Paradigm
    datasets: Lines
    # From low to high; equal where one number is published.
    points: Annotated[tuple[Points, Points], BeforeValidator(_ends), AfterValidator(_rising)]
    verified: StrictBool | None = None
    note: LINE = ""


Accuracies = dict[
    str, Annotated[Accuracy, BeforeValidator(_accuracy, json_schema_input_type=Percent | Accuracy)]
]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Paper:
    """A file of published numbers."""

    version: Version
    name: NAME
    title: LINE | None = None
    source: LINE
    verified: StrictBool = True
    protocol: PaperProtocol
    accuracy: dict[str, dict[Paradigm, dict[str, Accuracies]]] = Field(default_factory=dict)
    gains: Annotated[tuple[Gain, ...], Field(min_length=1)] = ()

    @cached_property
    def cells(self) -> dict[tuple[str, str, str, str], Accuracy]:
        """Numbers by dataset, paradigm, modality and method."""
        return {
            (dataset, paradigm, modality, method): found
            for modality, paradigms in self.accuracy.items()
            for paradigm, methods in paradigms.items()
            for method, datasets in methods.items()
            for dataset, found in datasets.items()
        }

    def is_verified(self, number: Accuracy | Gain) -> bool:
        return self.verified if number.verified is None else number.verified


_FILE = TypeAdapter(Paper)


def find_paper(name_or_path: str) -> Paper:
    """A paper that comes with airsweep by its name, or a file.

    Raises:
        SpecError: there is none, or its file is wrong: file, line, column and what is allowed.
    """
    path = Path(name_or_path)
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        path = PAPERS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in PAPERS.glob("*.yaml"))
            raise SpecError(
                f"--paper {name_or_path}: no such paper; "
                f"{allowed_choices(name_or_path, known)}, or a file"
            )
    return read_paper(path)


def read_paper(path: Path) -> Paper:
    document = read(path)
    if document.value is None:
        raise SpecError(f"{path}: empty; a file of published numbers starts with `version: 1`")
    paper = validate(document, _FILE)
    if not paper.accuracy and not paper.gains:
        raise document.error((), "no number: `accuracy` or `gains` is needed")
    return paper


# ---------------------------------------------------------------- verdicts

Verdict = Literal["reproduced", "within interval", "lower", "higher", "not comparable"]
WIDE = 0.05  # an interval wider than 5 points holds a number without having reproduced it
Ends = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One of our rows beside another number, or why not."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: Mapping[str, Any]
    verdict: Verdict
    reasons: Sequence[str] = ()  # why not comparable, or what to know
    ours: Ends | None = None
    other: tuple[float, float] | None = None  # the other number; two where it is a range
    difference: Ends | None = None  # ours minus it
    p_corrected: float | None = None
    verified: bool = True

    @property
    def gates(self) -> bool:
        return self.verdict == "lower" and self.verified

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "gates": self.gates}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """All rows of a sweep beside a paper or another sweep."""

    what: str  # "GRIP, NeurIPS 2023"
    source: str
    cells: Sequence[Judged]
    gains: Sequence[Judged] = ()
    missing: Sequence[str] = ()  # what has no row here

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
            "missing": self.missing,
            "verdicts": self.counts(),
            "regressed": self.regressed,
        }


def _judged(row: Row, verdict: Verdict, reasons: Sequence[str], **found: Any) -> Judged:
    return Judged(
        dataset=row.dataset,
        paradigm=row.paradigm,
        modality=row.modality,
        method=row.method,
        settings=row.settings,
        verdict=verdict,
        reasons=[reason for reason in reasons if reason],
        ours=(row.mean, row.low, row.high),
        **found,
    )


def _verdict(low: float, high: float, wide: float = WIDE) -> Verdict:
    """From the interval of a difference, ours minus the other."""
    if high < 0:
        return "lower"
    if low > 0:
        return "higher"
    return "reproduced" if high - low <= wide else "within interval"


def _unequal(compared: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Names with two values that differ; None is not compared."""
    return [
        f"{name} {shown(ours)}, there {shown(theirs)}"
        for name, (ours, theirs) in compared.items()
        if ours != theirs and ours is not None and theirs is not None
    ]


# ---------------------------------------------------------------- beside a paper


def beside_paper(results: Results, paper: Paper) -> Judgement:
    """Each row beside the number of its dataset, paradigm, modality and method.

    reproduced: the number lies in our interval, which is no wider than 5 points; within interval:
    it lies in a wider one; lower, higher: our interval leaves it out.
    """
    cells, met = [], set()
    for row in results.rows:
        place = (*row.world, row.method)
        number = paper.cells.get(place)
        reasons = _differ_from_paper(row, paper)
        met.add(place)
        if number is None:
            if not reasons or any(row.dataset == dataset for dataset, *_ in paper.cells):
                reasons.append(f"no {row.method} in {row.paradigm}/{row.modality} is published")
            cells.append(_judged(row, "not comparable", reasons))
            continue
        beside = {"other": (number.value,) * 2, "verified": paper.is_verified(number)}
        if reasons:
            cells.append(_judged(row, "not comparable", reasons, **beside))
            continue
        mean, low, high = (end - number.value for end in (row.mean, row.low, row.high))
        beside["difference"] = (mean, low, high)
        cells.append(_judged(row, _verdict(low, high), [number.note], **beside))
    return Judgement(
        what=paper.title or paper.name,
        source=paper.source,
        cells=cells,
        gains=[_beside_gain(results, gain, paper) for gain in paper.gains],
        missing=[" ".join(place) for place in paper.cells if place not in met],
    )


def _differ_from_paper(row: Row, paper: Paper) -> list[str]:
    """What of a row's protocol is not the paper's."""
    ours, theirs = row.protocol, paper.protocol
    known = {dataset for dataset, *_ in paper.cells} | {d for g in paper.gains for d in g.datasets}
    reasons, leaky = [f"no number for {row.dataset} is published"], None
    if row.dataset in known:
        reasons, leaky = [], row.dataset in theirs.leaky_pool
    backbone = ours.backbone if ours.backbone in theirs.backbone else theirs.backbone[0]
    reasons += _unequal(
        {
            "backbone": (ours.backbone, backbone),
            "test images": (row.n_test, theirs.test_images.get(row.dataset)),
            "shots": (ours.shots, theirs.shots),
            "class_seed": (ours.class_seed, theirs.class_seed),
            "leaky_pool": (ours.leaky_pool, leaky),
        }
    )
    if ours.splits < theirs.splits:
        reasons.append(f"{ours.splits} of {theirs.splits} splits")
    if 0 < ours.seeds < theirs.seeds:
        reasons.append(f"{ours.seeds} of {theirs.seeds} seeds")
    if not ours.whole_pool:
        reasons.append("the pool was made smaller or imbalanced")
    return reasons


def _beside_gain(results: Results, gain: Gain, paper: Paper) -> Judged:
    """Our mean gain over all of the datasets.

    They are independent of each other, so half widths add in squares.
    """
    place: dict[str, Any] = {
        "dataset": f"mean of {len(gain.datasets)} datasets",
        "paradigm": gain.paradigm,
        "modality": gain.modality,
        "method": f"{gain.method} - {gain.over}",
        "settings": {},
        "verified": paper.is_verified(gain),
        "other": gain.points,
    }
    reasons, found, missing = [], [], []
    for dataset in gain.datasets:
        world = (dataset, gain.paradigm, gain.modality)
        own = [row for row in results.rows if row.world == world and row.method == gain.method]
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
        return Judged(**place, verdict="not comparable", reasons=reasons)
    count = len(found)
    mean = sum(d.mean for d in found) / count
    low = mean - math.hypot(*(d.mean - d.low for d in found)) / count
    high = mean + math.hypot(*(d.high - d.mean for d in found)) / count
    least, most = gain.points
    verdict = _verdict(low - most, high - least, WIDE + most - least)
    notes = [gain.note] if gain.note else []
    return Judged(**place, verdict=verdict, reasons=notes, ours=(mean, low, high))


# ---------------------------------------------------------------- beside another sweep


def beside_sweep(results: Results, theirs: Results, what: str) -> Judgement:
    """Each row beside the row of the same settings in another sweep, image by image.

    lower and higher are significant after Holm's correction over all rows that can be compared.
    """
    pairs: list[tuple[Row, Row | None, list[str], Difference | None]] = []
    for row in results.rows:
        other, reasons = _counterpart(row, theirs.rows)
        found = None
        if other is not None and not (reasons := _differ(row, other)):
            found = paired_difference(results.runs(row), theirs.runs(other))
            reasons = [] if found else ["no split and seed in common"]
        pairs.append((row, other, reasons, found))
    p_values = iter(corrected([found for *_, found in pairs if found is not None]))
    cells = []
    for row, other, reasons, found in pairs:
        beside: dict[str, Any] = {"other": None if other is None else (other.mean,) * 2}
        if found is None:
            cells.append(_judged(row, "not comparable", reasons, **beside))
            continue
        p = next(p_values)
        if p < ALPHA and not found.reason_not_tested:
            verdict: Verdict = "lower" if found.mean < 0 else "higher"
        else:
            narrow = found.high - found.low <= WIDE or not found.differing
            verdict = "reproduced" if narrow else "within interval"
        notes = [found.reason_not_tested] if found.differing else []
        beside |= {"difference": (found.mean, found.low, found.high), "p_corrected": p}
        cells.append(_judged(row, verdict, notes, **beside))
    missing = [
        " ".join((*other.world, other.method, settings_text(other, other.settings))).strip()
        for other in theirs.rows
        if not any(_same(row, other) for row in results.rows)
    ]
    return Judgement(what=what, source="paired by image and run", cells=cells, missing=missing)


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


def _differ(row: Row, other: Row) -> list[str]:
    """What of two protocols differs. Contents of dataset and backbone decide, not their names."""
    a, b = row.protocol, other.protocol
    reasons = []
    for name in ("backbone", "dataset", "test_dataset"):
        if a.digests.get(name) != b.digests.get(name):
            named = name == "backbone" and a.backbone != b.backbone
            words = f"{a.backbone}, there {b.backbone}" if named else "of other content there"
            reasons.append(f"{name} {words}")
    reasons += _unequal(
        {
            "measure": (row.metric, other.metric),
            "shots": (a.shots, b.shots),
            "class_seed": (a.class_seed, b.class_seed),
            "leaky_pool": (a.leaky_pool, b.leaky_pool),
        }
    )
    if not (a.whole_pool and b.whole_pool) and a != b:
        reasons.append("a pool was made smaller or imbalanced")
    return reasons


# ---------------------------------------------------------------- words


def lines(found: Judgement, width: int = 80) -> Iterator[str]:
    """The judgement for a terminal: one line a row, and why rows cannot be compared, once each."""
    reasons: dict[str, int] = {}
    for judged in filter(None, (found.cells, found.gains)):
        if judged is found.gains:
            yield ""
        lines = [_line(one, judged, reasons) for one in judged]
        yield from screen_lines(without_empty(lines), width)
    if reasons:
        yield ""
    for reason, number in reasons.items():
        yield f"[{number}] {reason}"


def _line(one: Judged, judged: Sequence[Judged], reasons: dict[str, int]) -> dict[str, str]:
    number = signed if " - " in one.method else percent
    paired = one.p_corrected is not None
    verdict: str = one.verdict
    if not one.verified and one.other is not None:
        verdict += ", unverified"
    if one.reasons:
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in one.reasons]
        verdict += f" [{', '.join(numbers)}]"
    words = [one.method]
    for key in ("dataset", "paradigm", "modality"):
        if len({getattr(other, key) for other in judged}) > 1:
            words.append(getattr(one, key))
    settings = ", ".join(f"{key} {value}" for key, value in one.settings.items())
    return {
        "setting": " ".join(words) + (f" ({settings})" if settings else ""),
        "here": _interval(one.ours, number, paired),
        "there": " to ".join(dict.fromkeys(map(number, one.other or ()))),
        "difference": _interval(one.difference, signed) if paired else "",
        "verdict": verdict,
    }


def _interval(ends: Ends | None, number: Callable[[float], str], mean_alone: bool = False) -> str:
    if ends is None:
        return ""
    mean, low, high = map(number, ends)
    return mean if mean_alone else f"{mean} [{low}, {high}]"
