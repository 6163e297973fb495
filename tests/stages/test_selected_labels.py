"""The images that a LoRA is trained on, with their labels, from real features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from air_core.classifiers import text_classifier
from air_core.specs import LabelsSpec, TrialSpec
from orchestrator.planning import Resolver
from orchestrator.spec import presets
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.features import read_target
from orchestrator.stages.labels import build as build_labels
from orchestrator.store import ArtifactStore


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> WorkerContext:
    return WorkerContext(ArtifactStore(tmp_path_factory.mktemp("labels") / "runs"))


@pytest.fixture(scope="module")
def resolver(tmp_path_factory) -> Resolver:
    return Resolver(tmp_path_factory.mktemp("digests") / "digests.json", None)


def spec_of(resolver: Resolver, **settings: Any) -> TrialSpec:
    return resolver.trial(presets.defaults("air", {}) | settings)


def select(spec: TrialSpec, worker: WorkerContext) -> tuple[LabelsSpec, dict[str, torch.Tensor]]:
    labels = spec.lora_adapter.labels
    while labels.images is not None:
        labels = labels.images.images.lora.labels
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


@pytest.mark.parametrize(
    "settings", [{"paradigm": "trzsl"}, {"paradigm": "ssl", "shots": 5}], ids=["trzsl", "ssl"]
)
def test_the_labelled_images_of_a_lora_are_drawn_by_the_split_seed(worker, resolver, settings):
    settings |= {"initial_labels.k": 3, "lora.source": "labelled"}
    spec = spec_of(resolver, **settings)
    labels, found = select(spec, worker)
    target = read_target(labels.features, labels.split, worker.store)
    assert found["labels"].tolist() == target.labels[found["index"]].tolist()
    labelled = target.split.labelled
    for c in found["labels"].unique().tolist():
        members = labelled[target.labels[labelled] == c].tolist()
        drawn = found["index"][found["labels"] == c].tolist()
        assert len(drawn) == 3
        assert set(drawn) <= set(members)
    first = [
        (target.labels[labelled] == c).nonzero()[:3].flatten() for c in found["labels"].unique()
    ]
    assert sorted(found["index"].tolist()) != sorted(labelled[torch.cat(first)].tolist())
