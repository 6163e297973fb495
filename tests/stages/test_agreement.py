"""Agreement of text, images and evidence on a pool: numbers, methods, and no label of the pool."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from air_core.classifiers import text_classifier
from air_core.evidence import mean_scores
from orchestrator.planning.agreement_card import (
    AgreementCard,
    AgreementRow,
    agreement_rows,
    agreement_screen,
)
from orchestrator.planning.cards import card_from_json, card_json, complete_rows
from orchestrator.spec import SweepSpec, cells_of
from orchestrator.spec.sweep import Seeds
from orchestrator.stages.agreement import make_agreement_card
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import BlockScorer, read_evidence
from orchestrator.stages.evidence import build as build_evidence_block
from orchestrator.stages.features import read_target
from orchestrator.store import SweepLocation
from tests.helpers.features import Arrays, digit_features, relabelled, store_with

IMAGES, POOL, SCORED = 60, 20, 16  # of the digits
SWEEP = SweepSpec(
    name="x",
    grid={"method": ("cpl", "cpl_real", "cpl_evidence", "cpl_real_evidence", "air_ceiling")},
    fixed={
        "lora": None,
        "evidence.draws": 1,
        "evidence.images": SCORED,
        "evidence.block": 8,
        "evidence.precision": "fp32",
        "evidence.prune_after": None,
        "images_per_class": 2,
    },
    seeds=Seeds(values=((1,), (2,))),
)


@pytest.fixture(scope="module")
def row(resolver) -> AgreementRow:
    [found] = agreement_rows(cells_of(SWEEP), SWEEP.seeds.assignments(), resolver)
    return found


@pytest.fixture(scope="module")
def arrays(tiny_clip) -> Arrays:
    return digit_features(tiny_clip.encode_images, IMAGES, ("train", "val", "test"))


@pytest.fixture(scope="module")
def worker(row, arrays, tmp_path_factory) -> WorkerContext:
    """A worker with a store that has the inputs of the card."""
    store = store_with(tmp_path_factory.mktemp("agreement") / "runs", row.features, arrays)
    context = WorkerContext(store)
    score(row, context)
    return context


def score(row: AgreementRow, worker: WorkerContext) -> None:
    """Compute the denoising errors that a card needs."""
    [evidence] = [each for each in row.requirements if each.key.stage == "evidence"]
    scorer = BlockScorer.open(evidence.spec, worker)
    for draw, block in evidence.shards():
        build_evidence_block(evidence.spec, draw, block, worker, lambda: scorer)


@pytest.fixture(scope="module")
def card(row, worker) -> AgreementCard:
    return make_agreement_card(row, worker)


def test_only_methods_that_use_a_diffusion_model_and_no_bound_are_compared(row):
    assert [label for label, _ in row.trials] == ["cpl_evidence", "cpl_real_evidence"]
    assert {each.key.stage for each in row.requirements} == {"features", "evidence"}
    assert all(spec.iterations == 0 for _, spec in row.trials)  # trials of any seed


def test_settings_of_training_share_a_classifier_and_others_are_named(resolver):
    grid = {"method": ("cpl_evidence",), "iterations": (2, 5), "evidence.weight": (0.2, 0.4)}
    cells = cells_of(replace(SWEEP, grid=grid))
    [found] = agreement_rows(cells, SWEEP.seeds.assignments(), resolver)
    assert [label for label, _ in found.trials] == [
        "cpl_evidence, evidence.weight 0.2",
        "cpl_evidence, evidence.weight 0.4",
    ]


def test_agreement_is_the_share_of_equal_classes_of_scored_images(row, card, worker, tiny_clip):
    names = [entry["name"] for entry in card.classifiers]
    assert names == ["text", "evidence", "real images"]
    assert (card.pool_images, card.validation_images) == (POOL, POOL)
    assert [entry["images"] for entry in card.classifiers] == [POOL, SCORED, POOL]
    assert card.classifiers[1]["methods"] == ["cpl_evidence", "cpl_real_evidence"]
    target = read_target(row.features, row.split, worker.store)
    text = text_classifier(tiny_clip, target.text.classnames, target.text.template)
    logits = text.logits(target.batch(target.split.pool))
    spec = row.trials[0][1].evidence_errors
    scores = mean_scores(read_evidence(spec, 1, SCORED, worker.store))
    scored = scores.isfinite().any(dim=1)
    same = (scores.argmax(dim=1) == logits.argmax(dim=1))[scored].double().mean()
    assert card.agreement[0][1] == card.agreement[1][0] == pytest.approx(float(same), abs=1e-4)
    assert [shares[i] for i, shares in enumerate(card.agreement)] == [1, 1, 1]
    only, real = card.fused
    assert only["disputed"] == pytest.approx((1 - float(same)) * SCORED / POOL, abs=1e-4)
    assert only["changed"] <= only["disputed"] <= real["disputed"]


def test_validation_images_measure_text_and_images_but_not_evidence(row, card, worker, tiny_clip):
    target = read_target(row.features, row.split, worker.store)
    text = text_classifier(tiny_clip, target.text.classnames, target.text.template)
    images = target.labelled(target.split.validation)
    right = text.logits(images.batch).argmax(dim=1) == images.labels
    first, evidence, real = card.classifiers
    assert first["accuracy"] == pytest.approx(float(right.double().mean()))
    assert real["gain"] == pytest.approx(real["accuracy"] - first["accuracy"], abs=2e-4)
    assert real["low"] <= real["gain"] <= real["high"]
    assert evidence["accuracy"] is evidence["gain"] is None
    screen = agreement_screen(card)
    assert "Evidence scores pool images only, so no validation image measures it" in screen
    assert max(map(len, screen.splitlines())) <= 80
    assert card_from_json(card_json(card), AgreementCard) == card


@pytest.mark.parametrize(
    ("part", "fields"), [("train", set()), ("test", set()), ("val", {"classifiers", "fused"})]
)
def test_labels_of_pool_and_test_change_nothing(
    row, card, worker, arrays, tmp_path, part: str, fields: set[str]
):
    store = store_with(tmp_path / "runs", row.features, relabelled(arrays, part))
    [evidence] = worker.store.artifacts.glob("evidence")
    shutil.copytree(evidence, store.artifacts / "evidence")
    other = make_agreement_card(row, WorkerContext(store))
    assert {name for name, value in vars(card).items() if getattr(other, name) != value} == fields


def test_a_pool_with_all_validation_images_has_no_accuracy(row, arrays, tmp_path):
    whole = replace(row, split=replace(row.split, pool="train+val"))
    specs: Any = tuple((label, replace(spec, pool="train+val")) for label, spec in row.trials[:1])
    whole = replace(whole, trials=specs)
    context = WorkerContext(store_with(tmp_path / "runs", row.features, arrays))
    score(whole, context)
    card = make_agreement_card(whole, context)
    assert (card.pool_images, card.validation_images) == (2 * POOL, 0)
    assert all(entry["accuracy"] is None for entry in (*card.classifiers, *card.fused))
    assert "no accuracy is known" in " ".join(agreement_screen(card).split())


def test_in_trzsl_the_images_of_unseen_classes_are_compared(resolver, arrays, tmp_path):
    few = {"evidence.images": 4, "auxiliary.kind": "prototype"}
    fixed = {**SWEEP.fixed, **few, "paradigm": "trzsl"}
    cells = cells_of(replace(SWEEP, grid={"method": ("cpl_real_evidence",)}, fixed=fixed))
    [row] = agreement_rows(cells, SWEEP.seeds.assignments(), resolver)
    worker = WorkerContext(store_with(tmp_path / "runs", row.features, arrays))
    score(row, worker)
    card = make_agreement_card(row, worker)
    target = read_target(row.features, row.split, worker.store)
    assert target.split.unseen is not None
    labels = target.labels[target.split.validation]
    assert card.pool_images == len(target.split.pool) < POOL
    assert card.validation_images == int(torch.isin(labels, target.split.unseen).sum()) < POOL
    assert "TRZSL, class seed 500" in agreement_screen(card)


def test_trials_whose_errors_are_not_computed_are_left_out(resolver, worker, arrays, tmp_path):
    fixed = {key: value for key, value in SWEEP.fixed.items() if key != "evidence.draws"}
    grid = {"method": ("cpl_evidence",), "evidence.draws": (1, 3)}
    cells = cells_of(replace(SWEEP, grid=grid, fixed=fixed))
    rows = agreement_rows(cells, SWEEP.seeds.assignments(), resolver)
    [part] = complete_rows(rows, SweepLocation(worker.store, "default", "x", None))
    assert isinstance(part, AgreementRow)
    assert [label for label, _ in part.trials] == ["cpl_evidence, evidence.draws 1"]
    empty = store_with(tmp_path / "runs", part.features, arrays)
    with pytest.raises(ValueError, match="not made yet: 0 of 6 blocks"):
        complete_rows(rows, SweepLocation(empty, "default", "x", None))
