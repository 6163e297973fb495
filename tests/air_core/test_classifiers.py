"""Text, auxiliary and fused classifiers on toy features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from air_core.auxiliary import CACHE_SHARPNESS, auxiliary_classifier, high_fidelity
from air_core.classifiers import FusedClassifier, LinearClassifier, fuse
from air_core.settings import AuxiliarySettings, FidelitySettings
from air_core.settings.components import AUXILIARIES
from air_core.transduction import transductive
from air_core.types import Classes, Encoded, Labelled

pytestmark = pytest.mark.usefixtures("small_chunks")


def toy(seed: int, per_class: int, shift: float = 0.0) -> Labelled:
    """Three classes around three directions in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    noise = 0.3 * torch.randn(len(labels), 8, generator=generator)
    moved = shift * torch.eye(8)[0]
    return Labelled(Encoded(normalize(torch.eye(8)[labels] + noise + moved, dim=-1)), labels)


TEXT = torch.eye(8)[:3]  # what the classes' texts would be


def accuracy(classifier: LinearClassifier, images: Labelled) -> float:
    guess = classifier.logits(images.images).argmax(dim=-1)
    return (guess == images.labels).double().mean().item()


class OfLogits:
    """A classifier of images whose features are their logits."""

    def logits(self, images: Encoded) -> torch.Tensor:
        return images.features


def test_fused_scores_rank_like_the_sum_of_the_paper():
    text, auxiliary = torch.randn(50, 4), torch.randn(50, 4)
    paper = text.softmax(dim=-1) + 2.0 * auxiliary.softmax(dim=-1)
    fused = FusedClassifier(OfLogits(), OfLogits(), 2 / 3, "probability", Classes(4))
    torch.testing.assert_close(fused.fused_scores(text, auxiliary), paper / 3)


@pytest.mark.parametrize("kind", AUXILIARIES)
@pytest.mark.parametrize("center", [True, False])
def test_an_auxiliary_classifier_learns_from_images_of_known_class(kind, center):
    bank, target = toy(0, 40), toy(1, 40)
    settings = AuxiliarySettings(kind=kind, center=center)
    found = auxiliary_classifier(settings, bank, None, target.images, 3, 20.0)
    assert accuracy(found, target) > 0.9


def test_centring_removes_a_shift_between_synthetic_and_real():
    bank, target = toy(0, 40, shift=0.8), toy(1, 40)
    kinds = [AuxiliarySettings(kind="lda", center=center) for center in (True, False)]
    found = [auxiliary_classifier(kind, bank, None, target.images, 3, 20.0) for kind in kinds]
    assert accuracy(found[0], target) > accuracy(found[1], target)
    torch.testing.assert_close(found[0].center, target.images.features.mean(dim=0))


@pytest.mark.parametrize("copies", [1, 3])
def test_lda_of_identical_images_is_an_error_that_explains_it(copies):
    bank, target = toy(0, 1), toy(1, 40)
    same = bank[torch.arange(len(bank)).repeat(copies)]
    with pytest.raises(ValueError, match=r"auxiliary\.kind lda.*one image of each class"):
        auxiliary_classifier(AuxiliarySettings(kind="lda"), same, None, target.images, 3, 20.0)


def test_a_linear_probe_does_not_depend_on_how_often_a_class_has_its_images():
    bank, settings = toy(0, 10), AuxiliarySettings(kind="linear_probe", center=False)
    often = bank[torch.cat([torch.arange(10).repeat(3), torch.arange(10, 30)])]
    one, other = (
        auxiliary_classifier(settings, each, None, bank.images, 3, 20.0) for each in (bank, often)
    )
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-3)
    # It starts at the class means, at CLIP's temperature.
    means = auxiliary_classifier(
        replace(settings, kind="prototype"), bank, None, bank.images, 3, 1.0
    )
    assert (one.weight - 20.0 * means.weight).abs().max() < 2.0


