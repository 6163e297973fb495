"""Rows, comparisons, tables and the closing screen, from a small fixed set of trials."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.reporting import charts
from orchestrator.reporting.answers import answers
from orchestrator.reporting.rows import signed_percent
from orchestrator.reporting.summary import summary
from orchestrator.reporting.tables import table
from tests.helpers.golden import check_golden, check_golden_cases
from tests.helpers.trials import QUICKSTART, cells, one_line, quickstart, results, searched, trials

ROW_KEYS = [
    *("dataset", "paradigm", "modality", "method", "settings", "metric", "n", "n_test"),
    *("mean", "std", "low", "high", "interval", "protocol"),
]
ADDED_KEYS = [
    *("text", "fused", "auxiliary", "lora_labels", "mutual_information", "agreement"),
    *("best_classifier", "bound"),
    *("chance", "comparisons", "collapsed"),
]


# ---------------------------------------------------------------- rows


def test_json_rows_have_exactly_the_documented_keys() -> None:
    finished = quickstart()
    found = json.loads(table(results(finished), "json"))
    assert [list(row) for row in found] == [[*ROW_KEYS, *ADDED_KEYS]] * len(QUICKSTART)
    assert [row["method"] for row in found] == list(QUICKSTART)
    for row in found:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
        assert row["metric"] == "accuracy"
        assert row["n_test"] == 300


def test_a_row_has_mean_and_deviation_of_its_runs() -> None:
    finished = trials("cpl", splits=(0, 1), seeds=(1, 2))
    (row,) = results(finished).rows
    accuracies = [float((trial.predictions == trial.labels).mean()) for trial in finished]
    assert row.n == 4
    assert row.mean == pytest.approx(np.mean(accuracies))
    assert row.std == pytest.approx(np.std(accuracies, ddof=1))


def test_seeds_of_a_method_that_ignores_the_seed_count_once() -> None:
    (row,) = results(trials("zero_shot")).rows
    assert (row.n, row.std) == (1, None)
    assert "seed" not in row.interval
    (row,) = results(trials("zero_shot", splits=(0, 1))).rows
    assert row.n == 2


def test_a_searched_row_is_the_best_point_by_objective_and_not_by_test_accuracy() -> None:
    finished = searched()
    host, best = results(finished, "mutual_information").rows
    assert best.settings == {"images_per_class": 60, "fusion_weight": 0.348192}
    by_test = max(results(finished).rows, key=lambda row: row.mean)
    assert by_test.settings["images_per_class"] == 30
    assert host.settings == {}


def test_a_searched_row_is_the_default_point_if_the_objective_predicts_no_test_accuracy() -> None:
    finished = searched(guides=False)
    host, kept = results(finished, "mutual_information").rows
    assert kept.settings == {"images_per_class": 120, "fusion_weight": 0.5}
    assert kept.choice.default
    assert kept.choice.ranking.low <= 0
    assert host.choice is None  # it has a single point


def test_a_searched_row_is_the_best_point_if_the_default_point_failed() -> None:
    finished = [trial for trial in searched(guides=False) if trial.point > 0]
    (best,) = results(finished, "mutual_information").rows
    assert best.settings["images_per_class"] == 60
    assert not best.choice.default


def test_a_point_without_an_objective_is_chosen_last() -> None:
    finished = [trial for trial in searched() if trial.method == "air"]
    for point, objective in ((6, None), (7, float("nan"))):
        finished += trials(
            "air", settings={"fusion_weight": point}, point=point, objective=objective, better=0.2
        )
    (row,) = results(finished, "mutual_information").rows
    assert row.settings["images_per_class"] == 60
    assert row.choice.ranking.points == 6


def test_points_with_equal_settings_count_once_in_the_ranking() -> None:
    finished = searched()
    again = trials(
        "air",
        splits=(0, 1),
        seeds=(1, 2),
        settings={"images_per_class": 60, "fusion_weight": 0.348192},
        point=6,
        objective=0.9,
        better=0.08,
    )
    _, row = results(finished + again, "mutual_information").rows
    assert row.choice.ranking.points == 6


# ---------------------------------------------------------------- comparisons


def test_a_method_is_compared_with_its_host_and_its_control() -> None:
    finished = quickstart()
    found = results(finished).comparisons
    assert [(*c.methods, c.role) for c in found] == [
        ("fpl", "zero_shot", "host"),
        ("cpl", "zero_shot", "host"),
        ("air", "cpl", "host"),
        ("air", "air_control", "control"),
        ("air_control", "cpl", "host"),
    ]
    by_method = {row.method: row.mean for row in results(finished).rows}
    for c in found:
        assert c.difference.mean == pytest.approx(
            by_method[c.row.method] - by_method[c.baseline.method]
        )
        assert c.difference.low <= c.difference.mean <= c.difference.high


def test_searched_methods_are_compared_at_their_own_best_points() -> None:
    finished = []
    for method, best in (("cpl", 4), ("air", 8)):
        for point, length in enumerate((1, 2, 4, 8, 16)):
            near = -abs(np.log2(length / best))
            finished += trials(
                method,
                settings={"prompt.length": length},
                point=point,
                objective=near,
                better=near / 20,
            )
    found = results(finished, "mutual_information")
    assert [row.settings["prompt.length"] for row in found.rows] == [4, 8]
    assert [c.methods for c in found.comparisons] == [("air", "cpl")]


def test_values_of_settings_and_modalities_are_compared_with_the_default_or_first_one() -> None:
    finished, lengths = [], {8: 0.0, 2: -0.2, 16: 0.1}  # the default is 16
    for method in ("cpl", "air"):
        for length, better in lengths.items():
            settings = {"prompt.length": length, "pseudo_labels.kind": "top_k"}
            cell = f"{method}-{length}"
            finished += trials(method, settings=settings, cell=cell, better=better)
        settings = {"prompt.length": 2, "pseudo_labels.kind": "threshold"}
        finished += trials(method, settings=settings, cell=f"{method}-threshold")
        visual = trials(method, settings=settings, cell=f"{method}-visual", better=0.2)
        finished += [replace(t, flat=t.flat | {"modality": "visual"}) for t in visual]
    found = results(finished)
    assert [c.name for of_key in found.value_comparisons.values() for c in of_key] == [
        *("cpl with prompt.length 8 vs 16", "cpl with prompt.length 2 vs 16"),
        *("air with prompt.length 8 vs 16", "air with prompt.length 2 vs 16"),
        "cpl with pseudo_labels.kind threshold vs top_k",
        "air with pseudo_labels.kind threshold vs top_k",
        *("cpl with modality visual vs text", "air with modality visual vs text"),
    ]
    for c in found.all_comparisons:
        assert c.difference.mean == pytest.approx(c.row.mean - c.baseline.mean)
    for c in found.comparisons:  # with the host at the same settings
        assert (*c.methods, c.row.settings) == ("air", "cpl", c.baseline.settings)


def test_searched_methods_are_compared_if_each_has_one_finished_point() -> None:
    finished = []
    for method, length in (("cpl", 4), ("air", 8)):
        finished += trials(method, settings={"prompt.length": length}, objective=0.5)
    found = results(finished, "mutual_information")
    assert [c.methods for c in found.comparisons] == [("air", "cpl")]
    alone = results([trial for trial in finished if trial.method == "cpl"], "mutual_information")
    assert alone.varied_settings == ["prompt.length"]


def test_datasets_are_not_compared_with_each_other() -> None:
    finished = trials("cpl", dataset="digits") + trials("air", dataset="flowers102")
    assert results(finished).comparisons == []


def test_a_gain_has_a_mark_if_it_is_significant() -> None:
    finished = quickstart()
    found = {(c.row.method, c.role): c for c in results(finished).comparisons}
    for c in found.values():
        assert c.difference.p <= c.p_corrected <= 1
        assert (c.difference.p < 0.05) == (not c.difference.low <= 0 <= c.difference.high)
        assert not c.difference.reason_not_tested
    assert found["cpl", "host"].mark == "†"
    assert found["air", "control"].mark == ""  # its interval contains 0
    assert found["air", "control"].p_corrected > 0.05
    assert found["air", "host"].difference.p < found["air", "host"].p_corrected < 0.05


def test_a_method_that_is_worse_than_its_host_has_an_arrow() -> None:
    finished = trials("cpl", seeds=(1, 2, 3)) + trials("air", better=-0.4)
    found = results(finished)
    (c,) = found.comparisons
    assert c.mark == "†↓"
    text = " ".join(table(found, "md").split())
    assert "cpl†↓" in text
    assert "(↓ below it)" in text
    (row,) = list(csv.DictReader(io.StringIO(table(found, "csv"))))[1:]
    assert row["told_from"] == "host-"


@pytest.mark.parametrize(
    ("splits", "seeds", "words"),
    [
        (
            (0, 1),
            (1, 2),
            "Not tested: air - cpl (2 splits are too few; a test needs 1, or at least 4).",
        ),
        (
            (0,),
            (1, 2),
            "Not tested: air - cpl (2 seeds are too few; a test needs at least 3).",
        ),
    ],
)
def test_too_few_runs_have_no_mark_interval_or_colour_but_a_reason(splits, seeds, words) -> None:
    finished = [
        trial
        for method, better in (("cpl", 0.0), ("air", 0.2))
        for trial in trials(method, splits=splits, seeds=seeds, better=better)
    ]
    found = results(finished)
    (c,) = found.comparisons
    assert c.difference.low > 0  # not tested although the interval excludes 0
    assert not c.is_significant
    mean = signed_percent(c.difference.mean)
    text, screen = one_line(table(found, "md")), one_line(summary("s", found, []))
    assert f"{mean} cpl |" in text
    assert f"Does air beat cpl? Cannot be told: {mean} points, not tested." in screen
    for shown in (text, screen):
        assert shown.count(words) == 1
        assert "†" not in shown
        assert "p < 0.05" not in shown
    assert charts.VERDICT_COLORS[c.verdict] == charts.FAINT
    (_, row) = json.loads(table(found, "json"))
    assert row["comparisons"][0]["untold"] == c.difference.reason_not_tested
    assert row["comparisons"][0]["marked"] is False


def test_a_collapsed_run_is_reported_in_table_json_and_screen() -> None:
    finished = quickstart()
    fallen = next(e for e in finished if e.method == "air" and e.seed == 2)
    finished[finished.index(fallen)] = replace(fallen, predictions=(fallen.labels + 1) % 10)
    found = results(finished)
    note = "Collapsed run: air, split 0, seed 2 has accuracy 0.0, the other runs 68."
    *_, below = table(found, "md").split("\n\n")
    for text in (below, summary("s", found, [])):
        assert note in " ".join(text.split())
    by_method = {row["method"]: row["collapsed"] for row in json.loads(table(found, "json"))}
    assert [one["seed"] for one in by_method.pop("air")] == [2]
    assert not any(by_method.values())
    assert "Collapsed" not in table(results(quickstart()), "md")


# ---------------------------------------------------------------- tables


def test_the_main_table_equals_the_golden_file() -> None:
    check_golden("main_table.md", table(results(quickstart()), "md") + "\n")


def test_a_fitted_table_equals_the_golden_file() -> None:
    text = table(results(quickstart()), "md", "fit")
    check_golden("fitted_table.md", text + "\n")
    many = [replace(t, settings={"a_setting_with_a_long_name": 1.5 * t.seed}) for t in quickstart()]
    for found in (results(quickstart()), results(many)):
        assert max(map(len, table(found, "md", "fit").splitlines())) <= 100


def test_the_tables_of_a_search_equal_the_golden_file() -> None:
    """Its best points and the default one: taken; set aside; of two points; without test images."""
    none = {"image_ids": np.array([]), "predictions": np.array([]), "labels": np.array([])}
    untested = [replace(trial, **none, by_classifier={}, metrics={}) for trial in searched()]
    two = [trial for trial in searched() if trial.point < 2]
    cases = [results(case, "mutual_information") for case in (searched(), searched(False), two)]
    cases.append(results(untested, "mutual_information"))
    check_golden("search_table.md", "\n\n".join(table(each, "md", "fit") for each in cases) + "\n")


def test_json_of_a_search_contains_the_chosen_point_and_why() -> None:
    finished = searched(guides=False)
    host, kept = json.loads(table(results(finished, "mutual_information"), "json"))
    assert list(host) == [*ROW_KEYS, *ADDED_KEYS]
    of_search = ["point", "chosen_by", "rank_correlation"]
    assert list(kept) == [*ROW_KEYS, *of_search, *ADDED_KEYS, "points"]
    assert (kept["point"], kept["chosen_by"]) == (0, "default")
    assert kept["rank_correlation"]["points"] == 6
    assert [point["point"] for point in kept["points"]] == [1, 2, 4, 0]


def test_only_settings_that_vary_have_a_column() -> None:
    finished = searched()
    for trial in finished:
        trial.settings["lora.rank"] = 8
    header, _, host, best, *points = cells(table(results(finished, "mutual_information"), "md"))
    assert "lora.rank" not in points[0]
    assert header[:3] == ["method", "images_per_class", "fusion_weight"]
    assert "lora.rank" not in header
    assert host[:3] == ["cpl", "", ""]
    assert best[:3] == ["air", "60", "0.3482"]


def test_parts_of_the_task_are_columns_if_they_differ_and_each_task_has_a_best_classifier() -> None:
    finished = [
        trial
        for dataset, better in (("digits", 0.0), ("flowers102", -0.2))
        for method in ("cpl", "air")
        for trial in trials(method, dataset=dataset, better=better)
    ]
    header, _, *lines = cells(table(results(finished), "md"))
    assert header[:2] == ["dataset", "method"]
    assert "paradigm" not in header
    accuracy = header.index("accuracy")
    assert [line[accuracy].startswith("* ") for line in lines] == [True, False] * 2
    screen = summary("s", results(finished), [])
    assert screen.count(" * ") == 4  # two numbers and a sentence on each


def test_csv_has_the_numbers_of_json_in_flat_columns() -> None:
    finished = searched()
    found = results(finished, "mutual_information")
    lines = list(csv.DictReader(io.StringIO(table(found, "csv"))))
    assert list(lines[0]) == [
        *("dataset", "paradigm", "modality", "method"),
        *("settings.images_per_class", "settings.fusion_weight"),
        *("metric", "n", "n_test", "mean", "std", "low", "high", "interval"),
        *("text", "fused", "auxiliary", "lora_labels", "best_classifier", "bound"),
        *("point", "chosen_by", "chance", "told_from", "collapsed"),
    ]
    assert float(lines[1]["mean"]) == found.rows[1].mean
    assert float(lines[1]["settings.fusion_weight"]) == 0.348192
    assert lines[0]["settings.fusion_weight"] == ""
    assert len(lines) == len(found.rows)


def test_an_empty_table_states_that_no_trial_is_finished() -> None:
    nothing = results([])
    assert table(nothing, "json") == "[]"
    assert table(nothing, "csv").startswith("dataset,paradigm,modality,method,metric")
    assert "no finished trial" in table(nothing, "md").lower()
    assert "no finished trial" in summary("airsweep quickstart", nothing, [])


def test_accuracies_of_text_fused_and_auxiliary_classifier_stand_in_every_table() -> None:
    found = results(quickstart())
    header, _, *lines = cells(table(found, "md"))
    assert "text" not in header  # the accuracy
    assert "Accuracy: text classifier. Fused: " in one_line(table(found, "md"))
    content = json.loads(table(found, "json"))
    csv_lines = list(csv.DictReader(io.StringIO(table(found, "csv"))))
    for row, line, entry, flat in zip(found.rows, lines, content, csv_lines, strict=True):
        for name in ("fused", "auxiliary"):
            mean = row.average(f"test/accuracy_{name}")
            assert (mean is not None) == row.method.startswith("air")
            assert line[header.index(name)] == ("" if mean is None else f"{100 * mean:.1f}")
            assert entry[name] == mean
            assert flat[name] == ("" if mean is None else str(mean))
        assert entry["text"] == pytest.approx(row.mean)
    none = table(results(trials("zero_shot") + trials("cpl")), "md")
    assert "fused" not in none
    assert "Accuracy: text" not in none


def test_the_text_classifier_has_a_column_where_a_row_tests_the_fused_one() -> None:
    without_prompt = [
        replace(trial, metrics=trial.metrics | {"test/accuracy_text": 0.25})
        for trial in trials("air")
    ]
    text = table(results([*trials("cpl"), *without_prompt]), "md")
    header, _, host, fused = cells(text)
    assert fused[header.index("text")] == "25.0"
    assert host[header.index("text")] == "* " + host[header.index("accuracy")].partition(" ")[0]
    assert "where no prompt is learned, that of the column fused." in one_line(text)


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
@pytest.mark.parametrize("case", ["quickstart", "search"])
def test_the_screen_fits_its_width(width: int, case: str) -> None:
    found = (
        results(quickstart()) if case == "quickstart" else results(searched(), "mutual_information")
    )
    text = summary("airsweep quickstart   1,797 real digits", found, FACTS[:1], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_closing_screen_equals_the_golden_file() -> None:
    """Commands are not folded."""
    text = summary("airsweep quickstart   1,797 real digits", results(quickstart()), FACTS)
    check_golden("closing_screen.txt", text + "\n")


def test_a_row_that_is_not_above_chance_is_named_first() -> None:
    found = results([*trials("cpl", better=-0.56), *trials("fpl", better=-0.6), *trials("air")])
    text = one_line(summary("s", found, FACTS))
    assert "the 95 % interval: the best classifier, cpl, fpl (chance 10.0 %)." in text
    assert table(found, "md").startswith("Not better than chance")
    assert "Not better" not in table(results(trials("air")), "md")


def test_equal_classifiers_are_said_with_the_number_of_validation_images() -> None:
    """The order of methods decides between them, and not the test images."""
    scores = {"objective/validation_accuracy_text": 0.6, "validation/images": 30.0}
    methods = {"zero_shot": 0.0, "cpl": -0.3, "fpl": 0.2, "air": -0.1}
    for tied, words in ((2, "text of zero_shot."), (3, "2 others."), (4, "3 others.")):
        finished = [t for m in [*methods][:tied] for t in trials(m, better=methods[m])]
        found = results([replace(t, metrics=t.metrics | scores) for t in finished])
        text = one_line(table(found, "md"))
        assert f"the highest on validation images, 60.0 % of 30, tied with {words}" in text
        assert found.best_classifiers[found.tasks[0]].row.method == "cpl"
        below = "The best classifier is below zero_shot (45.3 %) on the test images, which did not"
        assert text.startswith(below)


# ---------------------------------------------------------------- answers


def test_answers_equal_the_golden_ones() -> None:
    fused = [
        replace(t, by_classifier={"fused": t.labels if t.method == "air" else t.predictions})
        for t in [*quickstart(), *trials("air_ceiling")]
    ]
    on_datasets = [
        trial
        for dataset, better in (("digits", 0.0), ("flowers102", 0.3), ("dtd", -0.3))
        for method in ("cpl", "air", "air_control", "air_ceiling")
        for trial in trials(
            method, dataset=dataset, better=(method != "cpl") * 0.1 + (method == "air") * better
        )
    ]
    values = {8: 0.0, 2: -0.4, 16: 0.1, 4: -0.1, 32: 0.05}  # the default is 16
    of_length = {
        length: trials("cpl", settings={"prompt.length": length}, cell=str(length), better=better)
        for length, better in values.items()
    }
    cases = {
        "a method alone": trials("cpl"),
        "two values of a setting": [*of_length[2], *of_length[8]],
        "five values of a setting": [trial for of in of_length.values() for trial in of],
        "two methods and three values": [
            trial
            for method in ("cpl", "air")
            for length in (2, 8, 16)
            for trial in trials(
                method,
                settings={"prompt.length": length},
                cell=f"{method}-{length}",
                better=length / 100,
            )
        ],
        "a method without a control": [*trials("zero_shot"), *trials("cpl")],
        "the control has no result": [*trials("cpl"), *trials("air")],
        "worse than the host": [*trials("cpl"), *trials("air", better=-0.4)],
        "the control has a result in one of two rows": [
            *(*trials("air"), *trials("air_control")),
            *trials("air", dataset="dtd", cell="dtd"),
        ],
        "air_domain, whose control is air": [
            *trials("cpl"),
            *(replace(trial, method="air_domain", cell="d") for trial in trials("air")),
        ],
        "fused classifiers, of which that of air is always right": fused,
        "three datasets": on_datasets,
    }
    found = {name: "\n".join(answers(results(trials))) for name, trials in cases.items()}
    check_golden_cases("answers.txt", found)


# ---------------------------------------------------------------- definitions and bounds


def test_a_bound_is_never_the_best_and_is_marked_everywhere() -> None:
    found = results([*quickstart(), *trials("air_ceiling")])
    [task] = found.tasks
    assert found.best_classifiers[task].row.method == "air_control"
    assert max(found.rows, key=lambda row: row.mean).method == "air_ceiling"
    text = table(found, "md")
    assert "air_ceiling is a bound: AiR with pool images under their true labels" in one_line(text)
    [best] = [line for line in text.splitlines() if " * " in line and "|" in line]
    assert " air_control " in best
    assert "| air_ceiling (bound) |" in text
    assert "| air_ceiling - cpl (bound) |" in table(found, "md", "fit")


def test_a_caption_names_settings_that_depart_from_the_definition_of_a_method() -> None:
    departing = [
        replace(trial, flat=trial.flat | {"auxiliary.kind": "lda"}) for trial in trials("air")
    ]
    words = "air differs from its definition in auxiliary.kind: lda (prototype)."
    assert words in one_line(table(results(departing), "md"))
    assert words not in one_line(table(results(trials("air")), "md"))
    varied = trials("air", settings={"auxiliary.kind": "lda"})
    assert words not in one_line(table(results(varied), "md"))  # a column shows it


def test_a_second_dataset_changes_no_p_value() -> None:
    one = quickstart()
    both = [*one, *(t for method in QUICKSTART for t in trials(method, dataset="eurosat"))]
    alone = {(c.row.method, c.role): c.p_corrected for c in results(one).comparisons}
    beside = [c for c in results(both).comparisons if c.row.task[0] != "eurosat"]
    assert {(c.row.method, c.role): c.p_corrected for c in beside} == alone
    assert "in each dataset, paradigm and modality over up to 4" in one_line(
        table(results(both), "md")
    )
