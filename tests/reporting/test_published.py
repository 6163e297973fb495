"""Published numbers as data, and verdicts that never compare what differs."""

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
from orchestrator.reporting import Results
from orchestrator.reporting.published import (
    PAPERS,
    Judged,
    Judgement,
    beside_paper,
    beside_sweep,
    find_paper,
    lines,
    read_paper,
)
from orchestrator.reporting.rows import Entry
from orchestrator.spec import SpecError
from orchestrator.spec.presets import METHODS
from tests.helpers.outcomes import by_method, command, recorded
from tests.reporting.test_rows import quickstart, results, trials

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


def runs_of(method: str, dataset: str = "flowers102", **more: Any) -> list[Entry]:
    """Runs as a paper has them: ViT-B/32, the published test images."""
    found = trials(method, dataset=dataset, **more)
    for entry in found:
        entry.flat["backbone"] = "ViT-B-32/openai"
    return found


def judged(entries: list[Entry], paper: Path | str) -> Judgement:
    return beside_paper(results(entries), find_paper(str(paper)))


def one_row(method: str, paper: Path, **change: Any) -> Judgement:
    """A row that was changed, beside a paper."""
    entries = runs_of(method)
    (row,) = results(entries).rows
    return beside_paper(Results([replace(row, **change)], entries), find_paper(str(paper)))


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize("name", SHIPPED)
def test_every_paper_that_ships_is_whole(name: str) -> None:
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


def test_the_papers_agree_where_they_print_the_same_runs() -> None:
    """CPL's table repeats GRIP's, with one digit more."""
    grip, both = find_paper("grip").cells, 0
    for place, cell in find_paper("cpl").cells.items():
        if place in grip and place[-1] in ("grip", "zero_shot"):
            assert cell.value == pytest.approx(grip[place].value, abs=0.00051)
            both += 1
    assert both == 30


def test_unverified_numbers_are_marked() -> None:
    verified = {}
    for name in SHIPPED:
        paper = find_paper(name)
        verified[name] = {paper.is_verified(cell) for cell in paper.cells.values()}
    assert verified == {"grip": {True}, "air-cvpr2025": {False}, "cpl": {True, False}}


def test_an_unknown_paper_names_those_that_are_there() -> None:
    with pytest.raises(SpecError, match=r"grap: no such paper; allowed: air-cvpr2025, cpl, grip"):
        find_paper("grap")
    with pytest.raises(SpecError, match="no such file"):
        find_paper("papers/none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        (re.search("protocol:.*\n", PAPER)[0], "", "1:1", "`protocol` is missing"),  # type: ignore[index]
        ("63.0,", "163,", "8:25", "163 is not allowed; allowed: 0 to 100, in %"),
        (
            "    ul:",
            "    uls:",
            "7:5",
            "unknown key; allowed: ul, ssl, trzsl; did you mean ul?",
        ),
        (PAPER[PAPER.index("accuracy") :], "", "1:1", "no number"),
        (PAPER, "", "", "empty; a file of published numbers starts with"),
    ],
)
def test_a_wrong_paper_file_says_where(tmp_path, old, new, place, words) -> None:
    file = paper_of(tmp_path, PAPER.replace(old, new))
    with pytest.raises(SpecError) as problem:
        read_paper(file)
    message = str(problem.value)
    assert message.startswith(f"{file}:{place}" if place else str(file))
    assert words in message
    assert "\n" not in message


# ---------------------------------------------------------------- beside a paper


def only(found: Judgement) -> Judged:
    (cell,) = found.cells
    return cell


