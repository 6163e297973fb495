"""Files of published numbers, and verdicts of rows against papers and other sweeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air_core.datasets import DATASETS
from air_core.datasets.published import PUBLISHED
from air_core.methods import METHODS
from orchestrator.reporting import Results
from orchestrator.reporting.published import (
    PAPERS,
    ReferenceComparison,
    RowVerdict,
    compare_with_paper,
    compare_with_sweep,
    find_paper,
    screen,
)
from orchestrator.reporting.rows import FinishedTrial
from orchestrator.spec import SpecError
from tests.helpers.golden import check_golden_cases, check_refusals
from tests.helpers.outcomes import ACCURACIES, SWEEP, by_method, record_sweep
from tests.helpers.trials import quickstart, results, trials

SHIPPED = sorted(file.stem for file in PAPERS.glob("*.yaml"))

PAPER = """\
version: 1
name: mine
source: a note of mine
protocol: {backbone: ViT-B-32/openai, seeds: 3, test_images: {flowers102: 300}, class_seed: 500}
accuracy:
  text:
    ul:
      cpl: {flowers102: 63.0, digits: {value: 63, verified: false, note: from a talk}}
      air: {flowers102: 80}
"""


def paper_of(folder: Path, text: str = PAPER) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def runs_of(method: str, dataset: str = "flowers102", **more: Any) -> list[FinishedTrial]:
    """Trials with the backbone of the paper, ViT-B/32."""
    found = trials(method, dataset=dataset, **more)
    for trial in found:
        trial.flat["backbone"] = "ViT-B-32/openai"
    return found


def compared(finished: list[FinishedTrial], paper: Path | str) -> ReferenceComparison:
    return compare_with_paper(results(finished), find_paper(str(paper)))


def one_row(method: str, paper: Path, **change: Any) -> ReferenceComparison:
    """A row with changed fields, compared with a paper."""
    finished = runs_of(method)
    (row,) = results(finished).rows
    return compare_with_paper(Results([replace(row, **change)], finished), find_paper(str(paper)))


# ---------------------------------------------------------------- paper files


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_paper_is_consistent(name: str) -> None:
    paper = find_paper(name)
    assert paper.name == name
    assert re.search(r"arXiv:\d{4}\.\d{5}", paper.source)
    assert "ViT-B-32/openai" in paper.protocol.backbone
    for dataset, _, _, method in paper.cells:
        assert dataset in paper.protocol.test_images
        assert dataset in DATASETS or dataset == "mnist"
        assert method in METHODS or method == "upt"
    for dataset, images in paper.protocol.test_images.items():
        if dataset in PUBLISHED:
            assert PUBLISHED[dataset].parts["test"] == images
    for gain in paper.gains:
        assert {gain.method, gain.over} <= METHODS.keys()
        assert set(gain.datasets) <= DATASETS.keys()


def test_papers_agree_on_common_numbers() -> None:
    """CPL's table repeats GRIP's numbers with one more digit."""
    grip, both = find_paper("grip").cells, 0
    for key, cell in find_paper("cpl").cells.items():
        if key in grip and key[-1] in ("grip", "zero_shot"):
            assert cell.value == pytest.approx(grip[key].value, abs=0.00051)
            both += 1
    assert both == 30


def test_unverified_numbers_are_marked() -> None:
    verified = {}
    for name in SHIPPED:
        paper = find_paper(name)
        verified[name] = {paper.is_verified(cell) for cell in paper.cells.values()}
    assert verified == {"grip": {True}, "air-cvpr2025": {False}, "cpl": {True, False}}


def test_errors_in_a_paper_file_equal_the_golden_messages(tmp_path) -> None:
    accuracy = PAPER[PAPER.index("accuracy") :]
    wrong = {
        "no protocol": re.sub("protocol:.*\n", "", PAPER),
        "accuracy: 163": PAPER.replace("63.0,", "163,"),
        "uls": PAPER.replace("    ul:", "    uls:"),
        "no numbers": PAPER.replace(accuracy, ""),
        "an empty file": "",
    }
    found = {}
    for case, text in wrong.items():
        with pytest.raises(SpecError) as problem:
            find_paper(str(paper_of(tmp_path, text)))
        found[case] = str(problem.value).replace(f"{tmp_path}/", "")
    check_golden_cases("messages/paper_file.txt", found)


# ---------------------------------------------------------------- comparison with a paper


def only(found: ReferenceComparison) -> RowVerdict:
    (cell,) = found.cells
    return cell


def test_a_number_in_a_narrow_interval_is_reproduced(tmp_path) -> None:
    cell = only(compared(runs_of("cpl"), paper_of(tmp_path)))
    mean, low, high = cell.ours
    assert low < 0.63 < high
    assert high - low > 0.05
    assert cell.verdict == "within interval"
    assert cell.difference == pytest.approx((mean - 0.63, low - 0.63, high - 0.63))
    narrow = one_row("cpl", paper_of(tmp_path), low=0.62, high=0.64)
    assert only(narrow).verdict == "reproduced"


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.5, 0.6, "lower"), (0.7, 0.8, "higher")])
def test_a_number_outside_the_interval_is_lower_or_higher_and_lower_gates(
    tmp_path, low: float, high: float, verdict: str
) -> None:
    change = {"low": low, "high": high, "mean": (low + high) / 2}
    found = one_row("cpl", paper_of(tmp_path), **change)
    assert only(found).verdict == verdict
    assert found.has_regression == (verdict == "lower")
    unverified = paper_of(tmp_path, PAPER.replace("name: mine", "name: mine\nverified: false"))
    found = one_row("cpl", unverified, **change)
    assert only(found).verdict == verdict
    assert not found.has_regression


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "tiny"}, "backbone is tiny, in the reference ViT-B-32/openai"),
        ({"seeds": 2}, "2 of 3 seeds"),
        ({"splits": 0}, "0 of 1 splits"),
        ({"leaky_pool": True}, "leaky_pool is true, in the reference false"),
        ({"whole_pool": False}, "the sweep shrinks or unbalances the pool"),
        ({"class_seed": 7}, "class_seed is 7, in the reference 500"),
        ({}, "test images is 540, in the reference 300"),
    ],
)
def test_rows_with_another_protocol_are_not_comparable(
    tmp_path, change: dict[str, Any], words: str
) -> None:
    paper = paper_of(tmp_path)
    (row,) = results(runs_of("air")).rows  # far below 80: lower, were it comparable
    assert one_row("air", paper).has_regression
    other: dict[str, Any] = (
        {"protocol": replace(row.protocol, **change)} if change else {"n_test": 540}
    )
    found = one_row("air", paper, **other)
    cell = only(found)
    assert (cell.verdict, list(cell.reasons)) == ("not comparable", [words])
    assert cell.difference is None
    assert not found.has_regression


GAIN = """
gains:
  - method: air
    over: cpl
    modality: text
    paradigm: ul
    datasets: [flowers102, dtd]
    points: [4, 6]
