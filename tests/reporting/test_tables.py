"""Tables with keys down and across, and LaTeX that compiles."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pandas import DataFrame

from orchestrator.reporting import tables
from orchestrator.reporting._layouts import Layout, escape_latex, latex
from orchestrator.reporting.rows import FinishedTrial
from orchestrator.reporting.summary import summary
from orchestrator.reporting.tables import gains_frame, pivot, table
from orchestrator.reporting.tables import pivot_text as text
from tests.helpers.golden import check_golden_cases
from tests.helpers.outcomes import ACCURACIES, SWEEP, by_method, record_sweep
from tests.helpers.trials import cells, one_line, quickstart, results, trials


def two_tasks() -> list[FinishedTrial]:
    """Two datasets; AiR improves on its host on the first only."""
    return [
        trial
        for dataset, better in (("digits", 0.0), ("flowers102", -0.1))
        for method in ("zero_shot", "cpl", "air")
        for trial in trials(method, dataset=dataset, better=better if method == "air" else 0.0)
    ]


def counts() -> list[FinishedTrial]:
    """A host, and AiR with three values of images_per_class."""
    return trials("cpl") + [
        trial
        for images, better in ((10, -0.03), (40, 0.02), (120, 0.1))
        for trial in trials(
            "air", settings={"images_per_class": images}, cell=f"air-{images}", better=better
        )
    ]


def arranged(finished: list[FinishedTrial], **how: Any):
    return pivot(results(finished), **how)


def test_the_frame_of_gains_has_intervals_of_tested_gains_only() -> None:
    tested = gains_frame(results(quickstart())).set_index("method")["host_low"]
    assert tested.drop("zero_shot").notna().all()
    few = [trial for trial in quickstart() if trial.seed < 3]
    assert gains_frame(results(few))["host_low"].isna().all()


def test_an_entry_makes_a_column_of_every_output_of_the_table(monkeypatch) -> None:
    entry = tables.Column("pool", "pool/accuracy_fused", note="Pool: accuracy on the pool.")
    monkeypatch.setattr(tables, "COLUMNS", (*tables.COLUMNS, entry))
    metrics = {"pool/accuracy_fused": 0.123}
    found = results([replace(trial, metrics=trial.metrics | metrics) for trial in trials("air")])
    header, _, line = cells(table(found, "md"))
    assert line[header.index("pool")] == "12.3"
    for shown in (table(found, "md"), table(found, "latex")):
        assert "Pool: accuracy on the pool." in one_line(shown)
    assert " 12.3\n" in summary("s", found, [])
    [from_csv] = csv.DictReader(io.StringIO(table(found, "csv")))
    [from_json] = json.loads(table(found, "json"))
    for row in (from_json, from_csv, gains_frame(found).iloc[0]):
        assert float(row["pool"]) == pytest.approx(0.123)
    assert "pool" not in table(results(quickstart()), "md")


def test_methods_are_lines_and_datasets_are_columns() -> None:
    header, _, *lines = cells(
        text(arranged(two_tasks(), down=["method"], across=["dataset"]), "md")
    )
    assert header == ["method", "digits", "flowers102"]
    assert [line[0] for line in lines] == ["zero_shot", "cpl", "air"]
    by_cell = {(row.method, row.dataset): row for row in results(two_tasks()).rows}
    for line in lines:
        for column, cell in zip(header[1:], line[1:], strict=True):
            row = by_cell[line[0], column]
            assert f"{100 * row.mean:.1f}" in cell
            assert row.std is None or f"± {100 * row.std:.1f}" in cell


def test_the_best_cell_of_a_column_is_bold_and_significant_cells_have_marks() -> None:
    _, _, zero_shot, cpl, air = cells(text(arranged(two_tasks()), "md"))
    assert [c.startswith("**") for c in air] == [False, True, False]
    assert [c.startswith("**") for c in cpl] == [False, False, True]
    assert re.fullmatch(r"\*\*68\.0 ± 0\.6†\*\*", air[1])
    assert air[2].endswith("†↓")
    assert not any("†" in c for c in zero_shot)


def test_a_varied_setting_can_be_across() -> None:
    found = arranged(counts(), down=["method"], across=["images_per_class"])
    header, _, cpl, air = cells(text(found, "md"))
    assert header == ["method", *(f"images_per_class {n}" for n in ("–", 10, 40, 120))]  # noqa: RUF001
    assert cpl[2:] == ["", "", ""]
    assert air[1] == ""
    assert "**" not in cpl[1]  # the only cell of its column
    tex = text(found, "latex")
    assert "\\multicolumn{4}{c}{images\\_per\\_class} \\\\" in tex


def test_two_keys_across_have_two_header_lines() -> None:
    finished = [
        trial
        for length in (4, 16)
        for dataset in ("digits", "flowers102")
        for trial in trials(
            "cpl", dataset=dataset, settings={"prompt.length": length}, cell=f"{dataset}-{length}"
        )
    ]
    found = arranged(finished, across=["dataset", "prompt.length"])
    assert cells(text(found, "md"))[0] == [
        *("method", "digits 4", "digits 16", "flowers102 4", "flowers102 16")
    ]
    assert "\\multicolumn{2}{c}{digits} & \\multicolumn{2}{c}{flowers102}" in text(found, "latex")


def test_errors_of_impossible_arrangements_equal_the_golden_messages() -> None:
    found = {}
    for how in (
        {"down": ["metod"]},
        {"across": []},
        {"down": ["method"], "across": ["method"]},
        {"down": ["method", "method"]},
        {"down": ["method"], "across": ["dataset"]},
        {"metric": "fusd"},
        {"metric": "unseen"},
    ):
        with pytest.raises(ValueError, match="--") as problem:
            arranged(counts(), **how)
        found[str(how)] = str(problem.value)
    check_golden_cases("messages/table.txt", found)


def test_metrics_other_than_accuracy_have_no_marks() -> None:
    found = arranged(quickstart(), metric="fused")
    _, _, *lines = cells(text(found, "md"))
    assert [line[0] for line in lines] == [
        "air",
        "air_control",
    ]  # the others have no auxiliary classifier
    assert lines[0][1].startswith("**76.0 ± ")
    assert "†" not in text(found, "md")
    assert "No difference is tested" in " ".join(found.caption)
    assert "text and auxiliary classifier combined" in found.caption[0]
    other = arranged(quickstart(), metric="test/accuracy_fused")
    assert other.cells["mean"].tolist() == found.cells["mean"].tolist()


def test_json_and_csv_of_a_pivot_have_all_numbers() -> None:
    found = arranged(two_tasks())
    content = json.loads(text(found, "json"))
    assert (content["rows"], content["cols"], content["metric"]) == (
        ["method"],
        ["dataset"],
        "accuracy",
    )
    assert len(content["cells"]) == 6
    air = content["cells"][-1]
    assert (air["method"], air["dataset"], air["told_from"]) == ("air", "flowers102", ["host-"])
    assert air["low"] <= air["mean"] <= air["high"]
    lines = list(csv.DictReader(io.StringIO(text(found, "csv"))))
    assert list(lines[0]) == [
        *("method", "digits", "digits std", "digits told_from"),
        *("flowers102", "flowers102 std", "flowers102 told_from"),
    ]
    assert float(lines[2]["flowers102"]) == air["mean"]
    assert lines[2]["flowers102 told_from"] == "host-"
    assert lines[0]["digits std"] == ""  # one run


def test_control_characters_and_formulas_are_escaped_in_csv() -> None:
    finished = trials("cpl", dataset="folder:/a\x1b[2J\nb", settings={"lora.caption": "=1+1"})
    assert ",'=1+1," in table(results(finished), "csv")
    for down, across in (("dataset", "method"), ("method", "dataset")):
        csv_text = text(arranged(finished, down=[down], across=[across]), "csv")
        assert r"folder:/a\u001b[2J\u000ab" in csv_text
        assert "\x1b" not in csv_text


# ---------------------------------------------------------------- LaTeX

NASTY = r"""50% of #1 & $2_3^4 {a} ~ \n <b> "q" |x| [y] *z* a--b -3 naïve ŁĘ 花 → × − – ± 1e-3"""  # noqa: RUF001