def test_lda_equals_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    bank, target = toy(0, 40), toy(1, 40)
    ours = auxiliary_classifier(
        AuxiliarySettings(kind="lda", center=False), bank, None, target.images, 3, 1.0
    )
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=[1 / 3] * 3).fit(
        bank.images.features.double().numpy(), bank.labels.numpy()
    )
    scores = torch.from_numpy(theirs.decision_function(target.images.features.double().numpy()))
    # Theirs divides the covariance by the number of images, ours by the degrees of freedom.
    expected = (scores - math.log(1 / 3)) * (120 - 3) / 120
    torch.testing.assert_close(ours.logits(target.images).double(), expected, rtol=1e-4, atol=1e-3)


def test_synthetic_and_real_images_are_centred_separately():
    real, synthetic = toy(2, 40), toy(3, 40, shift=0.8)
    settings = AuxiliarySettings(kind="prototype", source="both")
    both = auxiliary_classifier(settings, synthetic, real, real.images, 3, 20.0)
    assert accuracy(both, toy(4, 40)) > 0.9


def test_the_error_for_a_class_without_images_names_the_class():
    bank = toy(0, 5)
    some = bank.labels < 2
    only = Labelled(bank.images[some], bank.labels[some])
    with pytest.raises(ValueError, match=r"class \[2\]"):
        auxiliary_classifier(AuxiliarySettings(), only, None, bank.images, 3, 20.0)


@pytest.mark.parametrize("kind", ["text", "real_mean", "random", "class_mean"])
def test_fidelity_keeps_the_nearest_images_of_each_class(kind):
    """Of `real_mean` nearest to the own mean where no real image has the class, as of class 0."""
    bank, real = toy(0, 20), toy(5, 9)
    real = real[real.labels > 0]
    kept = high_fidelity(bank, FidelitySettings(kind=kind, keep=5), TEXT, real)
    assert kept.labels.bincount().tolist() == [5, 5, 5]
    for c in range(3):
        members = bank.images.features[bank.labels == c]
        of_real = real.images.features[real.labels == c] if c else members
        mean, real_mean = (normalize(each.mean(dim=0), dim=-1) for each in (members, of_real))
        to = {"text": TEXT[c], "class_mean": mean, "real_mean": real_mean}.get(kind)
        if to is not None:
            least = (kept.images.features[kept.labels == c] @ to).min()
            assert least >= (members @ to).sort(descending=True).values[4] - 1e-6
    assert high_fidelity(bank, FidelitySettings(kind="none"), TEXT, None) is bank


def test_fidelity_by_argmax_keeps_recognised_images_and_at_least_one_per_class():
    bank = toy(0, 20)
    wrong = Labelled(bank.images, (bank.labels + 1) % 3)  # no image looks like its class
    kept = high_fidelity(wrong, FidelitySettings(kind="argmax"), TEXT, None)
    assert kept.labels.bincount(minlength=3).tolist() == [2, 1, 1]
    right = high_fidelity(bank, FidelitySettings(kind="argmax"), TEXT, None)
    guess = (right.images.features @ TEXT.T).argmax(dim=-1)
    assert torch.equal(guess, right.labels)


def test_a_geometric_mean_is_fused_where_the_space_is_logits():
    text, auxiliary = torch.randn(50, 4), torch.randn(50, 4)
    product = text.softmax(-1) ** 0.25 * auxiliary.softmax(-1) ** 0.75
    expected = product / product.sum(dim=-1, keepdim=True)
    fused = FusedClassifier(OfLogits(), OfLogits(), 0.75, "logit", Classes(4))
    torch.testing.assert_close(fused.fused_scores(text, auxiliary), expected)


def test_in_trzsl_the_auxiliary_redistributes_the_scores_of_unseen_classes():
    images = toy(0, 10)
    text = LinearClassifier(torch.eye(8)[:5], torch.zeros(5), torch.zeros(8), False, 5.0)
    auxiliary = LinearClassifier(torch.eye(8)[:2], torch.zeros(2), torch.zeros(8), False, 5.0)
    unseen = torch.tensor([1, 4])
    both = fuse(text, auxiliary, images.images, Classes(5, unseen), 0.5, "logit_scale")
    scores, alone = both.scores(images.images), text.logits(images.images).softmax(dim=-1)
    seen = torch.tensor([0, 2, 3])
    torch.testing.assert_close(scores[:, seen], alone[:, seen])
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(30))
    own = both.pool_scores(images.images)
    assert own.shape == (30, 2)
    mass = alone[:, unseen].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(scores[:, unseen], own * mass)


