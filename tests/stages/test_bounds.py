"""Images in the place of synthetic ones: the control, the ceiling and the floor of AiR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from air_core.settings.normal import normalised
from orchestrator.planning import Resolver
from orchestrator.spec import presets
from orchestrator.stages import TrialSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import read_target
from orchestrator.stages.trial_data import read_data
from orchestrator.stages.trial_run import run_trial
from orchestrator.store import ArtifactStore
from tests.helpers.inputs import build_inputs

COUNT = 3  # images per class
SMALL: dict[str, Any] = {
    "images_per_class": COUNT,
    "lora": None,
    "generation.block": 4,
    "initial_labels.k": 4,
    "iterations": 1,
    "train.steps": 2,
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> WorkerContext:
    return WorkerContext(ArtifactStore(tmp_path_factory.mktemp("bounds") / "runs"))


def spec_of(method: str, resolver: Resolver, drawn: Any, **more: Any) -> TrialSpec:
    flat = presets.defaults(method, {}) | SMALL | {"generator": f"folder:{drawn}"}
    for name in [name for name in flat if name.startswith("lora.")]:
        del flat[name]
    return normalised(resolver.trial(flat | more))


def bank(spec: TrialSpec, worker: WorkerContext) -> Any:
    """The images that a trial reads in the place of synthetic ones."""
    build_inputs(spec, worker)
    target = read_target(spec.features, spec.split, worker.store)
    return read_data(spec, target, worker).synthetic


@pytest.mark.parametrize("paradigm", ["ul", "ssl", "trzsl"])
def test_the_control_reads_the_images_that_a_lora_is_trained_on(
    worker, resolver, drawn_digits, paradigm
):
    spec = spec_of("air_control", resolver, drawn_digits, paradigm=paradigm)
    found = bank(spec, worker)
    selected = load_file(worker.store.get(spec.lora_labels).path / "labels.safetensors")
    target = read_target(spec.features, spec.split, worker.store)
    features = target.features[selected["index"]]
    for feature, label in zip(found.images.features, found.labels, strict=True):
        [place] = (features == feature).all(dim=1).nonzero().flatten().tolist()
        assert selected["labels"][place] == label
    classes = range(10) if target.split.unseen is None else target.split.unseen.tolist()
    assert found.labels.unique().tolist() == list(classes)
    assert found.labels.bincount().max() <= COUNT
    right = (target.labels[selected["index"]] == selected["labels"]).double().mean()
    assert right > 0.3
    record = run_trial(spec, worker.store)
    assert record.metrics["pseudo/accuracy_lora"] == pytest.approx(float(right))
    if target.split.unseen is None:  # otherwise the metric is the harmonic mean
        arrays = record.test_arrays()
        fused = (arrays["fused"] == arrays["labels"]).mean()
        assert fused == pytest.approx(record.metrics["test/accuracy_fused"])


def test_the_ceiling_reads_pool_images_under_their_true_labels(worker, resolver, drawn_digits):
    spec = spec_of("air_ceiling", resolver, drawn_digits)
    found = bank(spec, worker)
    target = read_target(spec.features, spec.split, worker.store)
    pool = target.features[target.split.pool]
    for feature, label in zip(found.images.features, found.labels, strict=True):
        places = (pool == feature).all(dim=1).nonzero().flatten()
        assert (target.labels[target.split.pool[places]] == label).any()
    assert found.labels.bincount().tolist() == [COUNT] * 10
    other = replace(spec, split_seed=1)
    assert not torch.equal(bank(other, worker).images.features, found.images.features)


def test_the_floor_reads_synthetic_images_as_the_next_class(worker, resolver, drawn_digits):
    as_drawn = bank(spec_of("air", resolver, drawn_digits), worker)
    shifted = bank(spec_of("air_floor", resolver, drawn_digits), worker)
    assert torch.equal(as_drawn.images.features, shifted.images.features)
    assert torch.equal((as_drawn.labels + 1) % 10, shifted.labels)
