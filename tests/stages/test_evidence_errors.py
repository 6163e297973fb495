"""Denoising errors in a store: prefixes, samples, pruning, no true label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import MissingArtifact
from orchestrator.stages import EvidenceSpec
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import build as build_evidence_block
from orchestrator.stages.evidence import open_model, read_evidence
from tests.helpers.features import Arrays, digit_features, relabelled, store_with

IMAGES, POOL, BLOCK = 60, 20, 8  # of the digits
FLAT = {
    "evidence.draws": 2, "lora": None, "images_per_class": 0, "pool": "train",
    "evidence.block": BLOCK, "evidence.precision": "fp32",
    "generation.size": 32, "generation.block": 2, "generation.num_inference_steps": 2,
    "generation.precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(resolver) -> EvidenceSpec:
    found: EvidenceSpec = resolver.trial(FLAT).evidence_errors
    return found


@pytest.fixture(scope="module")
def arrays(tiny_clip) -> Arrays:
    return digit_features(tiny_clip.encode_images, IMAGES, ("train", "val", "test"))


def worker_with(folder: Path, spec: EvidenceSpec, arrays: Arrays) -> WorkerContext:
    """A worker with a store that has these features."""
    return WorkerContext(store_with(folder, spec.features, arrays))


@pytest.fixture
def worker(tmp_path, spec, arrays) -> WorkerContext:
    return worker_with(tmp_path / "runs", spec, arrays)


def build(spec: EvidenceSpec, shards: Any, worker: WorkerContext) -> float:
    """Build shards with a model of its own, as an actor does; returns the pairs computed."""
    scorer = open_model(spec, worker)
    reports: list[tuple[int, int]] = []
    scorer.report = lambda done, total: reports.append((done, total))
    pairs = sum(
        build_evidence_block(spec, draw, block, worker, lambda: scorer)["pairs"]
        for draw, block in shards
    )
    assert sum(total for done, total in reports if done == total) == pairs
    return pairs


def everything(draws: int) -> list[tuple[int, int]]:
    return [(draw, block) for block in range(3) for draw in range(draws)]


def test_more_draws_and_more_images_keep_the_first_and_compute_the_others(spec, worker):
    assert build(spec, [(0, 0), (0, 1)], worker) == 2 * BLOCK * 10
    sample = read_evidence(spec, 1, 2 * BLOCK, worker.store)
    scored = sample.isfinite().all(dim=2)[0]
    assert scored.sum() == 2 * BLOCK
    with pytest.raises(MissingArtifact, match="airsweep run SPEC --prepare"):
        read_evidence(spec, 1, None, worker.store)
    assert build(spec, everything(3), worker) == (3 * POOL - 2 * BLOCK) * 10
    assert torch.equal(read_evidence(spec, 1, None, worker.store)[0][scored], sample[0][scored])
    one, three = (read_evidence(spec, draws, None, worker.store).mean() for draws in (1, 3))
    assert three == pytest.approx(one, rel=0.5)  # a mean, not a sum
    few = read_evidence(spec, 3, 5, worker.store)
    assert few.isfinite().all(dim=2).sum() == 5


def test_pruning_computes_the_first_draws_and_then_few_classes(spec, worker):
    pruning = replace(spec, scoring=replace(spec.scoring, top=6, prune_after=2, prune_to=3))
    # The last draw is requested first, as it may be on a cluster.
    assert build(pruning, [(2, 0)], worker) == BLOCK * (2 * 6 + 3)
    assert build(pruning, everything(3), worker) == (POOL - BLOCK) * (2 * 6 + 3)
    [first], [all_draws] = (read_evidence(pruning, n, None, worker.store) for n in (2, 3))
    assert first.isfinite().sum(dim=1).tolist() == [6] * POOL
    kept, means = all_draws.isfinite(), first.nan_to_num(torch.inf)
    assert kept.sum(dim=1).tolist() == [3] * POOL
    assert (
        torch.where(kept, means, 0)
        .amax(dim=1)
        .le(torch.where(kept, torch.inf, means).amin(dim=1))
        .all()
    )


@pytest.mark.parametrize("part", ["train", "test"])
def test_true_labels_do_not_change_the_errors(spec, arrays, tmp_path, part):
    found = []
    for name, version in {"true": arrays, "other": relabelled(arrays, part)}.items():
        worker = worker_with(tmp_path / name, spec, version)
        build(spec, everything(1), worker)
        found.append(read_evidence(spec, 1, None, worker.store))
    assert torch.equal(*found)
