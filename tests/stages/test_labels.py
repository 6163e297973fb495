"""Labels of a later LoRA round, which denoising errors of the round before choose."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from air_core.auxiliary import auxiliary_classifier
from air_core.classifiers import fuse, text_classifier
from air_core.datasets import get_dataset
from air_core.diffusion.pipeline import LORA_FILE
from air_core.evidence import evidence_probabilities
from air_core.lora_labels import AUXILIARY, class_agreement, lora_images, pool_classifier
from air_core.pseudo_labels.top_k import balanced_choice
from air_core.specs import InitialLabelsSettings, LabelsSpec
from air_core.types import Batch, Split
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import BlockScorer, read_evidence
from orchestrator.stages.evidence import build as build_evidence_block
from orchestrator.stages.features import read_target
from orchestrator.stages.images import build as build_image_block
from orchestrator.stages.images import lora_before, open_generator, read_synthetic
from orchestrator.stages.labels import build as build_labels
from orchestrator.stages.lora import build as build_lora
from tests.helpers.features import digit_features, relabelled, store_with

IMAGES, POOL, K, DRAWS, BLOCK = 120, 40, 2, 2, 16


FLAT = {
    "pool": "train", "lora.rounds": 2, "lora.steps": 4, "lora.batch": 4, "lora.rank": 2,
    "lora.precision": "fp32", "images_per_class": 2, "initial_labels.k": K,
    "initial_labels.images_per_class": 2, "initial_labels.evidence_draws": DRAWS,
    "generation.size": 32, "generation.block": 2, "generation.num_inference_steps": 2,
    "generation.precision": "fp32", "evidence.block": BLOCK, "evidence.precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(resolver) -> LabelsSpec:
    found: LabelsSpec = resolver.trial(FLAT).lora_adapter.labels
    return found


def make_inputs(spec: LabelsSpec, worker: WorkerContext) -> None:
    """Labels, LoRA, images and errors of the first round."""
    lora = spec.evidence.lora
    build_labels(lora.labels, worker)
    build_lora(lora, worker)
    generator = open_generator(spec.images.images, worker)
    for c in range(10):
        build_image_block(spec.images, c, 0, worker, lambda: generator)
    scorer = BlockScorer.open(spec.evidence, worker)
    for draw in range(DRAWS):
        for block in range(spec.evidence.blocks(POOL)):
            build_evidence_block(spec.evidence, draw, block, worker, lambda: scorer)


def labels_of(worker: WorkerContext, spec: LabelsSpec) -> dict[str, Any]:
    return load_file(worker.store.get(spec).path / "labels.safetensors")


def test_all_classifiers_choose_the_labels_and_true_labels_do_not(spec, tiny_clip, tmp_path):
    arrays = digit_features(tiny_clip.encode_images, IMAGES, ("train", "val", "test"))
    worker = WorkerContext(store_with(tmp_path / "true", spec.features, arrays))
    make_inputs(spec, worker)
    other = WorkerContext(
        store_with(tmp_path / "other", spec.features, relabelled(arrays, "train"))
    )
    for stage in ("labels", "lora", "images", "synthetic", "evidence"):
        shutil.copytree(*(each.store.root / "artifacts" / stage for each in (worker, other)))
    for each in (worker, other):
        build_labels(spec, each)
    found = labels_of(worker, spec)
    assert all((found[key] == labels_of(other, spec)[key]).all() for key in found)

    target = read_target(spec.features, spec.split, worker.store)
    pool = target.batch(target.split.pool)
    text = text_classifier(tiny_clip, target.text.classnames, target.text.template)
    bank = read_synthetic(spec.images, 2, worker.store, None)
    auxiliary = auxiliary_classifier(AUXILIARY, bank, None, pool, 10, text.sharpness)
    others = fuse(text, auxiliary, pool, 0.5, "match_entropy").pool_scores(pool)
    q = evidence_probabilities(read_evidence(spec.evidence, DRAWS, None, worker.store), 0.8)
    chosen = balanced_choice(0.3 * others + 0.7 * q, torch.full((10,), K))
    expected = target.split.pool[chosen >= 0]
    assert found["index"].tolist() == expected.tolist()
    assert found["labels"].tolist() == chosen[chosen >= 0].tolist()

    info = worker.store.record(spec)["info"]
    one, two = others.argmax(dim=1), q.argmax(dim=1)
    for c, name in enumerate(target.text.classnames):
        both, either = (one == c) & (two == c), (one == c) | (two == c)
        share = both.sum() / max(1, int(either.sum()))
        assert info["agreement"][name] == pytest.approx(float(share), abs=1e-3)
    before = labels_of(worker, spec.evidence.lora.labels)
    pairs = [set(zip(each["index"], each["labels"], strict=True)) for each in (found, before)]
    assert info["kept"] == len(pairs[0] & pairs[1]) / len(pairs[0])


@pytest.mark.parametrize("enough", [0.01, 1.0], ids=["copied", "trained"])
def test_a_round_that_would_change_few_labels_copies_the_round_before(
    spec, tiny_clip, tmp_path, resolver, enough
):
    trial = resolver.trial({**FLAT, "lora.enough_kept": enough, "evidence.draws": 1})
    lora, row, errors = trial.lora_adapter, trial.synthetic_features, trial.evidence_errors
    arrays = digit_features(tiny_clip.encode_images, IMAGES, ("train", "val", "test"))
    worker = WorkerContext(store_with(tmp_path / "runs", spec.features, arrays))
    make_inputs(lora.labels, worker)
    build_labels(lora.labels, worker)
    trained = build_lora(lora, worker)
    before = worker.store.get(lora_before(lora.labels))
    adapters = [(each.path / LORA_FILE).read_bytes() for each in (before, trained)]
    assert 0.01 < worker.store.record(lora.labels)["info"]["kept"] < 1
    copied = enough == 0.01
    assert (adapters[0] == adapters[1]) == copied
    generator = open_generator(row.images, worker)
    drawn = build_image_block(row, 0, 0, worker, lambda: generator)["drawn"]
    scorer = BlockScorer.open(errors, worker)
    pairs = build_evidence_block(errors, 0, 0, worker, lambda: scorer)["pairs"]
    assert (drawn, pairs) == ((0, 0) if copied else (2, BLOCK * 10))


def test_the_agreement_of_unseen_classes_counts_no_seen_one(tiny_clip):
    dataset = get_dataset("digits")
    text = text_classifier(tiny_clip, dataset.classnames, dataset.template)
    unseen = torch.tensor([1, 4, 8])
    pool = Batch(tiny_clip.encode_images(dataset.load(None).images[:30]))
    says = text.logits(pool)[:, unseen].argmax(dim=1)
    errors = 1 - torch.nn.functional.one_hot(says, 3).float()[None]
    errors[0, says == 2] = torch.tensor([0.0, 1.0, 1.0])  # the third class becomes the first
    agreement = class_agreement(pool_classifier(text, pool, unseen, None, errors), pool)
    first, third = ((says == c).sum() for c in (0, 2))
    assert agreement[0] == first / (first + third)
    assert agreement[2] == 0
    split = Split(torch.arange(30), *[torch.empty(0, dtype=torch.long)] * 3, unseen)
    _, labels = lora_images(text, pool, None, split, InitialLabelsSettings(k=2), errors=errors)
    assert set(labels.tolist()) <= set(unseen.tolist())


def test_a_bound_has_a_share_of_right_labels_in_each_class(tiny_clip):
    dataset = get_dataset("digits")
    examples = dataset.load(None)
    text = text_classifier(tiny_clip, dataset.classnames, dataset.template)
    pool = Batch(tiny_clip.encode_images(examples.images[:200]))
    truth = torch.tensor(examples.labels[:200])
    split = Split(torch.arange(200), *[torch.empty(0, dtype=torch.long)] * 3, None)
    for share, right in ((0.0, 0), (0.75, 3), (1.0, 4)):
        settings = InitialLabelsSettings(k=4, true_share=share)
        index, labels = lora_images(text, pool, None, split, settings, truth=truth)
        is_right = labels == truth[index]
        assert labels[is_right].bincount(minlength=10).tolist() == [right] * 10
        assert labels[~is_right].bincount(minlength=10).tolist() == [4 - right] * 10
        assert len(index.unique()) == len(index)