def test_a_number_in_the_interval_is_reproduced_where_that_is_narrow(tmp_path) -> None:
    cell = only(judged(runs_of("cpl"), paper_of(tmp_path)))
    assert cell.ours is not None
    mean, low, high = cell.ours
    assert low < 0.63 < high
    assert high - low > 0.05
    assert cell.verdict == "within interval"
    assert cell.difference == pytest.approx((mean - 0.63, low - 0.63, high - 0.63))
    narrow = one_row("cpl", paper_of(tmp_path), low=0.62, high=0.64)
    assert only(narrow).verdict == "reproduced"


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.5, 0.6, "lower"), (0.7, 0.8, "higher")])
def test_a_number_beside_the_interval_is_missed_and_lower_gates(
    tmp_path, low: float, high: float, verdict: str
) -> None:
    change = {"low": low, "high": high, "mean": (low + high) / 2}
    found = one_row("cpl", paper_of(tmp_path), **change)
    assert only(found).verdict == verdict
    assert found.regressed == (verdict == "lower")
    unverified = paper_of(tmp_path, PAPER.replace("name: mine", "name: mine\nverified: false"))
    found = one_row("cpl", unverified, **change)
    assert only(found).verdict == verdict
    assert not found.regressed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "tiny"}, "backbone tiny, there ViT-B-32/openai"),
        ({"seeds": 2}, "2 of 3 seeds"),
        ({"splits": 0}, "0 of 1 splits"),
        ({"leaky_pool": True}, "leaky_pool true, there false"),
        ({"whole_pool": False}, "the pool was made smaller or imbalanced"),
        ({"class_seed": 7}, "class_seed 7, there 500"),
        ({}, "test images 540, there 300"),
    ],
)
def test_another_protocol_is_never_compared(tmp_path, change: dict[str, Any], words: str) -> None:
    paper = paper_of(tmp_path)
    (row,) = results(runs_of("air")).rows  # far below 80, would be lower
    assert one_row("air", paper).regressed
    other: dict[str, Any] = (
        {"protocol": replace(row.protocol, **change)} if change else {"n_test": 540}
    )
    found = one_row("air", paper, **other)
    cell = only(found)
    assert (cell.verdict, list(cell.reasons)) == ("not comparable", [words])
    assert cell.difference is None
    assert not found.regressed


GAIN = """
gains:
  - method: air
    over: cpl
    modality: text
    paradigm: ul
    datasets: [flowers102, dtd]
    points: [4, 6]
"""


