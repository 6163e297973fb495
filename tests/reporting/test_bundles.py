"""Bundles of small real trials: export and classify, without a cluster."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from air_core.bundle import load_bundle, read_bundle
from air_core.bundle.checks import CLASSIFIERS, PROMPT, TEXT
from air_core.bundle.content import modalities
from air_core.bundle.manifest import MANIFEST
from air_core.datasets import get_dataset
from air_core.models.weights import tiny_folder
from air_core.tools.seal import sealed_json
from orchestrator.planning import Slot, plan_of
from orchestrator.planning.ledger import read_ledger
from orchestrator.reporting.selection import named_trial
from orchestrator.spec import load_sweep
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore, SweepLocation, read_trial
from tests.helpers import outcomes
from tests.helpers.features import encode
from tests.helpers.golden import check_refusals
from tests.helpers.outcomes import ACCURACIES, by_method, record_sweep, trained
from tests.helpers.sweeps import python, record_again

SWEEP = """
grid:
  paradigm: [ul, trzsl]
  method: [zero_shot, zero_shot_real, fpl, cpl]
fixed: {train.steps: 8, prompt.length: 2, iterations: 2}
seeds: [1, 2]
"""


BASE: dict[str, Any] = {"precision": "fp32", "images_per_class": 0, "pool": "train", "seed": 1}


@pytest.fixture(scope="module")
def location(tmp_path_factory, tiny_clip, resolver) -> SweepLocation:
    """A finished sweep in a store."""
    store = ArtifactStore(tmp_path_factory.mktemp("done") / "runs")
    features = resolver.trial({"precision": "fp32", "images_per_class": 0}).features
    for level in ("features", "tokens"):
        encode(replace(features, level=level), store)
    return record_sweep(store.root, "small", SWEEP, trained)


def slots_of(location: SweepLocation, method: str, paradigm: str = "ul") -> list[Slot]:
    slots = plan_of(load_sweep(location.folder / "spec.yaml"), location).slots
    return [s for s in slots if (s.cell.method, s.spec.paradigm) == (method, paradigm)]


@pytest.fixture
def export(command, location, tmp_path):
    def run(trial: str, *more: str, out: str = "bundle") -> Path:
        words = ("export", trial, *more, "-o", tmp_path / out, *store_option(location))
        code, stdout, stderr = command(*words)
        assert code == 0, stderr
        assert stdout == f"{tmp_path / out}\n"  # nothing else, for $(...)
        return tmp_path / out

    return run


def store_option(location: SweepLocation) -> tuple[str, str]:
    return "--store", str(location.store.root)


def pictures_of(index: np.ndarray, folder: Path) -> Path:
    images = get_dataset("digits").load(None).images
    folder.mkdir()
    for number, i in enumerate(index):
        images[int(i)].save(folder / f"{number:04}.png")
    return folder


# ---------------------------------------------------------------- export

BLOCKED = """
import sys
for name in ("ray", "mlflow", "optuna"):
    sys.modules[name] = None  # importing it is an error