def test_latex_commands_in_a_name_are_escaped() -> None:
    found = escape_latex(NASTY)
    bare = re.sub(r"\$[^$]*\$|\\[a-z]+\{\}|\{[\[\]*]?\}|\\.", "", found)
    assert not re.search(r"[%#&$_^{}~\\\[\]*]", bare)
    assert "U+82B1" in found
    assert "1e-3" in found
    assert "a-{}-b" in found
    assert "$-$3" in found


def layout_of(lines: list[list[str]]) -> Layout:
    frame = DataFrame(lines, columns=["a", "b"])
    return Layout(frame=frame, bold=frozenset({(0, 1)}), caption=["Caption."])


def test_a_wide_table_is_scaled_to_the_page() -> None:
    assert "resizebox" not in latex(layout_of([["short", "1"]]))
    wide = latex(layout_of([["x" * 80, "y" * 30]]))
    assert "\\resizebox{\\textwidth}{!}" in wide
    assert "graphicx" in wide


def document(*tables: str) -> str:
    packages = (
        "\\usepackage[T1]{fontenc}\n\\usepackage{booktabs}\n\\usepackage{graphicx}\n"
        "\\usepackage[margin=2.5cm]{geometry}"
    )
    body = "\n\n".join(tables)
    return (
        f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )


