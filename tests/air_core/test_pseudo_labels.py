"""Tests of single strategies; tests/spec/test_components.py has the contract of all."""

from __future__ import annotations

import pytest
import torch

from air_core.pseudo_labels import assign, balanced_choice, candidate_sets, capacity, spread
from air_core.settings import PseudoLabelSettings
from air_core.settings.components import STRATEGIES
from air_core.types import ROWS, Classes, PseudoLabels, SparseTargets, sparse

pytestmark = pytest.mark.usefixtures("small_chunks")


def some_scores(images: int = 120, classes: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(images, classes, generator=generator)).softmax(dim=-1)


@pytest.mark.parametrize("kind", [kind for kind in STRATEGIES if "k" in STRATEGIES[kind].reads])
@pytest.mark.parametrize("growth", ["fixed", "growing"])
def test_a_class_gets_no_more_images_than_its_slots(kind, growth):
    scores = some_scores()
    settings = PseudoLabelSettings(kind=kind, growth=growth, k=5, alpha=0.7, beta=0.5)
    previous = None
    for iteration in range(4):
        previous = assign(scores, settings, iteration=iteration, iterations=4, previous=previous)
        most = previous.labels.bincount().max().item()
        assert most <= capacity(settings, *scores.shape, iteration, 4)
        is_soft = not set(previous.targets.values.tolist()) <= {0.0, 1.0}
        assert is_soft == ((kind, growth, iteration) == ("candidates", "growing", 0))


def test_upl_selects_the_most_confident_images_of_each_predicted_class():
    scores = some_scores(120, 6)
    settings = PseudoLabelSettings(kind="predicted", growth="fixed", k=5)
    labels = assign(scores, settings, iteration=0, iterations=1, previous=None)
    confidence, best = scores.max(dim=1)
    for c in range(6):
        members = (best == c).nonzero().flatten()
        strongest = members[confidence[members].argsort(descending=True)[:5]]
        assert labels.indices[labels.labels == c].tolist() == sorted(strongest.tolist())


def test_the_threshold_is_inclusive_and_the_most_confident_image_is_always_selected():
    scores = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
    for threshold, expected in ((0.75, [0, 2]), (0.9, [2])):
        settings = PseudoLabelSettings(kind="threshold", threshold=threshold)
        labels = assign(scores, settings, iteration=0, iterations=1, previous=None)
        assert labels.indices.tolist() == expected


def test_no_selected_image_is_an_error_that_names_the_settings():
    scores = torch.full((0, 3), 1 / 3)
    with pytest.raises(ValueError, match="no pool image was selected"):
        assign(scores, PseudoLabelSettings(kind="top_k"), iteration=0, iterations=1, previous=None)


# ---------------------------------------------------------------- plain references, with ties


def rounded_scores(case: int) -> torch.Tensor:
    """Many scores of an image and of a class are equal."""
    images, classes = [(1, 1), (7, 3), (40, 5), (61, 9)][case % 4]
    return (some_scores(images, classes, case) * 8).round() / 8


def plain_sets(scores: torch.Tensor, alpha: float, beta: float) -> list[list[bool]]:
    enough, least = scores.amax(dim=1).quantile(alpha), scores.quantile(beta, dim=0)
    sets = []
    for row in scores:
        mass, plausible = torch.zeros(()), [False] * len(row)
        for c in sorted(range(len(row)), key=lambda c: (-row[c], c)):
            plausible[c] = bool(mass <= enough and row[c] >= least[c])
            mass += row[c]
        sets.append(plausible)
    return sets


def plain_choice(scores: torch.Tensor, slots: list[int], allowed: torch.Tensor) -> list[int]:
    """Gale and Shapley's algorithm: one proposal at a time."""
    images, classes = range(scores.shape[0]), range(scores.shape[1])
    lists = {
        i: sorted((c for c in classes if allowed[i, c]), key=lambda c: (-scores[i, c], c))
        for i in images
    }
    choice, waiting = [-1 for _ in images], [*images]
    while waiting:
        i = waiting.pop()
        if not lists[i]:
            continue
        c = choice[i] = lists[i].pop(0)
        held = sorted((j for j in images if choice[j] == c), key=lambda j: (-scores[j, c], j))
        for j in held[slots[c] :]:
            choice[j] = -1
            waiting.append(j)
    return choice


@pytest.mark.parametrize("case", range(8))
def test_candidate_sets_equal_a_plain_reference(case):
    scores = rounded_scores(case)
    for alpha, beta in ((0.75, 0.9), (0.3, 0.5), (0.0, 1.0), (1.0, 0.0)):
        found = candidate_sets(scores, alpha, beta)
        assert found.tolist() == plain_sets(scores, alpha, beta)


@pytest.mark.parametrize("case", range(8))
def test_deferred_acceptance_equals_a_plain_reference(case):
    scores, draws = rounded_scores(case), torch.Generator().manual_seed(case)
    slots = torch.randint(0, 6, scores.shape[1:], generator=draws)
    some = torch.rand(scores.shape, generator=draws) < 0.5
    for allowed in (None, some):
        expected = plain_choice(
            scores, slots.tolist(), torch.ones_like(some) if allowed is None else allowed
        )
        assert balanced_choice(scores, slots, allowed).tolist() == expected


# ---------------------------------------------------------------- targets without zeros


def some_targets(images: int = ROWS + 50, classes: int = 7) -> torch.Tensor:
    """Soft targets of one to all classes."""
    sets = torch.rand(images, classes) < torch.rand(images, 1)
    sets[torch.arange(images), torch.randint(classes, (images,))] = True
    return sets * torch.rand(images, classes)


def test_sparse_targets_give_the_rows_that_they_were_made_from():
    dense = some_targets()
    targets = sparse(dense)
    rows = torch.randint(len(dense), (64,))
    assert torch.equal(targets[rows], dense[rows])
    assert torch.equal(targets.dense(), dense)
    assert len(targets) == len(dense)
    labels = torch.randint(7, (30,))
    one_hot = SparseTargets.one_hot(labels, 7, torch.float32)
    assert torch.equal(one_hot.dense(), torch.nn.functional.one_hot(labels, 7).float())


def test_an_update_keeps_the_zeros_of_sparse_targets():
    dense, new = some_targets(), torch.rand(ROWS + 50, 7)
    targets = sparse(dense)
    targets.update(lambda rows: new[rows])
    assert torch.equal(targets.dense(), new * (dense > 0))


def test_targets_of_unseen_classes_are_spread_to_all_classes():
    dense, unseen = some_targets(20, 3), torch.tensor([1, 2, 5])
    labels = PseudoLabels(torch.arange(20), dense, torch.zeros(20, dtype=torch.int64))
    every = spread(labels, Classes(6, unseen))
    assert torch.equal(every.targets.dense()[:, unseen], dense)
    assert every.targets.dense()[:, [0, 3, 4]].sum() == 0
    assert set(every.labels.tolist()) == {1}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_targets_take_memory_for_their_classes_only(kind):
    scores = some_scores(1000, 100)
    settings = PseudoLabelSettings(kind=kind, growth="fixed", k=10)
    labels = assign(scores, settings, iteration=0, iterations=1, previous=None)
    kept = (labels.targets.dense() > 0).sum().item()
    assert kept < 6 * len(labels)
    arrays = (labels.targets.starts, labels.targets.classes, labels.targets.values)
    assert sum(array.nbytes for array in arrays) <= 8 * (len(labels) + 1) + 8 * (kept + 1)
