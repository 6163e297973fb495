"""Charts of results: which there are, that they hold what they should, and their bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
from typing import Any

from PIL import Image

from orchestrator.reporting.charts import pictures
from orchestrator.reporting.rows import Entry
from tests.reporting.test_rows import results, trials


def with_rounds(entries: list[Entry]) -> list[Entry]:
    curves = {"pseudo/accuracy": [0.7, 0.75, 0.8], "pseudo/coverage": [0.2, 0.6, 1.0]}
    return [dataclasses.replace(entry, curves=curves) for entry in entries]


def a_grid() -> list[Entry]:
    found = []
    for method in ("cpl", "air"):
        for count in (25, 100):
            found += trials(
                method,
                settings={"images_per_class": count},
                cell=f"{method}-{count}",
                better=count / 1e4,
            )
    return with_rounds(found)


def a_search() -> list[Entry]:
    found: list[Entry] = []
    for point, weight in enumerate((0.1, 0.4, 0.7)):
        found += trials(
            "air",
            settings={"fusion_weight": weight},
            point=point,
            objective=0.1,
            better=weight / 10,
        )
    return found


def picture(makers: Any, name: str) -> Image.Image:
    return Image.open(io.BytesIO(makers[name]))


def test_a_grid_has_a_chart_for_each_thing_that_it_asks() -> None:
    entries = a_grid()
    makers = pictures(results(entries))
    names = ["accuracy.png", "accuracy_by_images_per_class.png", "pseudo_labels.png"]
    assert list(makers) == names
    for name in names:
        image = picture(makers, name)
        assert image.width == 700
        colors = image.convert("RGB").getcolors(1 << 20)
        assert colors is not None
        assert len(colors) > 20, f"{name} is blank"
        assert len(makers[name]) < 100_000


def test_a_search_is_charted_by_its_points() -> None:
    entries = a_search()
    makers = pictures(results(entries, "validation"))
    assert list(makers) == ["accuracy_by_fusion_weight.png"]  # of one row there is no comparison
    assert picture(makers, "accuracy_by_fusion_weight.png").width == 700


def test_words_have_no_axis_and_nothing_has_no_chart() -> None:
    entries = [
        entry
        for kind in ("ce", "rc")
        for entry in trials("cpl", settings={"train.loss": kind}, cell=f"cpl-{kind}")
    ]
    assert list(pictures(results(entries))) == ["accuracy.png"]
    assert pictures(results([])) == {}


DRAW = """
import hashlib
from orchestrator.reporting.charts import pictures
from tests.reporting.test_charts import a_grid
from tests.reporting.test_rows import results
print([hashlib.sha256(one).hexdigest() for one in pictures(results(a_grid())).values()])
"""


def test_the_same_data_gives_the_same_bytes_in_another_process() -> None:
    here = [hashlib.sha256(one).hexdigest() for one in pictures(results(a_grid())).values()]
    other = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(here)