@pytest.mark.integration
def test_the_latex_of_every_kind_of_table_compiles(tmp_path: Path) -> None:
    engine = shutil.which("tectonic") or shutil.which("pdflatex")
    if engine is None:
        pytest.skip("no pdflatex and no tectonic: apt-get install texlive-latex-recommended")
    nasty = trials("cpl", settings={"lora.caption": NASTY}, cell="a")
    nasty += trials("cpl", settings={"lora.caption": "[y] first in its row"}, cell="b")
    tables = [
        table(results(quickstart()), "latex"),
        text(arranged(two_tasks()), "latex"),
        text(arranged(counts(), down=["method"], across=["images_per_class"]), "latex"),
        text(arranged(quickstart(), metric="pseudo-labels"), "latex"),
        table(results(nasty), "latex"),
        text(arranged(nasty, down=["lora.caption"], across=["method"]), "latex"),
    ]
    (tmp_path / "tables.tex").write_text(document(*tables), encoding="utf-8")
    flags = [] if "tectonic" in engine else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(
        [engine, *flags, "tables.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000
    overfull = re.findall(r"Overfull \\hbox \((\d+)\.", done.stdout)
    assert all(int(points) < 20 for points in overfull), done.stdout[-2000:]


# ---------------------------------------------------------------- the command


def test_the_command_table_arranges_a_recorded_sweep(tmp_path, command) -> None:
    record_sweep(tmp_path, "small", SWEEP, by_method(ACCURACIES))

    def airsweep_table(*words: str) -> tuple[int, str, str]:
        return command("table", "small", "--store", tmp_path, *words)

    code, out, _ = airsweep_table("--rows", "method", "--cols", "dataset", "--format", "md")
    assert code == 0
    header, _, *lines = cells(out)
    assert (header, [line[0] for line in lines]) == (["method", "digits"], list(ACCURACIES))
    assert re.fullmatch(r"\*\*6\d\.\d ± \d\.\d†\*\*", lines[2][1])
    code, out, err = airsweep_table("--rows", "nothing")
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = airsweep_table("--columns", "all")
    assert code == 0
    assert "zero_shot†" in out
    assert "cpl - zero_shot" in airsweep_table()[1]
    assert airsweep_table("--columns", "some")[0] == 2
