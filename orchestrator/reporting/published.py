"""Comparison of a sweep's rows with published numbers or with another sweep.

Two numbers are compared only if backbone, test images, splits, seeds, shots, classes and metric are
equal. Otherwise the verdict is `not comparable` and its reasons list the differences. Published
numbers and their protocol come from a YAML file (a *paper*); errors name its line and column.
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

from orchestrator.formatting import aligned_table, format_percent, format_value
from orchestrator.reporting._layouts import drop_empty_columns
from orchestrator.reporting._statistics import (
    Difference,
    corrected_p_values,
    paired_difference,
    verdict,
)
from orchestrator.reporting.rows import Results, Row, settings_text, signed_percent
from orchestrator.spec import SpecError
from orchestrator.spec.marked_yaml import allowed_choices, read
from orchestrator.spec.validation import CONFIG, LINE, NAME, Number, Version, Whole, validate

# ---------------------------------------------------------------- a file of published numbers

PAPERS = Path(__file__).with_name("papers")
PERCENT = "0 to 100, in %"


def _fraction(percent: float) -> float:
    return percent / 100


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(
            "the first number is larger than the second; allowed: points, or [from, to]"
        )
    return ends


Count = Annotated[Whole, Field(ge=1)]
Lines = Annotated[
    tuple[LINE, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
]
Paradigm = Literal["ul", "ssl", "trzsl"]
Percent = Annotated[
    Number, Field(ge=0, le=100, json_schema_extra={"title": PERCENT}), AfterValidator(_fraction)
]
Points = Annotated[Number, Field(ge=-100, le=100), AfterValidator(_fraction)]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class PaperProtocol:
    """The protocol of a paper. Fields that are None or empty are not compared."""

    backbone: Lines  # equivalent names of one model
    seeds: Count
    splits: Count = 1
    shots: Count | None = None
    class_seed: Annotated[Whole, Field(ge=0)] | None = None
    leaky_pool: Lines = ()  # datasets whose pool contained test images
    test_images: dict[str, Count] = Field(default_factory=dict)


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Accuracy:
    """One published accuracy, as a fraction."""

    value: Percent
    verified: StrictBool | None = None  # read in its source; None: as the whole file
    note: LINE = ""


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Gain:
    """A published gain of one method over another, mean over datasets, as fractions."""

    method: LINE
    over: LINE
    modality: LINE
    paradigm: Paradigm
    datasets: Lines
    # Lower and upper end; equal if a single number is published.
    points: Annotated[
        tuple[Points, Points],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value, value]),
        AfterValidator(_rising),
    ]
    verified: StrictBool | None = None
    note: LINE = ""


Accuracies = dict[
    str,
    Annotated[
        Accuracy,
        BeforeValidator(
            lambda value: value if isinstance(value, dict) else {"value": value},
            json_schema_input_type=Percent | Accuracy,
        ),
    ],
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
            (dataset, paradigm, modality, method): accuracy
            for modality, paradigms in self.accuracy.items()
            for paradigm, methods in paradigms.items()
            for method, datasets in methods.items()
            for dataset, accuracy in datasets.items()
        }

    def is_verified(self, number: Accuracy | Gain) -> bool:
        return self.verified if number.verified is None else number.verified


_FILE = TypeAdapter(Paper)


def paper_names() -> list[str]:
    """The papers that ship with airsweep."""
    return sorted(file.stem for file in PAPERS.glob("*.yaml"))


def find_paper(name_or_path: str) -> Paper:
    """Read a paper by the name of one that ships with airsweep, or by the path of a file.

    Raises:
        SpecError: no such paper, or its file is invalid (with file, line and column).
    """
    path = Path(name_or_path)
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        path = PAPERS / f"{name_or_path}.yaml"
        if not path.is_file():
            raise SpecError(
                f"--paper {name_or_path}: no such paper; "
                f"{allowed_choices(name_or_path, paper_names())}, or a file"
            )
    document = read(path)
    if document.value is None:
        raise SpecError(f"{path}: empty; a file of published numbers starts with `version: 1`")
    paper = validate(document, _FILE)
    if not paper.accuracy and not paper.gains:
        raise document.error((), "no numbers: add `accuracy` or `gains`")
    return paper


# ---------------------------------------------------------------- verdicts

Verdict = Literal["reproduced", "within interval", "lower", "higher", "not comparable"]
MAX_WIDTH = 0.05  # wider intervals are too imprecise for the verdict `reproduced`
Ends = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True, kw_only=True)
class RowVerdict:
    """A row of the sweep compared with a reference number, or the reasons why it is not."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    settings: Mapping[str, Any]
    verdict: Verdict
    reasons: Sequence[str] = ()  # why not comparable, or notes
    ours: Ends | None = None
    other: tuple[float, float] | None = None  # ends of the reference; equal if it is one number
    difference: Ends | None = None  # `ours` minus the reference
    p_corrected: float | None = None
    tested: bool = True  # False: too few runs or images for a test
    verified: bool = True

    @property
    def is_regression(self) -> bool:
        """Whether `--fail-on regress` fails because of this row."""
        return self.verdict == "lower" and self.verified

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "gates": self.is_regression}


