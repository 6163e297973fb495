"""Rows, comparisons, tables and the closing screen, from small fixed sets of trials."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.reporting.comparisons import Results
from orchestrator.reporting.notes import answers
from orchestrator.reporting.rows import FinishedTrial
from orchestrator.reporting.summary import summary
from orchestrator.reporting.tables import table
from tests.helpers.golden import check_golden, check_golden_cases
from tests.helpers.trials import QUICKSTART, one_line, quickstart, results, searched, trials

UNTESTED: dict[str, Any] = {
    **dict.fromkeys(("image_ids", "predictions", "labels"), np.array([])),
    "by_classifier": {},
    "metrics": {},
}


def measured(finished: list[FinishedTrial], **metrics: float) -> list[FinishedTrial]:
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    return [replace(trial, metrics=trial.metrics | names) for trial in finished]


def of_lengths(method: str, lengths: dict[int, float]) -> list[FinishedTrial]:
    """Values of a setting, whose default is 16, with what they add to the accuracy."""
    found = []
    for length, better in lengths.items():
        cell, settings = f"{method}-{length}", {"prompt.length": length}
        found += trials(method, settings=settings, cell=cell, better=better)
    return found


def search_of_lengths(method: str, best: int) -> list[FinishedTrial]:
    found = []
    for point, length in enumerate((1, 2, 4, 8, 16)):
        near = -abs(np.log2(length / best))
        settings = {"prompt.length": length}
        found += trials(method, settings=settings, point=point, objective=near, better=near / 20)
    return found


def point_of_search(point: int, objective: float | None, **settings: Any) -> list[FinishedTrial]:
    runs: dict[str, Any] = {"splits": (0, 1), "seeds": (1, 2)}
    return trials("air", settings=settings, point=point, objective=objective, better=0.2, **runs)


def collapsed() -> list[FinishedTrial]:
    finished = quickstart()
    at = next(i for i, t in enumerate(finished) if (t.method, t.seed) == ("air", 2))
    finished[at] = replace(finished[at], predictions=(finished[at].labels + 1) % 10)
    return finished


def settings_and_modalities() -> list[FinishedTrial]:
    settings = {"prompt.length": 2, "pseudo_labels.kind": "threshold"}
    found = []
    for method in ("cpl", "air"):
        lengths = of_lengths(method, {8: 0.0, 2: -0.2, 16: 0.1})
        found += [
            replace(t, settings=t.settings | {"pseudo_labels.kind": "top_k"}) for t in lengths
        ]
        found += trials(method, settings=settings, cell=f"{method}-threshold")
        visual = trials(method, settings=settings, cell=f"{method}-visual", better=0.2)
        found += [replace(t, flat=t.flat | {"modality": "visual"}) for t in visual]
    return found


def tied(*methods: str) -> list[FinishedTrial]:
    """Equal on validation images, not on those for test."""
    betters = {"zero_shot": 0.0, "cpl": -0.3, "fpl": 0.2, "air": -0.1}
    finished = [trial for method in methods for trial in trials(method, better=betters[method])]
    return measured(finished, objective__validation_accuracy_text=0.6, validation__images=30.0)


# By a sentence that the table of the case shows.
def grids() -> dict[str, list[FinishedTrial]]:
    runs: dict[str, Any] = {"splits": (0, 1), "seeds": (1, 2)}
    both = ("cpl", "air")
    lda = {"auxiliary.kind": "lda"}
    return {
        "without a result": [],
        "two splits are too few": [t for m in both for t in trials(m, **runs)],
        "two seeds are too few": [t for m in both for t in trials(m, seeds=(1, 2))],
        "a collapsed run is reported": collapsed(),
        "rows that are not above chance are named first": (
            trials("cpl", better=-0.56) + trials("fpl", better=-0.6) + trials("air")
        ),
        "a method that is worse than its host has an arrow": (
            trials("cpl") + trials("air", better=-0.4)
        ),
        "the text classifier has a column where the tested one is fused": (
            trials("cpl") + measured(trials("air"), test__accuracy_text=0.25)
        ),
        "each task has a best classifier, and p values of its own": (
            quickstart() + [t for m in QUICKSTART for t in trials(m, dataset="eurosat")]
        ),
        "settings and modalities are compared with the default or first value": (
            settings_and_modalities()
        ),
        "two classifiers are equal on validation images": tied("zero_shot", "cpl"),
        "four classifiers are equal on validation images": tied("zero_shot", "cpl", "fpl", "air"),
        "a bound is never the best": [
            trial
            for number, method in enumerate(("cpl", "air", "air_ceiling"), 1)
            for trial in measured(trials(method), objective__validation_accuracy_text=number / 10)
        ],
        "the fused classifier goes first without validation images": [
            replace(t, by_classifier=dict.fromkeys(("text", "auxiliary", "fused"), t.predictions))
            for t in trials("air")
        ],
        "a setting departs from the definition of the method": [
            replace(t, flat=t.flat | lda) for t in trials("air")
        ],
        "a setting that varies is no departure": trials("air", settings=lda),
        "seen and unseen classes have a harmonic mean": [
            replace(t, unseen=np.arange(300) % 3 == 0, flat=t.flat | {"paradigm": "trzsl"})
            for method in both
            for t in trials(method)
        ],
    }


def searches() -> dict[str, list[FinishedTrial]]:
    equal = {"images_per_class": 60, "fusion_weight": 0.348192}
    return {
        "the default point is taken if the objective predicts no test accuracy": searched(False),
        "the best point is taken by the objective, not by test accuracy": searched(),
        "two points are too few to rank": [t for t in searched() if t.point < 2],
        "a search without test images": [replace(t, **UNTESTED) for t in searched()],
        "the best point is taken if the default point failed": [
            t for t in searched(False) if t.point > 0
        ],
        "points without an objective, and equal ones, are not ranked": (
            searched()
            + point_of_search(6, None, **equal | {"fusion_weight": 0.6})
            + point_of_search(7, float("nan"), **equal | {"fusion_weight": 0.7})
            + point_of_search(8, 0.9, **equal)
        ),
        "methods are compared at their own best points": (
            search_of_lengths("cpl", 4) + search_of_lengths("air", 8)
        ),
        "searches with one finished point each": (
            trials("cpl", settings={"prompt.length": 4}, objective=0.5)
            + trials("air", settings={"prompt.length": 8}, objective=0.5)
        ),
    }


@functools.cache
def cases() -> dict[str, Results]:
    objective = "mutual_information"
    found = {name: results(finished, objective) for name, finished in searches().items()}
    return found | {name: results(finished) for name, finished in grids().items()}


# Cases of which other outputs than the fitted table are golden, too.
SPECIAL = [*searches()][:1] + [*grids()][:8]


def test_tables_equal_the_golden_file() -> None:
    fitted = {name: table(found, "md", "fit") for name, found in cases().items()}
    check_golden_cases("tables.md", fitted)
    worse = one_line(table(cases()["a method that is worse than its host has an arrow"], "md"))
    assert "cpl†↓ |" in worse
    assert "† from the host (↓ below it)" in worse


def test_the_main_table_equals_the_golden_file() -> None:
    """All columns, and those that fit."""
    check_golden("main_table.md", table(results(quickstart()), "md") + "\n")
    check_golden("fitted_table.md", table(results(quickstart()), "md", "fit") + "\n")
    many = [
        replace(t, settings={"a_setting_with_a_long_name": 1.5 * t.flat["seed"]})
        for t in quickstart()
    ]
    assert max(map(len, table(results(many), "md", "fit").splitlines())) <= 100


def rounded(value: Any) -> Any:
    """Processors differ in the last digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def test_json_and_csv_equal_the_golden_file_and_have_the_same_numbers() -> None:
    texts = {}
    for name in SPECIAL:
        entries = json.loads(table(cases()[name], "json"))
        header, *lines = csv.reader(io.StringIO(table(cases()[name], "csv")))
        for entry, line in zip(entries, lines, strict=True):
            cells = dict(zip(header, line, strict=True))
            for key in ("mean", "low", "high", "fused"):
                assert cells[key] == ("" if entry[key] is None else str(entry[key]))
        flat = [
            header,
            *([re.sub(r"(\.\d{4})\d+", r"\1", cell) for cell in line] for line in lines),
        ]
        texts[name] = "\n".join([*map(",".join, flat), *map(json.dumps, rounded(entries))])
    check_golden_cases("table_data.txt", texts)


