"""Sweeps whose components come from one plugin file run on the tiny models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from air_core.specs import Ref, TrialSpec
from orchestrator.keys import artifact_key
from orchestrator.planning import Resolver, requirements_of
from orchestrator.planning.plan import build_level
from orchestrator.planning.resolve import InvalidSetting
from orchestrator.plugins import use_plugins
from orchestrator.reporting.bundles import export
from orchestrator.reporting.selection import SelectedTrial
from orchestrator.spec import cells_of, load_sweep
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.side_by_side import run_trials
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, TrialRecord
from orchestrator.store.checkpoints import Segments
from tests.helpers.plugins import MODELS, SHAPES, TIP_ADAPTER
from tests.helpers.sweeps import write_sweep
from tests.stages.test_any_trial import build

QUICK = "train.steps: 4, iterations: 2"


@pytest.fixture(autouse=True)
def no_plugin_left():
    yield
    use_plugins([])


@pytest.fixture(scope="module")
def features(tmp_path_factory, trial) -> Path:
    """A store with the features of the digits."""
    store = ArtifactStore(tmp_path_factory.mktemp("plugins") / "runs")
    build_features(trial("fpl").features, WorkerContext(store))
    return store.root


@pytest.fixture
def worker(features, tmp_path) -> WorkerContext:
    return WorkerContext(ArtifactStore(Path(shutil.copytree(features, tmp_path / "runs"))))


def sweep(folder: Path, code: str, settings: str) -> dict[str, Any]:
    """Flat settings of the only cell of a sweep with a plugin, for a seed."""
    (folder / "mine.py").write_text(code)
    spec = write_sweep(folder, "mine", f"plugins: [mine.py]\nfixed: {{{settings}, {QUICK}}}\n")
    [cell] = cells_of(load_sweep(spec))
    return {**cell.flat, "seed": 1}


TIP = "method: pseudo, modality: tip_adapter, paradigm: ssl, prompt.tip_adapter.keys: 4"


def test_a_learner_of_a_plugin_starts_from_the_images_and_is_trained(worker, resolver, tmp_path):
    spec = resolver.trial(sweep(tmp_path, TIP_ADAPTER, TIP))
    assert spec.tokens is None
    [whole] = run_trials([spec], worker)
    assert isinstance(whole, TrialRecord)
    prompt = load_file(whole.path / "prompt.safetensors")["prompt"]
    assert prompt.shape[:2] == (10, 4)
    assert not torch.allclose(prompt[:, 0], prompt[:, 1])  # images, not the text of the class
    assert len(whole.curves["test/accuracy"]) == 2
    selected = SelectedTrial(spec=spec, record=whole, slot=None, sweep=None)
    with pytest.raises(ValueError, match="has the learner 'tip_adapter'; a bundle"):
        export(selected, worker.store, resolver, tmp_path / "bundle")
    with pytest.raises(InvalidSetting, match="works with the class names that it learned only"):
        resolver.trial({**sweep(tmp_path, TIP_ADAPTER, TIP), "test_dataset": "digits"})


def test_a_stopped_trial_with_a_learner_of_a_plugin_resumes(worker, resolver, features, tmp_path):
    spec = resolver.trial(sweep(tmp_path, TIP_ADAPTER, TIP.replace("pseudo", "cpl_real", 1)))
    other = ArtifactStore(Path(shutil.copytree(features, tmp_path / "other")))
    run_trials([spec], worker, segments=Segments(rungs=(1,), stop_after=1))
    resumed = run_trial(spec, worker.store)
    whole = run_trial(spec, other)
    one, two = (load_file(r.path / "prompt.safetensors")["prompt"] for r in (resumed, whole))
    assert torch.equal(one, two)


def test_a_dataset_of_a_plugin_is_encoded_under_the_digests_of_its_files_and_its_code(
    tmp_path, command
):
    lines = [f"{shape} {x} {y}" for shape in ("square", "disc") for x in range(6) for y in range(6)]
    file = tmp_path / "shapes.txt"
    file.write_text("\n".join(lines))
    code = SHAPES.format(file=str(file))
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))

    def spec(code: str) -> TrialSpec:
        resolver = Resolver(tmp_path / "digests.json", None)
        return resolver.trial(sweep(tmp_path, code, "dataset: shapes, method: pseudo"))

    first = spec(code)
    build_features(first.features, worker)
    record = run_trial(first, worker.store)
    assert record.metrics["test/accuracy"] >= 0
    other = Ref(name="digits", digest="digits")
    edited = spec(code + "# edited\n")
    transfers = [
        replace(each, dataset=other, test_dataset=each.dataset) for each in (first, edited)
    ]
    assert artifact_key(transfers[0]) != artifact_key(transfers[1])
    assert artifact_key(edited.features) != artifact_key(first.features)
    assert edited.dataset == first.dataset
    file.write_text("\n".join(lines[:-1]))
    assert spec(code).dataset.digest != first.dataset.digest
    assert command("plugin", "check", tmp_path / "mine.py")[0] == 0


def test_a_backbone_and_a_generator_of_a_plugin_make_features_and_images(tmp_path, command):
    file = tmp_path / "shapes.txt"
    file.write_text("\n".join(f"{shape} {x} 3" for shape in ("square", "disc") for x in range(12)))
    code, worker = SHAPES.format(file=str(file)), WorkerContext(ArtifactStore(tmp_path / "runs"))
    settings = "dataset: shapes, method: air, backbone: my_clip, generator: noise, lora: null"
    small = ", generation.size: 24, generation.block: 2, images_per_class: 4"

    def spec(models: str) -> TrialSpec:
        both = code + models.replace("from __future__ import annotations", "")
        flat = sweep(tmp_path, both, settings + small)
        return Resolver(tmp_path / "digests.json", None).trial(flat)

    first = spec(MODELS)
    for requirement in sorted(requirements_of([first]), key=lambda one: build_level(one.spec)):
        build(requirement, worker)
    assert run_trial(first, worker.store).metrics["synthetic/images"] == 8
    edited = spec(MODELS + "# edited\n")
    for one, other in ((first.features, edited.features), (first.images, edited.images)):
        assert artifact_key(one) != artifact_key(other)
    settings = settings.replace("lora: null", "lora.rank: 2")
    with pytest.raises(InvalidSetting, match="generator 'noise' is of a plugin, so it has neither"):
        spec(MODELS)
    code, _, err = command("plugin", "check", tmp_path / "mine.py")
    assert code == 0, err