@dataclass(frozen=True, kw_only=True)
class ReferenceComparison:
    """All rows of a sweep compared with a paper or another sweep."""

    reference: str  # "GRIP, NeurIPS 2023"
    source: str
    rule: str  # when a row is lower or higher
    cells: Sequence[RowVerdict]
    gains: Sequence[RowVerdict] = ()
    missing: Sequence[str] = ()  # numbers of the reference without a row in the sweep

    @property
    def has_regression(self) -> bool:
        return any(verdict.is_regression for verdict in (*self.cells, *self.gains))

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.verdict for row in (*self.cells, *self.gains)))

    def as_json(self) -> dict[str, Any]:
        return {
            "against": self.reference,
            "source": self.source,
            "cells": [cell.as_json() for cell in self.cells],
            "gains": [gain.as_json() for gain in self.gains],
            "missing": self.missing,
            "verdicts": self.counts(),
            "regressed": self.has_regression,
        }


def _row_verdict(row: Row, verdict: Verdict, reasons: Sequence[str], **numbers: Any) -> RowVerdict:
    return RowVerdict(
        dataset=row.dataset,
        paradigm=row.paradigm,
        modality=row.modality,
        method=row.method,
        settings=row.settings,
        verdict=verdict,
        reasons=[reason for reason in reasons if reason],
        ours=(row.mean, row.low, row.high),
        **numbers,
    )


def _verdict(low: float, high: float, max_width: float = MAX_WIDTH) -> Verdict:
    """The verdict from the interval of the difference, ours minus the reference."""
    if high < 0:
        return "lower"
    if low > 0:
        return "higher"
    return "reproduced" if high - low <= max_width else "within interval"


