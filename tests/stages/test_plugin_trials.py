"""Sweeps whose components come from one plugin file run on the tiny models."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import CLIPModel

from air_core.backbone.loading import load_backbone
from air_core.datasets import get_dataset
from air_core.settings import Ref
from orchestrator.keys import artifact_key
from orchestrator.planning import Resolver
from orchestrator.planning.trial_checks import InvalidSetting
from orchestrator.plugins import read_plugin, use_plugins
from orchestrator.reporting.bundles import export
from orchestrator.reporting.selection import SelectedTrial
from orchestrator.spec import cells_of, load_sweep
from orchestrator.stages import TrialSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.trial_run import run_trial, run_trials
from orchestrator.store import ArtifactStore, TrialRecord
from tests.helpers.dataset_trees import draw
from tests.helpers.features import encode
from tests.helpers.inputs import build_inputs
from tests.helpers.plugins import NOISE, TIP_ADAPTER, saved_clip, saved_dataset
from tests.helpers.sweeps import write_sweep

QUICK = "train.steps: 4, iterations: 2"


@pytest.fixture(autouse=True)
def no_plugin_left():
    yield
    use_plugins([])


def sweep(folder: Path, code: str, settings: str, *others: str) -> dict[str, Any]:
    """Flat settings of the only cell of a sweep with plugins, for a seed."""
    (folder / "mine.py").write_text(code)
    plugins = ", ".join(["mine.py", *others])
    spec = write_sweep(folder, "mine", f"plugins: [{plugins}]\nfixed: {{{settings}, {QUICK}}}\n")
    [cell] = cells_of(load_sweep(spec))
    return {**cell.flat, "seed": 1}


TIP = "method: pseudo, modality: tip_adapter, paradigm: ssl, prompt.tip_adapter.keys: 4"


def test_a_learner_of_a_plugin_starts_from_the_images_and_is_trained(resolver, tmp_path):
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    spec = resolver.trial(sweep(tmp_path, TIP_ADAPTER, TIP))
    assert spec.tokens is None
    encode(spec.features, worker.store)
    [whole] = run_trials([spec], worker)
    assert isinstance(whole, TrialRecord)
    prompt = load_file(whole.path / "prompt.safetensors")["prompt"]
    assert prompt.shape[:2] == (10, 4)
    assert not torch.allclose(prompt[:, 0], prompt[:, 1])  # images, not the text of the class
    assert len(whole.curves["test/accuracy"]) == 2
    selected = SelectedTrial(spec=spec, record=whole, slot=None, sweep=None)
    with pytest.raises(ValueError, match="has the learner 'tip_adapter'; a bundle"):
        export(selected, worker.store, resolver, tmp_path / "bundle")
    for path in (f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)):
        draw(tmp_path / "pets" / path)
    other = {"test_dataset": f"folder:{tmp_path / 'pets'}"}
    with pytest.raises(InvalidSetting, match="works with the class names that it learned only"):
        resolver.trial(sweep(tmp_path, TIP_ADAPTER, TIP) | other)


def test_a_saved_dataset_is_encoded_under_the_digests_of_its_files_and_its_code(tmp_path, command):
    places = [(x, y) for x in range(6) for y in range(6)]
    code = saved_dataset(tmp_path / "saved", places)
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))

    def spec(code: str) -> TrialSpec:
        resolver = Resolver(tmp_path / "digests.json", None)
        return resolver.trial(sweep(tmp_path, code, "dataset: pets, method: pseudo"))

    first = spec(code)
    build_features(first.features, worker)
    record = run_trial(first, worker.store)
    assert record.metrics["test/accuracy"] >= 0
    parts = Counter(get_dataset("pets").load(None).parts.tolist())
    assert parts == {"train": 60, "val": 4, "test": 8}
    other = Ref(name="digits", digest="digits")
    edited = spec(code + "# edited\n")
    transfers = [
        replace(each, dataset=other, test_dataset=each.dataset) for each in (first, edited)
    ]
    assert artifact_key(transfers[0]) != artifact_key(transfers[1])
    assert artifact_key(edited.features) != artifact_key(first.features)
    assert edited.dataset == first.dataset
    assert command("plugin", "check", tmp_path / "mine.py")[0] == 0
    shutil.rmtree(tmp_path / "saved")
    saved_dataset(tmp_path / "saved", places[1:])
    assert spec(code).dataset.digest != first.dataset.digest


def test_a_saved_clip_and_a_generator_of_a_plugin_make_features_and_images(tmp_path, command):
    settings = "dataset: pets, method: air, backbone: saved_clip, generator: noise, lora: null"
    small = ", prompt.length: 4, generation.size: 24, generation.block: 2, images_per_class: 4"
    worker = WorkerContext(ArtifactStore(tmp_path / "runs"))
    files = {
        "pets.py": saved_dataset(tmp_path / "saved", [(x, 3) for x in range(12)]),
        "clip.py": saved_clip(tmp_path / "clip"),
    }
    for name, code in files.items():
        (tmp_path / name).write_text(code)

    def spec(models: str) -> TrialSpec:
        flat = sweep(tmp_path, models, settings + small, "pets.py", "clip.py")
        return Resolver(tmp_path / "digests.json", None).trial(flat)

    first = spec(NOISE)
    build_inputs(first, worker)
    assert run_trial(first, worker.store).metrics["synthetic/images"] == 8
    edited = spec(NOISE + "# edited\n")
    assert artifact_key(first.images) != artifact_key(edited.images)
    assert artifact_key(first.features) == artifact_key(edited.features)
    (tmp_path / "clip.py").write_text(files["clip.py"] + "# edited\n")
    assert artifact_key(first.features) != artifact_key(spec(NOISE).features)
    settings = settings.replace("lora: null", "lora.rank: 2")
    with pytest.raises(InvalidSetting, match="generator 'noise' is of a plugin, so it has neither"):
        spec(NOISE)
    for file in ("mine.py", "clip.py"):
        code, _, err = command("plugin", "check", tmp_path / file)
        assert code == 0, err


def test_a_saved_clip_encodes_texts_as_transformers_does(tmp_path):
    (tmp_path / "clip.py").write_text(saved_clip(tmp_path / "saved"))
    use_plugins([read_plugin("clip.py", tmp_path)])
    backbone = load_backbone("saved_clip")
    names, texts = ["square", "blue disc"], ["a red square", "a red blue disc"]
    words = backbone.tokenizer.tokenizer("a red", add_special_tokens=False).input_ids
    context = backbone.model.token_embedding(torch.tensor(words))
    clip = CLIPModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        ids = backbone.tokenizer(texts)
        expected = normalize(clip.get_text_features(ids).pooler_output, dim=-1)
    torch.testing.assert_close(backbone.encode_texts(texts), expected)
    torch.testing.assert_close(backbone.encode_context(context, names), expected)
