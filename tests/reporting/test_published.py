"""Published numbers: their file."""

from __future__ import annotations

import pandas as pd

from air_core.datasets import DATASETS
from air_core.methods import METHODS
from tests.helpers.documents import ROOT

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