def _unequal(compared: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """One reason for each pair of different values (ours, theirs); None is not compared."""
    return [
        f"{name} is {format_value(ours)}, in the reference {format_value(theirs)}"
        for name, (ours, theirs) in compared.items()
        if ours != theirs and ours is not None and theirs is not None
    ]


def _check_tested(results: Results) -> None:
    """
    Raises:
        ValueError: no row has test images.
    """
    if results.rows and not results.tested:
        raise ValueError(
            "no image of the sweep is labelled for test, so there is no accuracy to compare; label "
            "some images in labels.csv and run it again"
        )


# ---------------------------------------------------------------- comparison with a paper


def compare_with_paper(results: Results, paper: Paper) -> ReferenceComparison:
    """Compare each row with the published number of its task and method.

    reproduced: the number lies in the row's interval, which is at most 5 points wide; within
    interval: it lies in a wider interval; lower, higher: it lies outside the interval.

    Raises:
        ValueError: no row has test images.
    """
    _check_tested(results)
    cells, compared = [], set()
    for row in results.tested:
        cell = (*row.task, row.method)
        number = paper.cells.get(cell)
        reasons = _protocol_differences(row, paper)
        compared.add(cell)
        if number is None:
            if not reasons or any(row.dataset == dataset for dataset, *_ in paper.cells):
                reasons.append(
                    f"no published number of {row.method} in {row.paradigm}/{row.modality}"
                )
            cells.append(_row_verdict(row, "not comparable", reasons))
            continue
        numbers = {"other": (number.value,) * 2, "verified": paper.is_verified(number)}
        if reasons:
            cells.append(_row_verdict(row, "not comparable", reasons, **numbers))
            continue
        mean, low, high = (end - number.value for end in (row.mean, row.low, row.high))
        numbers["difference"] = (mean, low, high)
        cells.append(_row_verdict(row, _verdict(low, high), [number.note], **numbers))
    return ReferenceComparison(
        reference=paper.title or paper.name,
        source=paper.source,
        rule="outside the 95 % interval of this sweep, without a correction",
        cells=cells,
        gains=[_gain_verdict(results, gain, paper) for gain in paper.gains],
        missing=[" ".join(cell) for cell in paper.cells if cell not in compared],
    )


def _protocol_differences(row: Row, paper: Paper) -> list[str]:
    """The differences between the protocols of a row and of a paper."""
    ours, theirs = row.protocol, paper.protocol
    datasets = {dataset for dataset, *_ in paper.cells}
    datasets |= {dataset for gain in paper.gains for dataset in gain.datasets}
    reasons, leaky = [f"no published number for {row.dataset}"], None
    if row.dataset in datasets:
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
        reasons.append("the sweep shrinks or unbalances the pool")
    return reasons


def _gain_verdict(results: Results, gain: Gain, paper: Paper) -> RowVerdict:
    """Compare the mean gain of the sweep over all datasets with a published gain.

    Datasets are independent of each other, so half widths add in squares.
    """
    fields: dict[str, Any] = {
        "dataset": f"mean of {len(gain.datasets)} datasets",
        "paradigm": gain.paradigm,
        "modality": gain.modality,
        "method": f"{gain.method} - {gain.over}",
        "settings": {},
        "verified": paper.is_verified(gain),
        "other": gain.points,
    }
    reasons, differences, missing = [], [], []
    for dataset in gain.datasets:
        task = (dataset, gain.paradigm, gain.modality)
        rows = [row for row in results.rows if row.task == task and row.method == gain.method]
        if not rows:
            missing.append(dataset)
            continue
        if len(rows) > 1:
            reasons.append(f"{len(rows)} settings of {gain.method} on {dataset}")
            continue
        baseline = results.baseline(rows[0], gain.over)
        difference = results.difference(rows[0], baseline) if baseline else None
        reasons += [f"{dataset}: {reason}" for reason in _protocol_differences(rows[0], paper)]
        if difference is None:
            reasons.append(f"{dataset}: no {gain.over}")
        else:
            differences.append(difference)
    if missing:
        reasons.insert(0, f"no {gain.method} on {', '.join(missing)}")
    if reasons:
        return RowVerdict(**fields, verdict="not comparable", reasons=reasons)
    count = len(differences)
    mean = sum(d.mean for d in differences) / count
    low = mean - math.hypot(*(d.mean - d.low for d in differences)) / count
    high = mean + math.hypot(*(d.high - d.mean for d in differences)) / count
    least, most = gain.points
    verdict = _verdict(low - most, high - least, MAX_WIDTH + most - least)
    notes = [gain.note] if gain.note else []
    return RowVerdict(**fields, verdict=verdict, reasons=notes, ours=(mean, low, high))


# ---------------------------------------------------------------- comparison with a sweep


def compare_with_sweep(results: Results, theirs: Results, reference: str) -> ReferenceComparison:
    """Compare each row with the row of the same settings in another sweep, paired by image and run.

    lower, higher: significant after Holm's correction over all comparable rows; reproduced: not
    significant, with an interval of at most 5 points; within interval: not significant otherwise.

    Args:
        reference: name of the other sweep.

    Raises:
        ValueError: no row has test images.
    """
    pairs: list[tuple[Row, Row | None, list[str], Difference | None]] = []
    _check_tested(results)
    for row in results.tested:
        other, reasons = _counterpart(row, theirs.tested)
        difference = None
        if other is not None and not (reasons := _row_differences(row, other)):
            difference = paired_difference(results.runs(row), theirs.runs(other))
            reasons = [] if difference else ["no split and seed in common"]
        pairs.append((row, other, reasons, difference))
    p_values = iter(corrected_p_values([d for *_, d in pairs if d is not None]))
    cells = []
    for row, other, reasons, difference in pairs:
        numbers: dict[str, Any] = {"other": None if other is None else (other.mean,) * 2}
        if difference is None:
            cells.append(_row_verdict(row, "not comparable", reasons, **numbers))
            continue
        mean, low, high = difference.mean, difference.low, difference.high
        p = next(p_values)
        narrow = high - low <= MAX_WIDTH or not difference.differing
        found: Verdict = "reproduced" if narrow else "within interval"
        result = verdict(difference, p)
        if result == "lower" or result == "higher":
            found = result
        notes = []
        if max(row.n, other.n if other else 0) > difference.n:
            notes.append("the difference is over the splits and seeds that both sweeps have")
        if difference.differing and difference.reason_not_tested:
            notes.append(difference.reason_not_tested)
        numbers |= {"difference": (mean, low, high), "p_corrected": p}
        cells.append(_row_verdict(row, found, notes, tested=result != "not tested", **numbers))
    missing = [
        " ".join((*other.task, other.method, settings_text(other, other.settings))).strip()
        for other in theirs.rows
        if not any(_same(row, other) for row in results.rows)
    ]
    return ReferenceComparison(
        reference=reference,
        source="paired by image and run",
        rule="significant (p < 0.05, Holm-corrected over all comparable settings)",
        cells=cells,
        missing=missing,
    )


def _counterpart(row: Row, others: Sequence[Row]) -> tuple[Row | None, list[str]]:
    """The row of the same task, method and shared settings in another sweep, or why it has none."""
    same = [other for other in others if _same(row, other)]
    if len(same) == 1:
        return same[0], []
    if not same:
        return None, ["the reference has no such row"]
    keys = sorted({key for other in same for key in other.settings if key not in row.settings})
    return None, [f"the reference has {len(same)} such rows, which differ in {', '.join(keys)}"]


def _same(row: Row, other: Row) -> bool:
    shared = row.settings.keys() & other.settings.keys()
    return (
        row.task == other.task
        and row.method == other.method
        and all(row.settings[key] == other.settings[key] for key in shared)
    )


def _row_differences(row: Row, other: Row) -> list[str]:
    """The differences between two protocols, by content of dataset and backbone, not by name."""
    a, b = row.protocol, other.protocol
    reasons = []
    for name in ("backbone", "dataset", "test_dataset"):
        if a.digests.get(name) != b.digests.get(name):
            if name == "backbone" and a.backbone != b.backbone:
                reasons += _unequal({name: (a.backbone, b.backbone)})
            else:
                reasons.append(f"{name} has other content in the reference")
    reasons += _unequal(
        {
            "metric": (row.metric, other.metric),
            "shots": (a.shots, b.shots),
            "class_seed": (a.class_seed, b.class_seed),
            "leaky_pool": (a.leaky_pool, b.leaky_pool),
            **{key: (format_value(a.pool[key]), format_value(b.pool[key])) for key in a.pool},
        }
    )
    return reasons


# ---------------------------------------------------------------- text


def screen(comparison: ReferenceComparison, width: int = 80) -> Iterator[str]:
    """Lines for a terminal: one line per row, then each distinct reason once, by number."""
    reasons: dict[str, int] = {}
    for group in filter(None, (comparison.cells, comparison.gains)):
        if group is comparison.gains:
            yield ""
        lines = [_line(row, group, reasons) for row in group]
        yield from aligned_table(drop_empty_columns(lines), width)
    if reasons:
        yield ""
    for reason, number in reasons.items():
        yield f"[{number}] {reason}"


def _line(row: RowVerdict, group: Sequence[RowVerdict], reasons: dict[str, int]) -> dict[str, str]:
    number = signed_percent if " - " in row.method else format_percent
    paired = row.p_corrected is not None
    verdict: str = row.verdict
    if not row.verified and row.other is not None:
        verdict += ", unverified"
    if row.reasons:
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in row.reasons]
        verdict += f" [{', '.join(numbers)}]"
    words = [row.method]
    for key in ("dataset", "paradigm", "modality"):
        if len({getattr(other, key) for other in group}) > 1:
            words.append(getattr(row, key))
    settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
    return {
        "setting": " ".join(words) + (f" ({settings})" if settings else ""),
        "this sweep": _interval(row.ours, number, paired),
        "reference": " to ".join(dict.fromkeys(map(number, row.other or ()))),
        "difference": _interval(row.difference, signed_percent, not row.tested) if paired else "",
        "verdict": verdict,
    }


def _interval(ends: Ends | None, number: Callable[[float], str], mean_alone: bool = False) -> str:
    if ends is None:
        return ""
    mean, low, high = map(number, ends)
    return mean if mean_alone else f"{mean} [{low}, {high}]"