def test_matching_makes_the_auxiliary_as_confident_as_the_text():
    bank, pool = toy(0, 10), toy(1, 40).images
    settings = AuxiliarySettings(kind="prototype")
    text, auxiliary = (
        auxiliary_classifier(settings, bank, None, pool, 3, sharpness) for sharpness in (3.0, 90.0)
    )
    fused = fuse(text, auxiliary, pool, Classes(3), 0.5, "match_confidence")
    found, wanted = (
        one.logits(pool).softmax(dim=-1).amax(dim=-1).mean() for one in (fused.auxiliary, text)
    )
    assert found.item() == pytest.approx(wanted.item(), abs=1e-3)
    assert fuse(text, auxiliary, pool, Classes(3), 0.5, "kappa").auxiliary is auxiliary


def test_an_image_without_evidence_has_no_vote():
    q = torch.tensor([[0.1, 0.8, 0.1], [torch.nan] * 3])
    fused = FusedClassifier(OfLogits(), None, 0.0, "probability", Classes(3), q)
    votes = fused.votes(OfLogits(), Encoded(torch.eye(3)[:2]))
    assert {name: vote.tolist() for name, vote in votes.items()} == {
        "text": [0, 1],
        "evidence": [1, -1],
    }


def plain_mixture(prior: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Scores (N, C) of a mixture that is fitted to x, with all rows at once."""

    def likelihood() -> torch.Tensor:
        return -0.5 * (precision * (x[:, None] - means) ** 2).sum(dim=2)

    cosines, near = (x @ x.T).fill_diagonal_(-1.0).topk(3)
    shares, precision = prior, torch.full((8,), 8.0)
    means = normalize(shares.T @ x)
    for _ in range(10):
        neighbours = (cosines.clamp(min=0)[:, :, None] * shares[near]).sum(dim=1)
        shares = (prior.log() + likelihood() + neighbours).softmax(dim=1)
        means = normalize(shares.T @ x)
        precision = 1 / (shares[:, :, None] * (x[:, None] - means) ** 2).sum(dim=1).mean(dim=0)
    return (prior.log() + likelihood()).softmax(dim=1)


@pytest.mark.parametrize("unseen", [[0, 1, 2], [0, 2]])
def test_a_mixture_over_the_pool_equals_a_plain_reference(unseen):
    """In TRZSL it redistributes the scores of the unseen classes."""
    pool, text = (
        toy(1, 30).images,
        LinearClassifier(TEXT, torch.zeros(3), torch.zeros(8), False, 5.0),
    )
    alone = text.logits(pool).softmax(dim=1)
    mass = alone[:, unseen].sum(dim=1, keepdim=True)
    expected = alone.clone()
    expected[:, unseen] = mass * plain_mixture(alone[:, unseen] / mass, pool.features)
    classes = Classes(3, torch.tensor(unseen) if len(unseen) < 3 else None)
    found = transductive(text, pool, classes).logits(pool).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_knn_and_cache_equal_a_plain_reference_where_classes_differ_in_size():
    images, pool = toy(0, 6), toy(1, 10).images
    images = images[torch.tensor([0, 1, 2, 6, 7, 8, 9, 12, 13])]  # 3, 4 and 2 of the classes
    # The smallest class has fewer images than nine neighbours.
    for kind, neighbours, nearest in (("knn", 1, 1), ("knn", 9, 2), ("cache", 1, 1)):
        settings = AuxiliarySettings(kind=kind, center=False, neighbours=neighbours)
        found = auxiliary_classifier(settings, images, None, pool, 3, 20.0).logits(pool)
        cosines = pool.features @ images.images.features.T
        for c in range(3):
            own = cosines[:, images.labels == c]
            near = own.sort(descending=True).values[:, :nearest].mean(dim=1)
            affinity = (-CACHE_SHARPNESS * (1 - own)).exp().mean(dim=1)
            torch.testing.assert_close(found[:, c], 20 * (near if kind == "knn" else affinity))