def test_a_gain_is_the_mean_over_all_of_its_datasets(tmp_path) -> None:
    file = paper_of(tmp_path, PAPER[: PAPER.index("accuracy")] + GAIN.lstrip())
    entries = [e for d in ("flowers102", "dtd") for m in ("cpl", "air") for e in runs_of(m, d)]
    (gain,) = judged(entries, file).gains
    means = {(row.dataset, row.method): row.mean for row in results(entries).rows}
    ours = np.mean([means[d, "air"] - means[d, "cpl"] for d in ("flowers102", "dtd")])
    assert gain.ours is not None
    assert gain.ours[0] == pytest.approx(ours)
    assert gain.verdict == "reproduced"  # 4.9 of 4 to 6
    (alone,) = judged(entries[: len(entries) // 2], file).gains
    assert (alone.verdict, alone.reasons) == ("not comparable", ["no air on dtd"])
    missed = paper_of(tmp_path, file.read_text().replace("[4, 6]", "12"))
    assert judged(entries, missed).regressed


# ---------------------------------------------------------------- beside a sweep


def beside(a: list[Entry], b: list[Entry]) -> Judgement:
    return beside_sweep(results(a), results(b), "other")


def test_what_differs_between_sweeps_is_never_compared() -> None:
    def with_backbone(name: str, digest: str) -> list[Entry]:
        return [
            replace(e, flat={**e.flat, "backbone": name}, digests={"backbone": digest})
            for e in trials("cpl", better=-0.3 if name != "a" else 0.0)
        ]

    for name, digest, words in (
        ("b", "2", "backbone b, there a"),
        ("a", "2", "backbone of other content there"),
    ):
        found = beside(with_backbone(name, digest), with_backbone("a", "1"))
        assert (only(found).verdict, only(found).reasons) == ("not comparable", [words])
        assert not found.regressed
    moved = beside(with_backbone("b", "1"), with_backbone("a", "1"))  # the same under another name
    assert only(moved).verdict == "lower"


def test_runs_that_share_no_split_and_seed_are_not_compared() -> None:
    found = beside(trials("cpl", seeds=(1, 2, 3)), trials("cpl", seeds=(4, 5, 6)))
    assert only(found).reasons == ["no split and seed in common"]


def test_settings_are_never_averaged() -> None:
    def at(length: int) -> list[Entry]:
        return trials("cpl", settings={"prompt.length": length}, cell=str(length))

    found = beside(trials("cpl"), at(4) + at(16))
    assert only(found).reasons == ["2 rows there, which differ in prompt.length"]
    found = beside(at(4), at(4) + at(16))
    assert only(found).verdict == "reproduced"
    assert found.missing == ["digits ul text cpl prompt.length 16"]


def test_too_few_runs_regress_nothing() -> None:
    found = beside(trials("cpl", seeds=(1, 2), better=-0.3), trials("cpl", seeds=(1, 2)))
    assert only(found).verdict == "within interval"
    assert "2 seeds are too few" in only(found).reasons[0]
    assert not found.regressed


# ---------------------------------------------------------------- the screen and the command


def test_the_screen_fits_80_columns_and_says_each_reason_once() -> None:
    entries = [
        entry
        for images in (10, 120)
        for entry in runs_of("air", settings={"images_per_class": images}, cell=f"{images}")
    ]
    for found in (judged(quickstart(), "air-cvpr2025"), judged(entries, "air-cvpr2025")):
        shown = list(lines(found))
        assert max(map(len, shown)) <= 80
        body = "\n".join(shown)
        for reason in {reason for cell in found.cells for reason in cell.reasons}:
            assert len(re.findall(rf"^\[\d+\] {re.escape(reason)}$", body, re.M)) == 1


SWEEP = """
grid: {method: [zero_shot, fpl, cpl]}
fixed: {dataset: digits, train.steps: 2}
seeds: [1, 2, 3]
"""
ACCURACIES = {"zero_shot": 0.5, "fpl": 0.62, "cpl": 0.7}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """`airsweep compare ...` on a store with the sweeps `old` and `new`, where cpl got worse."""
    recorded(tmp_path, "old", SWEEP, by_method(ACCURACIES))
    changed = SWEEP.replace("train.steps: 2", "train.steps: 3")
    recorded(tmp_path, "new", changed, by_method({**ACCURACIES, "cpl": 0.5}))
    recorded(tmp_path, "half", SWEEP.replace(": 2", ": 4"), by_method(ACCURACIES), lambda i: i < 4)
    none = SWEEP.replace(": 2", ": 5").replace("zero_shot", "grip")  # shares no trial
    recorded(tmp_path, "none", none, by_method(ACCURACIES), lambda i: False)

    def run(*words: str) -> tuple[int, str, str]:
        return command(monkeypatch, capsys, "compare", *words, "--store", str(tmp_path))

    return run


def test_a_regression_against_an_older_sweep_ends_with_5(said, tmp_path) -> None:
    code, out, _err = said("new", "--against", "old", "--fail-on", "regress")
    assert code == 5
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^cpl .*lower$", out, re.M)
    assert said("new", "--against", "default/old")[0] == 0  # nobody asked for a gate
    assert said("old", "--against", "new", "--fail-on", "regress")[0] == 0  # higher
    code, out, _ = said("new", "--against", "old", "--json")
    found = json.loads(out)
    assert (found["sweep"], found["trials"], found["regressed"]) == (
        "new",
        {"done": 9, "total": 9},
        True,
    )
    assert [cell["verdict"] for cell in found["cells"]] == ["reproduced", "reproduced", "lower"]


def test_a_paper_is_named_and_nothing_of_the_digits_is_in_it(said) -> None:
    code, out, err = said("old", "--paper", "grip", "--fail-on", "regress")
    assert (code, err) == (0, "")
    assert "GRIP, NeurIPS 2023" in out
    assert "3 not comparable." in out


def test_a_paper_file_of_ones_own_gates(said, tmp_path) -> None:
    text = PAPER.replace("ViT-B-32/openai", "tiny").replace("flowers102: 300", "digits: 400")
    file = paper_of(tmp_path, text.replace("{value: 63, verified: false, note: from a talk}", "95"))
    assert said("old", "--paper", str(file), "--fail-on", "regress")[0] == 5
    file.write_text(file.read_text().replace("digits: 95", "digits: {value: 95, verified: false}"))
    code, out, _ = said("old", "--paper", str(file), "--fail-on", "regress")
    assert code == 0
    assert "lower, unverified" in out


def test_a_half_finished_sweep_is_compared_as_far_as_it_is(said) -> None:
    code, out, err = said("half", "--against", "old")
    assert code == 0
    assert "4 of 9 trials of half are done" in err
    assert "4 of 9 trials" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("old", "--paper", "grip", "--against", "new"), "either --paper NAME or --against OTHER"),
        (("old", "--paper", "nope"), "--paper nope: no such paper; allowed: air-cvpr2025, cpl, "),
        (("old", "--paper", "grip", "--fail-on", "red"), "unknown --fail-on 'red'"),
        (("gone", "--paper", "grip"), "no sweep default/gone in"),
        (("old", "--against", "none"), "none of the 9 trials of none has finished"),
        (("old", "--against", "table.json"), "JSON tables are no longer supported; give"),
    ],
)
def test_bad_input_is_one_sentence_and_2(said, words, message) -> None:
    code, out, err = said(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