# ---------------------------------------------------------------- the screen

FACTS = [
    (
        "trials",
        "17: 13 done, 4 reused, 0 failed; the last run took 4:24",
    ),
    (
        "next",
        "airsweep report quickstart                         curves and images in one page\n"
        "airsweep export best --sweep quickstart -o bundle  the classifier marked *",
    ),
]


@pytest.mark.parametrize("width", [80, 100])
def test_screens_fit_their_width(width: int) -> None:
    for found in cases().values():
        text = summary("airsweep quickstart   1,797 real digits", found, FACTS[:1], width=width)
        assert max(map(len, text.splitlines())) <= width
        assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_closing_screen_equals_the_golden_file() -> None:
    """Commands are not folded."""
    text = summary("airsweep quickstart   1,797 real digits", results(quickstart()), FACTS)
    check_golden("closing_screen.txt", text + "\n")


def test_screens_of_special_tables_equal_the_golden_file() -> None:
    check_golden_cases("screens.txt", {name: summary("s", cases()[name], []) for name in SPECIAL})


# ---------------------------------------------------------------- answers


def test_answers_equal_the_golden_ones() -> None:
    fused = [
        replace(t, by_classifier={"fused": t.labels if t.method == "air" else t.predictions})
        for t in quickstart()
    ]
    on_datasets = [
        trial
        for dataset, better in (("digits", 0.0), ("flowers102", 0.3), ("dtd", -0.3))
        for method in ("cpl", "air", "air_control")
        for trial in trials(
            method, dataset=dataset, better=(method != "cpl") * 0.1 + (method == "air") * better
        )
    ]
    values = {8: 0.0, 2: -0.4, 16: 0.1, 4: -0.1, 32: 0.05}
    rising = {length: length / 100 for length in (2, 8, 16)}
    cases = {
        "a method alone": trials("cpl"),
        "two values of a setting": of_lengths("cpl", {2: -0.4, 8: 0.0}),
        "five values of a setting": of_lengths("cpl", values),
        "two methods and three values": [*of_lengths("cpl", rising), *of_lengths("air", rising)],
        "a method without a control": [*trials("zero_shot"), *trials("cpl")],
        "worse than the host": [*trials("cpl"), *trials("air", better=-0.4)],
        "air_domain, whose control is air": [
            *trials("cpl"),
            *(replace(trial, method="air_domain", cell="d") for trial in trials("air")),
        ],
        "fused classifiers, of which that of air is always right": fused,
        "three datasets": on_datasets,
    }
    found = {name: "\n".join(answers(results(trials))) for name, trials in cases.items()}
    check_golden_cases("answers.txt", found)
