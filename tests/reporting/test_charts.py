"""Charts of the report: which are drawn, and their colours."""

from __future__ import annotations

import dataclasses

from orchestrator.reporting.charts import (
    VERDICT_COLORS,
    by_setting,
    differences,
    numeric_settings,
    svg,
)
from orchestrator.reporting.comparisons import Results
from tests.helpers.trials import results, searched, trials


def grid() -> Results:
    found = []
    for method in ("cpl", "air"):
        for count in (25, 100):
            settings = {"images_per_class": count, "train.loss": "rc"}
            cell = f"{method}-{count}"
            found += trials(method, settings=settings, cell=cell, better=count / 1e4)
    losses = {"images_per_class": 25, "train.loss": "ce"}
    return results([*found, *trials("cpl", settings=losses, cell="ce")])


def test_a_numeric_setting_of_the_grid_has_a_chart_and_no_searched_one() -> None:
    assert numeric_settings(grid()) == ["images_per_class"]
    assert numeric_settings(results(searched(), "mutual_information")) == []
    assert numeric_settings(results([])) == []
    chart = by_setting(grid(), "images_per_class")
    names = {text.get_text() for text in chart.legends[0].get_texts()}
    assert names == {"air, train.loss rc", "cpl, train.loss rc"}  # lines of two values


def test_colours_of_differences_follow_the_corrected_test_and_not_the_interval() -> None:
    [green] = results([*trials("cpl"), *trials("air", better=0.2)]).comparisons
    grey = dataclasses.replace(green, p_corrected=0.2)  # in a table of many comparisons
    assert grey.difference.low > 0
    assert (green.verdict, grey.verdict, grey.mark) == ("higher", "not significant", "")
    for comparison in (grey, green):
        alone = results([])
        alone.comparisons = [comparison]
        drawn = VERDICT_COLORS["higher"] in svg(differences(alone))
        assert drawn == (comparison is green)
