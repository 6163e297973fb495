"""Charts of a note: which are drawn, their size, and that their bytes are reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import io

from PIL import Image

from orchestrator.reporting.charts import VERDICT_COLORS, differences, pictures, svg
from orchestrator.reporting.rows import FinishedTrial
from tests.helpers.sweeps import python
from tests.helpers.trials import results, trials


def with_curves(finished: list[FinishedTrial]) -> list[FinishedTrial]:
    curves = {"pseudo/accuracy": [0.7, 0.75, 0.8], "pseudo/coverage": [0.2, 0.6, 1.0]}
    return [dataclasses.replace(trial, curves=curves) for trial in finished]


def grid() -> list[FinishedTrial]:
    found = []
    for method in ("cpl", "air"):
        for count in (25, 100):
            found += trials(
                method,
                settings={"images_per_class": count},
                cell=f"{method}-{count}",
                better=count / 1e4,
            )
    return with_curves(found)


def search() -> list[FinishedTrial]:
    found: list[FinishedTrial] = []
    for point, weight in enumerate((0.1, 0.4, 0.7)):
        found += trials(
            "air",
            settings={"fusion_weight": weight},
            point=point,
            objective=0.1,
            better=weight / 10,
        )
    return found


def test_charts_follow_from_the_trials() -> None:
    names = ["accuracy.png", "accuracy_by_images_per_class.png", "pseudo_labels.png"]
    charts = pictures(results(grid()))
    assert [*charts] == names
    points = pictures(results(search(), "validation"))
    assert [*points] == ["accuracy_by_fusion_weight.png"]  # no chart of a single row
    for content in (*charts.values(), *points.values()):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        assert image.width == 700
        assert len(image.getcolors(1 << 20)) > 20  # not blank
        assert len(content) < 100_000
    # A setting that is no number has no chart.
    losses = [t for k in ("ce", "rc") for t in trials("cpl", settings={"train.loss": k}, cell=k)]
    assert [*pictures(results(losses))] == ["accuracy.png"]
    assert pictures(results([])) == {}


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


DRAW = """
import hashlib
from orchestrator.reporting.charts import pictures
from tests.reporting.test_charts import grid
from tests.helpers.trials import results
print([hashlib.sha256(png).hexdigest() for png in pictures(results(grid())).values()])
"""


def test_equal_data_give_equal_bytes_in_another_process() -> None:
    digests = [hashlib.sha256(png).hexdigest() for png in pictures(results(grid())).values()]
    assert python("-c", DRAW).stdout.strip() == str(digests)
