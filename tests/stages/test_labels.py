"""The images that a LoRA is trained on, with their labels, and its training after a stop."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from air_core.classifiers import text_classifier
from air_core.datasets import get_dataset
from air_core.diffusion.lora_labels import first_of_each_class, lora_images
from air_core.diffusion.pipeline import LORA_FILE
from air_core.pseudo_labels import balanced_choice
from air_core.settings import InitialLabelsSettings
from air_core.types import Encoded, Split
from orchestrator.planning import Resolver
from orchestrator.spec import presets
from orchestrator.stages import LabelsSpec, TrialSpec
from orchestrator.stages import lora as lora_stage
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.features import read_target
from orchestrator.stages.labels import build as build_labels
from orchestrator.store import ArtifactStore
from tests.helpers.features import digit_features, relabelled, store_with


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> WorkerContext:
    return WorkerContext(ArtifactStore(tmp_path_factory.mktemp("labels") / "runs"))


def spec_of(resolver: Resolver, **settings: Any) -> TrialSpec:
    return resolver.trial(presets.defaults("air", {}) | settings)


def select(spec: TrialSpec, worker: WorkerContext) -> tuple[LabelsSpec, dict[str, torch.Tensor]]:
    labels = spec.lora_adapter.labels
    build_features(labels.features, worker)
    return labels, load_file(Path(build_labels(labels, worker).path) / "labels.safetensors")


def test_a_lora_of_the_domain_is_trained_on_the_whole_pool(worker, resolver):
    spec = spec_of(resolver, **{"initial_labels.kind": "pool"})
    labels, found = select(spec, worker)
    target = read_target(labels.features, labels.split, worker.store)
    backbone = worker.backbone(labels.features.backbone, labels.features.precision)
    text = text_classifier(backbone, target.text.classnames, target.text.template)
    assert found["index"].tolist() == target.split.pool.tolist()
    predicted = text.logits(target.batch(target.split.pool)).argmax(dim=1)
    assert found["labels"].tolist() == predicted.tolist()


def test_clip_chooses_the_images_of_a_lora_and_true_labels_do_not(tiny_clip, resolver, tmp_path):
    settings = {"pool": "train", "initial_labels.k": 2}
    spec = spec_of(resolver, **settings).lora_adapter.labels
    arrays = digit_features(tiny_clip.encode_images, 120, ("train", "val", "test"))
    found = []
    for name, version in {"true": arrays, "other": relabelled(arrays, "train")}.items():
        worker = WorkerContext(store_with(tmp_path / name, spec.features, version))
        found.append(load_file(Path(build_labels(spec, worker).path) / "labels.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    target = read_target(spec.features, spec.split, worker.store)
    text = text_classifier(tiny_clip, target.text.classnames, target.text.template)
    scores = text.logits(target.batch(target.split.pool)).softmax(dim=1)
    chosen = balanced_choice(scores, torch.full((10,), 2))
    assert found[0]["index"].tolist() == target.split.pool[chosen >= 0].tolist()
    assert found[0]["labels"].tolist() == chosen[chosen >= 0].tolist()


@pytest.mark.parametrize("settings", [{"paradigm": "trzsl"}, {"paradigm": "ssl", "shots": 5}])
def test_the_labelled_images_of_a_lora_have_their_true_labels(worker, resolver, settings):
    settings |= {"initial_labels.k": 3, "lora.source": "labelled"}
    labels, found = select(spec_of(resolver, **settings), worker)
    target = read_target(labels.features, labels.split, worker.store)
    labelled, classes = target.split.labelled, target.labels[target.split.labelled]
    assert set(found["index"].tolist()) <= set(labelled.tolist())
    assert found["labels"].tolist() == target.labels[found["index"]].tolist()
    assert found["labels"].tolist() == classes.unique().repeat_interleave(3).tolist()
    # They are drawn by the split seed.
    assert found["index"].tolist() != labelled[first_of_each_class(classes, 3)].tolist()


def test_a_bound_has_a_share_of_right_labels_in_each_class(tiny_clip):
    dataset = get_dataset("digits")
    examples = dataset.load(None)
    text = text_classifier(tiny_clip, dataset.classnames, dataset.template)
    pool = Encoded(tiny_clip.encode_images(examples.images[:200]))
    truth = torch.tensor(examples.labels[:200])
    split = Split(torch.arange(200), *[torch.empty(0, dtype=torch.long)] * 3, None)
    for share, right in ((0.0, 0), (0.75, 3), (1.0, 4)):
        settings = InitialLabelsSettings(k=4, true_share=share)
        index, labels = lora_images(text, pool, None, split, settings, truth=truth)
        is_right = labels == truth[index]
        assert labels[is_right].bincount(minlength=10).tolist() == [right] * 10
        assert labels[~is_right].bincount(minlength=10).tolist() == [4 - right] * 10
        assert len(index.unique()) == len(index)


def test_a_stopped_lora_continues_from_its_checkpoint_to_the_same_weights(
    tiny_clip, resolver, tmp_path, monkeypatch
):
    quick = {"lora.steps": 3, "lora.batch": 4, "lora.precision": "fp32", "generation.size": 32}
    spec = spec_of(resolver, pool="train", **{"initial_labels.k": 2}, **quick).lora_adapter
    arrays = digit_features(tiny_clip.encode_images, 120, ("train", "val", "test"))
    steps: list[int] = []

    def stop(done: int, total: int) -> None:
        steps.append(done)
        if steps == [1, 2]:
            raise KeyError

    def weights(name: str, stop: Any) -> tuple[dict[str, torch.Tensor], float]:
        worker = WorkerContext(store_with(tmp_path / name, spec.labels.features, arrays))
        build_labels(spec.labels, worker)
        with suppress(KeyError):
            lora_stage.build(spec, worker, stop)
        lora = lora_stage.build(spec, worker, stop)
        assert not [*worker.store.root.glob("unfinished/*")]
        return load_file(lora.path / LORA_FILE), lora.record["info"]["loss_first"]

    whole = weights("whole", lambda done, total: None)
    monkeypatch.setattr(lora_stage, "CHECKPOINT_INTERVAL", 0.0)
    again = weights("stopped", stop)
    assert steps == [1, 2, 3]
    assert again[1] == whole[1]
    assert all(torch.equal(whole[0][name], again[0][name]) for name in whole[0])