"""


def test_a_gain_is_compared_as_mean_over_all_its_datasets(tmp_path) -> None:
    file = paper_of(tmp_path, PAPER[: PAPER.index("accuracy")] + GAIN.lstrip())
    finished = [e for d in ("flowers102", "dtd") for m in ("cpl", "air") for e in runs_of(m, d)]
    (gain,) = compared(finished, file).gains
    means = {(row.dataset, row.method): row.mean for row in results(finished).rows}
    ours = np.mean([means[d, "air"] - means[d, "cpl"] for d in ("flowers102", "dtd")])
    assert gain.ours[0] == pytest.approx(ours)
    assert gain.verdict == "reproduced"  # 4.9 of 4 to 6
    (alone,) = compared(finished[: len(finished) // 2], file).gains
    assert (alone.verdict, alone.reasons) == ("not comparable", ["no air on dtd"])
    missed = paper_of(tmp_path, file.read_text().replace("[4, 6]", "12"))
    assert compared(finished, missed).has_regression


# ---------------------------------------------------------------- comparison with a sweep


def between(a: list[FinishedTrial], b: list[FinishedTrial]) -> ReferenceComparison:
    return compare_with_sweep(results(a), results(b), "other")


def test_rows_with_another_backbone_are_not_comparable() -> None:
    def with_backbone(name: str, digest: str) -> list[FinishedTrial]:
        return [
            replace(e, flat={**e.flat, "backbone": name}, digests={"backbone": digest})
            for e in trials("cpl", better=-0.3 if name != "a" else 0.0)
        ]

    for name, digest, words in (
        ("b", "2", "backbone is b, in the reference a"),
        ("a", "2", "backbone has other content in the reference"),
    ):
        found = between(with_backbone(name, digest), with_backbone("a", "1"))
        assert (only(found).verdict, only(found).reasons) == ("not comparable", [words])
        assert not found.has_regression
    renamed = between(with_backbone("b", "1"), with_backbone("a", "1"))  # equal content
    assert only(renamed).verdict == "lower"


def test_rows_are_comparable_if_their_pools_are_reduced_alike() -> None:
    def with_pool(size: int | None, **more: Any) -> list[FinishedTrial]:
        return [replace(e, flat={**e.flat, "pool_size": size}) for e in trials("cpl", **more)]

    found = only(between(with_pool(80, seeds=(1, 2)), with_pool(80)))
    assert found.difference == (0, 0, 0)
    assert found.reasons == ["the difference is over the splits and seeds that both sweeps have"]
    for other, text in ((40, "40"), (None, "null")):
        found = only(between(with_pool(80), with_pool(other)))
        assert found.reasons == [f"pool_size is 80, in the reference {text}"]


def test_rows_without_common_runs_are_not_comparable() -> None:
    found = between(trials("cpl", seeds=(1, 2, 3)), trials("cpl", seeds=(4, 5, 6)))
    assert only(found).reasons == ["no split and seed in common"]


def test_rows_with_several_counterparts_are_not_comparable() -> None:
    def at(length: int) -> list[FinishedTrial]:
        return trials("cpl", settings={"prompt.length": length}, cell=str(length))

    found = between(trials("cpl"), at(4) + at(16))
    assert only(found).reasons == ["the reference has 2 such rows, which differ in prompt.length"]
    found = between(at(4), at(4) + at(16))
    assert only(found).verdict == "reproduced"
    assert found.missing == ["digits ul text cpl prompt.length 16"]


def test_differences_over_too_few_runs_are_no_regression() -> None:
    found = between(trials("cpl", seeds=(1, 2), better=-0.3), trials("cpl", seeds=(1, 2)))
    assert only(found).verdict == "within interval"
    assert "2 seeds are too few" in only(found).reasons[0]
    assert not found.has_regression


# ---------------------------------------------------------------- the screen and the command


def test_the_screen_fits_80_columns_and_lists_each_reason_once() -> None:
    finished = [
        trial
        for images in (10, 120)
        for trial in runs_of("air", settings={"images_per_class": images}, cell=f"{images}")
    ]
    for found in (compared(quickstart(), "air-cvpr2025"), compared(finished, "air-cvpr2025")):
        shown = list(screen(found))
        assert max(map(len, shown)) <= 80
        body = "\n".join(shown)
        for reason in {reason for cell in found.cells for reason in cell.reasons}:
            assert len(re.findall(rf"^\[\d+\] {re.escape(reason)}$", body, re.M)) == 1


@pytest.fixture
def run_compare(tmp_path, command):
    """Runs `airsweep compare` on a store with the sweeps `old` and `new`, in which cpl is worse."""
    record_sweep(tmp_path, "old", SWEEP, by_method(ACCURACIES))
    changed = SWEEP.replace("train.steps: 2", "train.steps: 3")
    record_sweep(tmp_path, "new", changed, by_method({**ACCURACIES, "cpl": 0.5}))
    record_sweep(
        tmp_path, "half", SWEEP.replace(": 2", ": 4"), by_method(ACCURACIES), lambda i: i < 4
    )
    none = SWEEP.replace(": 2", ": 5").replace("zero_shot", "grip")  # shares no trial
    record_sweep(tmp_path, "none", none, by_method(ACCURACIES), lambda i: False)

    def run(*words: str) -> tuple[int, str, str]:
        return command("compare", *words, "--store", tmp_path)

    return run


def test_without_a_sweep_papers_and_sweeps_are_listed(run_compare) -> None:
    code, out, _ = run_compare()
    assert code == 0
    for line in ("  grip          GRIP, NeurIPS 2023", "  default/new"):
        assert line in out.splitlines()


def test_a_regression_against_another_sweep_ends_with_5(run_compare) -> None:
    code, out, _err = run_compare("new", "--against", "old", "--fail-on", "regress")
    assert code == 5
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^cpl .*lower$", out, re.M)
    assert run_compare("new", "--against", "default/old")[0] == 0  # without --fail-on
    assert run_compare("old", "--against", "new", "--fail-on", "regress")[0] == 0  # higher
    code, out, _ = run_compare("new", "--against", "old", "--json")
    found = json.loads(out)
    assert (found["sweep"], found["trials"], found["regressed"]) == (
        "new",
        {"done": 9, "total": 9},
        True,
    )
    assert [cell["verdict"] for cell in found["cells"]] == ["reproduced", "reproduced", "lower"]


def test_the_digits_are_not_comparable_with_a_paper(run_compare) -> None:
    code, out, err = run_compare("old", "--paper", "grip", "--fail-on", "regress")
    assert (code, err) == (0, "")
    assert "GRIP, NeurIPS 2023" in out
    assert "3 not comparable." in out


def test_a_user_paper_file_gates(run_compare, tmp_path) -> None:
    text = PAPER.replace("ViT-B-32/openai", "tiny").replace("flowers102: 300", "digits: 400")
    file = paper_of(tmp_path, text.replace("{value: 63, verified: false, note: from a talk}", "95"))
    assert run_compare("old", "--paper", str(file), "--fail-on", "regress")[0] == 5
    file.write_text(file.read_text().replace("digits: 95", "digits: {value: 95, verified: false}"))
    code, out, _ = run_compare("old", "--paper", str(file), "--fail-on", "regress")
    assert code == 0
    assert "lower, unverified" in out


def test_an_unfinished_sweep_is_compared_by_its_finished_trials(run_compare) -> None:
    code, out, err = run_compare("half", "--against", "old")
    assert code == 0
    assert "4 of 9 trials of half have a result" in err
    assert "4 of 9 trials" in out


def test_bad_input_equals_the_golden_messages(run_compare, tmp_path) -> None:
    check_refusals(
        "messages/compare.txt",
        run_compare,
        ("old", "--paper", "grip", "--against", "new"),
        ("old", "--paper", "nope"),
        ("old", "--paper", "papers/none.yaml"),
        ("old", "--paper", "grip", "--fail-on", "red"),
        ("gone", "--paper", "grip"),
        ("old", "--against", "none"),
        store=tmp_path,
    )
