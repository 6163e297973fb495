"""The frame of gains, CSV that spreadsheets do not evaluate, and the command."""

from __future__ import annotations

from orchestrator.reporting.tables import gains_frame, table
from tests.helpers.outcomes import ACCURACIES, SWEEP, by_method, record_sweep
from tests.helpers.trials import quickstart, results, trials


def test_the_frame_of_gains_has_those_of_the_table_and_intervals_of_tested_ones_only() -> None:
    found = results(quickstart())
    frame = gains_frame(found).set_index("method")
    for c in found.comparisons:
        row, role = frame.loc[c.row.method], c.role
        assert (row[role], row[f"{role}_gain"]) == (c.baseline.method, c.difference.mean)
        shown = (row[f"{role}_low"], row[f"{role}_high"], row[f"{role}_p"])
        assert shown == (c.difference.low, c.difference.high, c.p_corrected)
    assert frame["marks"].tolist() == [
        "".join(c.mark for c in found.comparisons if c.row is row) for row in found.rows
    ]
    assert frame.loc["zero_shot"].filter(regex="^(host|control)").isna().all()
    few = [trial for trial in quickstart() if trial.flat["seed"] < 3]
    assert gains_frame(results(few)).filter(regex="_(low|high|p)$").isna().all(axis=None)


def test_control_characters_and_formulas_are_escaped_in_csv() -> None:
    finished = trials("cpl", dataset="folder:/a\x1b[2J\nb", settings={"lora.caption": "=1+1"})
    assert ",'=1+1," in table(results(finished), "csv")
    assert r"folder:/a\u001b[2J\u000ab" in table(results(finished), "csv")
    assert "\x1b" not in table(results(finished), "csv")


# ---------------------------------------------------------------- the command


def test_the_command_table_prints_columns_that_fit_or_all(tmp_path, command) -> None:
    record_sweep(tmp_path, "small", SWEEP, by_method(ACCURACIES))
    words = ("table", "small", "--store", tmp_path)
    assert "zero_shot†" in command(*words, "--columns", "all")[1]
    assert "cpl - zero_shot" in command(*words)[1]
    assert command(*words, "--columns", "some")[0] == 2
