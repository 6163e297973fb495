"""`airsweep sample`: images of a pool without labels, for somebody to label."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from air_core.classifiers import text_classifier
from air_core.datasets import get_dataset
from orchestrator import api
from orchestrator.planning import plan_of, read_request
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import read_target
from orchestrator.store import ArtifactStore, SweepLocation

POOL = 60


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Digits in one folder, one of them labelled, and a sweep file `mine.yaml`."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "photos"
    (home / "b").mkdir(parents=True)
    for i, image in enumerate(get_dataset("digits").load(None).images[: POOL + 1]):
        image.save(home / ("b" if i % 2 else ".") / f"{i:03}.png")
    (home / "labels.csv").write_text("image,class\n000.png,zero\n")
    api.init("mine", "photos", classes="zero,one,two,three,four,five,six,seven,eight,nine")
    return home


def paths(file: Path) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert {tuple(row) for row in rows} == {("number", "image", "class", "part")}
    assert {row["class"] for row in rows} == {""}
    assert Counter(row["part"] for row in rows)["val"] == len(rows) // 3
    return [row["image"] for row in rows]


def test_before_the_first_run_the_sample_is_seeded_and_never_labelled(photos, tmp_path):
    drawn = api.sample("mine", 20)
    assert (drawn.sheet, drawn.labels) == (Path("mine-sample.png"), Path("mine-labels.csv"))
    assert "predictions of zero-shot tiny" in drawn.basis
    found = paths(drawn.labels)
    assert len({*found}) == 20
    assert all((photos / path).is_file() for path in found)
    assert Image.open(drawn.sheet).height > 2 * 100
    (photos / "labels.csv").write_text("image,class\n000.png,zero\n002.png,\n")
    rest = api.sample("mine.yaml", 100, "rest")
    assert "all that have no label and are in no earlier sample" in rest.basis
    assert len({"000.png", "002.png", *found, *paths(rest.labels)}) == POOL + 1
    with pytest.raises(ValueError, match="each unlabelled image is in a sample"):
        api.sample("mine.yaml", 20, "again")

    before = sorted(tmp_path.rglob("*.*"))
    with pytest.raises(ValueError, match=r"mine-sample\.png exists already"):
        api.sample("mine.yaml", 20)
    with pytest.raises(ValueError, match="would become one of the images"):
        api.sample("mine.yaml", 20, photos / "b" / "mine")
    # A filled-in file works as it is.
    drawn.labels.write_text(drawn.labels.read_text().replace(f"{found[0]},", f"{found[0]},three"))
    (photos / "labels.csv").write_text(drawn.labels.read_text())
    examples = get_dataset(f"folder:{photos}").load(None)
    assert Counter(examples.parts.tolist()) == {"train": POOL, "test": 1}
    assert sorted(tmp_path.rglob("*.*")) == before


def test_the_sample_is_spread_over_predicted_classes_and_confidence(photos, tmp_path):
    drawn = api.sample("mine", 20)
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    location = SweepLocation(worker.store, "default", "mine", None)
    spec = plan_of(read_request("mine.yaml").spec, location).slots[0].spec
    target = read_target(spec.features, spec.split, worker.store)
    clip = text_classifier(worker.backbone(spec.backbone, "fp32"), *vars(target.text).values())
    best = clip.logits(target.batch(target.split.pool)).softmax(dim=-1).max(dim=-1)
    files = worker.examples(spec.dataset).images.files
    names = [files[i].relative_to(photos).as_posix() for i in target.split.pool]
    class_of = dict(zip(names, best.indices.tolist(), strict=True))
    found = paths(drawn.labels)
    pool, sample = Counter(class_of.values()), Counter(class_of[name] for name in found)
    assert all(abs(sample[c] - pool[c] * 20 / POOL) < 2 for c in pool)


def test_a_sweep_without_unlabelled_images_has_nothing_to_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.init("mine")
    with pytest.raises(ValueError, match="has no unlabelled images to label"):
        api.sample("mine.yaml")
    with pytest.raises(ValueError, match="other"):
        api.sample("other")