sys.argv = ["airsweep", "classify", "bundle", "new", "--json"]
from orchestrator.__main__ import main
main()
"""


def test_a_process_without_ray_or_mlflow_gives_the_predictions_of_the_trial(
    location, export, tmp_path, monkeypatch
):
    slot = slots_of(location, "cpl")[0]
    export(slot.key.digest[:8])
    index, predictions, _ = read_trial(slot.spec, location.store).predictions()
    pictures_of(index, tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    found = json.loads(python("-c", BLOCKED).stdout)
    names = get_dataset("digits").classnames
    assert [one["class"] for one in found] == [names[c] for c in predictions]


def test_a_trial_is_exported_by_key_or_slot_to_the_same_bytes(location, export):
    slot = slots_of(location, "fpl")[1]
    one = export(slot.key.digest, "--sweep", "small")
    other = export(slot.id, "--sweep", "small", out="other")
    assert sorted(p.name for p in one.iterdir()) == [MANIFEST, PROMPT, TEXT]
    assert all(file.read_bytes() == (other / file.name).read_bytes() for file in one.iterdir())
    record = read_trial(slot.spec, location.store)
    content = read_bundle(one).content
    assert content.metrics == record.metrics
    assert content.lineage["trial_key"] == slot.key.digest
    assert content.lineage["slot"] == slot.id
    assert content.lineage["inputs"]["dataset"]["digest"] == slot.spec.dataset.digest
    assert content.lineage["spec"]["train.steps"] == 8
    assert content.chosen is None
    assert np.array_equal(load_file(one / PROMPT)["prompt"], record.prompt())
    export(slot.key.digest[:6], "--force")
    assert read_bundle(one).content.lineage["sweep"] is None


def test_a_bundle_with_weights_of_a_folder_has_no_path_and_needs_one(
    location, resolver, export, command, tmp_path
):
    clip = Path(shutil.copytree(tiny_folder(), tmp_path / "secret" / "clip"))
    file = clip / "open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["visual.proj"] *= 0.5  # so that the weights differ from those of other trials
    save_file(tensors, file)
    spec = resolver.trial(BASE | {"iterations": 0, "backbone": str(clip)})
    encode(spec.features, location.store)
    folder = export(run_trial(spec, location.store).key)
    assert all(b"secret" not in file.read_bytes() for file in folder.iterdir())
    assert read_bundle(folder).content.backbone.digest == spec.backbone.digest
    image = next(pictures_of(np.arange(1), tmp_path / "new").iterdir())
    code, out, err = command("classify", folder, image)
    assert (code, out) == (2, "")
    assert "give --weights PATH" in err
    assert command("classify", folder, image, "--weights", clip)[0] == 0


REAL = {"auxiliary.source": "real", "fusion_weight": 0.6}
ELSEWHERE = {"test_dataset": "folder:"}
KINDS: dict[str, dict[str, Any]] = {
    "zero_shot": {"iterations": 0},
    "elsewhere": ELSEWHERE,
    "zero_shot elsewhere": ELSEWHERE | {"iterations": 0},
    **{
        form: REAL | {"auxiliary.kind": form, "fusion.space": "logit"}
        for form in ("prototype", "knn", "cache")
    },
    "lda": REAL | {"iterations": 0, "auxiliary.kind": "lda", "auxiliary.rounds": 2},
    "transductive": REAL
    | {"iterations": 0, "transduction": "gmm", "auxiliary.source": "synthetic"},
    **{name: REAL | {"modality": name} for name in modalities()},
    "trzsl": REAL | {"paradigm": "trzsl"},
}
WITHOUT_AUXILIARY = ("trzsl", "transductive")


@pytest.mark.parametrize("kind", KINDS)
def test_each_classifier_of_a_bundle_gives_the_recorded_predictions(
    kind, location, resolver, export, drawn_digits
):
    flat = BASE | {"iterations": 1, "train.steps": 4, "prompt.length": 2} | KINDS[kind]
    if "test_dataset" in flat:
        flat["test_dataset"] += str(drawn_digits)
    spec = resolver.trial(flat)
    if spec.test_features is not None:
        encode(spec.test_features, location.store)
    record = run_trial(spec, location.store)
    recorded = record.test_arrays()
    names = [name for name in CLASSIFIERS if name in recorded]
    fused = "fusion_weight" in flat
    every = ["text", *["auxiliary"] * (kind not in WITHOUT_AUXILIARY), "fused"]
    assert names == (every if fused else ["text"])
    folder = export(record.key, "--classifier", names[-1])
    manifest = read_bundle(folder)
    assert ([*manifest.classifiers], manifest.selected()) == (names, names[-1])
    compares = kind in ("knn", "cache")  # these contain features of images
    assert (manifest.content.bank_images > 0) == compares
    assert (folder / PROMPT).exists() == bool(spec.iterations)
    source = get_dataset((spec.test_dataset or spec.dataset).name)
    assert load_bundle(folder).classnames == source.classnames
    images = source.load(None).images
    opened = [images[int(i)] for i in recorded["index"]]
    for name in names:
        best = load_bundle(folder, classifier=name).scores(opened).max(dim=-1)
        assert np.array_equal(best.indices, recorded[name])
        assert np.allclose(best.values, recorded[f"probability_{name}"], rtol=0, atol=1e-4)


def test_an_export_says_what_it_compared_and_refuses_other_predictions(location, command, tmp_path):
    store = ArtifactStore(Path(shutil.copytree(location.store.root, tmp_path / "runs")))
    slot, other = (slots_of(location, method)[0] for method in ("zero_shot_real", "fpl"))
    words = ("-o", tmp_path / "b", "--store", store.root, "--force")
    count = len(read_trial(slot.spec, store).test_arrays()["index"])
    expected = f"text, auxiliary, fused: all predictions on {count} test images are those of the"
    assert expected in command("export", slot.key.digest, *words)[2]
    before = (tmp_path / "b" / MANIFEST).read_bytes()

    file = store.get(other.spec).path / PROMPT
    save_file({"prompt": -load_file(file)["prompt"]}, file)
    record_again(file.parent)
    code, out, err = command("export", other.key.digest, *words)
    assert (code, out) == (4, "")
    assert "predicts other classes than the trial for" in err
    shutil.rmtree(store.get(slot.spec.features).path)
    code, _, err = command("export", slot.key.digest, *words)
    assert (code, "the store lacks the features of the trial" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "runs"]
    assert (tmp_path / "b" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("by", [None, "test_accuracy"])
def test_best_is_the_classifier_with_the_highest_score_of_all_rows(by, location, command, tmp_path):
    option = ("--by", by) if by else ()
    metric = "test/accuracy" if by else "objective/validation_accuracy"
    plan = plan_of(load_sweep(location.folder / "spec.yaml"), location)
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for slot in plan.slots:
        record = read_trial(slot.spec, location.store)
        for name in ("text", "auxiliary", "fused"):
            if slot.spec.paradigm == "ul" and f"{metric}_{name}" in record.metrics:
                runs = scores.setdefault((slot.cell.method, name), {})
                runs[record.key] = record.metrics[f"{metric}_{name}"]
    method, name = best = max(scores, key=lambda of: np.mean([*scores[of].values()]))
    code, out, err = command(
        *("export", "best", "--sweep", "small", "--only", "paradigm=ul", *option),
        *("-o", tmp_path / "b", *store_option(location)),
    )
    assert (code, out) == (0, f"{tmp_path / 'b'}\n")
    assert f"selected: {name} classifier of {method}, test accuracy " in err
    assert ": of 6 classifiers the highest on " in err
    assert ("The test images selected the classifier" in err) == (by is not None)
    manifest = read_bundle(tmp_path / "b").content
    assert manifest.classifier == name
    assert manifest.lineage["trial_key"] == max(scores[best], key=lambda key: scores[best][key])
    chosen = manifest.chosen
    assert (chosen["row"]["method"], chosen["by"]) == (method, by or "validation_accuracy")
    assert (chosen["candidates"], chosen["trials_left"]) == (6, 0)


def test_exports_of_unknown_trials_equal_the_golden_messages(command, location, tmp_path):
    small = ("best", "--sweep", "small")
    check_refusals(
        "messages/export.txt",
        lambda *words: command("export", *words, "-o", tmp_path / "b", *store_option(location)),
        small,
        (*small, "--only", "metod=fpl"),
        (*small, "--only", "method=air"),
        (*small, "--only", "paradigm=ul", "--by", "x"),
        ("best",),
        ("best", "--sweep", "large"),
        ("cell/0/seed=1", "--sweep", "small"),
        ("abcdef123", "--sweep", "small"),
        ("abcde",),
        ("abcdef123", "--only", "method=fpl"),
        store=location.store.root,
    )
    assert not (tmp_path / "b").exists()


def test_best_of_a_sweep_without_finished_trials_is_bad_input(command, tmp_path):
    empty = record_sweep(tmp_path / "runs", "small", SWEEP, trained, lambda index: False)
    words = ("export", "best", "--sweep", "small", "-o", tmp_path / "b", *store_option(empty))
    code, _, err = command(*words)
    assert code == 2
    assert "no trial of small is done yet" in err


def test_a_trial_is_found_in_its_sweep_and_refused_if_another_version_computed_it(tmp_path) -> None:
    write = by_method(ACCURACIES)
    location = record_sweep(tmp_path, "small", outcomes.SWEEP, write)
    longer = outcomes.SWEEP.replace("digits", "digits, prompt.length: 3")
    other = record_sweep(tmp_path, "other", longer, write)
    slot, later = (read_ledger(each).slots[-1] for each in (location, other))
    assert slot.id == later.id
    with pytest.raises(ValueError, match="no trial keys"):
        named_trial(slot.id, location.store)
    assert named_trial(slot.id, location.store, other).record.key == later.key.digest
    with pytest.raises(ValueError, match="is not a finished trial of the sweep default/small"):
        named_trial(later.key.digest, location.store, location)
    file = location.store.path(slot.key) / "record.json"
    record = json.loads(file.read_text())
    record["spec"]["train"]["renamed"] = record["spec"]["train"].popitem()[1]
    file.write_bytes(sealed_json({**record, "commit": "0123abc"}))
    with pytest.raises(ValueError, match=r"another version of the code.*commit 0123abc"):
        named_trial(slot.key.digest, location.store)
