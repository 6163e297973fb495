"""Published numbers: their file, and the recipe that joins them with the rows of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from air_core.datasets import DATASETS
from air_core.methods import METHODS
from orchestrator.reporting.tables import table
from tests.helpers.documents import ROOT, blocks
from tests.helpers.trials import results, trials

FILE = ROOT / "docs" / "tables" / "published.csv"


def test_published_numbers_name_datasets_and_methods_of_airsweep() -> None:
    published = pd.read_csv(FILE)
    levels = published[~published["metric"].str.startswith("gain")]
    assert set(levels["dataset"]) <= {*DATASETS, "mnist"}
    assert set(published["method"]) <= {*METHODS, "upt"}
    assert set(levels["metric"][levels["paradigm"] == "trzsl"]) == {"harmonic_mean"}
    for dataset, images in zip(levels["dataset"], levels["n_test"], strict=True):
        if dataset in DATASETS:
            assert DATASETS[dataset].published.parts["test"] == images
    assert published["source"].str.contains(r"arXiv:\d{4}\.\d{5}").all()


def test_the_recipe_joins_verified_numbers_of_the_same_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "recipes.md"
    (recipe,) = (b.text for b in blocks(page) if b.language == "python" and "published" in b.text)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)

    def joined(n_test: int = 6149, **change: object) -> list[tuple[str, float, bool]]:
        found = results([t for m in ("zero_shot", "cpl") for t in trials(m, dataset="flowers102")])
        rows = json.loads(table(found, "json"))
        for row in rows:
            row["n_test"] = n_test
            row["protocol"] |= {"backbone": "ViT-B-32/openai", **change}
        Path("quickstart.json").write_text(json.dumps(rows))
        names: dict[str, pd.DataFrame] = {}
        exec(recipe, names)
        both = names["both"]
        return sorted(zip(both["method"], both["value"], both["inside"], strict=True))

    both_papers = [("zero_shot", 63.67, False), ("zero_shot", 63.7, False)]
    assert joined() == [("cpl", 72.9, False), *both_papers]
    assert joined(seeds=2) == []
    assert joined(backbone="tiny") == joined(leaky_pool=True) == joined(whole_pool=False) == []
    assert joined(n_test=300) == []
