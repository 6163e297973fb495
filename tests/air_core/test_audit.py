"""The audit on toy features and real digits, and the filter with the same measures."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn.functional import normalize

from air_core.audit import (
    BITS,
    SUBSET,
    SUBSETS,
    ImageSet,
    ReferenceImages,
    audit,
    difference_hash,
    kid,
    spread,
)
from air_core.auxiliary import copies, credible, margins
from air_core.method import usable_synthetic
from air_core.specs import FidelitySettings, Ref, TrialSpec
from air_core.types import Batch, Labelled

D, EACH = 16, 12
REF = Ref(name="x", digest="x")


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    from air_core.datasets import get_dataset

    return list(get_dataset("digits").load(None).images[:60])


def toy(seed: int = 0, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of three classes around three axes, 12 of each."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(EACH)
    features = torch.eye(D)[labels] + noise * torch.randn(3 * EACH, D, generator=rng)
    return normalize(features, dim=-1), labels


def a_set(features: torch.Tensor, labels: torch.Tensor) -> ImageSet:
    """An image set in which all pictures differ."""
    count = len(labels)
    hashes = torch.rand(count, 256, generator=torch.Generator().manual_seed(1)) < 0.5
    held = torch.ones(count, dtype=torch.bool)
    return ImageSet(features, labels, hashes, torch.full((count,), 60.0), held)


def logits_of(features: torch.Tensor) -> torch.Tensor:
    return 10 * features @ torch.eye(D)[:3].T


def around(test: torch.Tensor | None = None, **known: torch.Tensor) -> ReferenceImages:
    pool, _ = toy(7)
    return ReferenceImages(
        pool, None, toy(8)[0] if test is None else test, lambda i: known.get(f"t{i}")
    )


def found(images: ImageSet, about: ReferenceImages | None = None) -> list[tuple[str, int, int]]:
    result = audit(images, logits_of(images.features), about or around())
    return [(one.reason, one.image, one.other) for one in result.findings]


# ---------------------------------------------------------------- pixels


def saved_again(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return Image.open(buffer).convert("RGB")


def test_the_hash_is_equal_for_altered_copies_and_differs_for_other_pictures(digits):
    hashes = [difference_hash(picture) for picture in digits]
    for picture, known in zip(digits, hashes, strict=True):
        for changed in (
            saved_again(picture),
            picture.resize((96, 96), Image.Resampling.BICUBIC),
            ImageEnhance.Brightness(picture).enhance(0.9),
        ):
            assert int((difference_hash(changed) ^ known).sum()) <= BITS
    differ = [int((a ^ b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert np.mean(np.array(differ) <= BITS) < 0.01


def test_spread_is_the_largest_of_the_channels():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    assert spread(Image.fromarray(pixels)) == 0
    pixels[:2, :, 1] = 100
    assert spread(Image.fromarray(pixels)) == 50


# ---------------------------------------------------------------- findings


def test_a_clean_set_has_no_findings():
    assert found(a_set(*toy())) == []


def test_a_duplicate_repeats_an_earlier_image_by_cosine_and_by_hash():
    features, labels = toy()
    features = features.clone()
    features[[5, 9, 20]] = features[2].clone()  # 20 is of another class
    images = a_set(features, labels)
    assert [one for one in found(images) if one[0] == "duplicate"] == []  # the pictures differ
    hashes = images.hashes.clone()
    hashes[[5, 9, 20]] = hashes[2].clone()
    named = found(replace(images, hashes=hashes))
    assert [one for one in named if one[0] == "duplicate"] == [
        ("duplicate", 5, 2),
        ("duplicate", 9, 2),
    ]
    hashes[9, : BITS + 1] = ~hashes[9, : BITS + 1]
    named = found(replace(images, hashes=hashes))
    assert [one for one in named if one[0] == "duplicate"] == [("duplicate", 5, 2)]


def test_the_wrong_class_needs_a_margin_and_neighbours():
    features, labels = toy()
    swapped = features.clone()
    swapped[3] = features[2 * EACH + 1]  # labelled as class 0, similar to class 2
    assert found(a_set(swapped, labels)) == [("wrong class", 3, 2)]
    images = a_set(features, labels)
    against = logits_of(features)
    against[3] = torch.tensor([0.0, 0.0, 9.0])  # the margin alone is not enough
    assert audit(images, against, around()).findings == ()
    against = logits_of(swapped)
    against[3] = torch.tensor([9.0, 0.0, 0.0])  # neighbours alone are not enough
    assert audit(a_set(swapped, labels), against, around()).findings == ()


def test_a_test_image_is_found_by_features_and_confirmed_by_its_picture():
    features, labels = toy()
    images = a_set(features, labels)
    test, _ = toy(8)
    test = test.clone()
    test[4] = features[30]
    assert found(images, around(test, t4=images.hashes[30])) == [("test copy", 30, 4)]
    assert found(images, around(test, t4=~images.hashes[30])) == []
    assert found(images, around(test)) == []  # the picture cannot be read
    assert found(images, around(test[:0])) == []  # no image is labelled for test


def test_an_image_without_content_has_one_finding_and_no_numbers():
    features, labels = toy()
    features = features.clone()
    features[1] = features[0]
    features[8] = torch.nan
    images = a_set(features, labels)
    levels, held = images.spread.clone(), images.held.clone()
    levels[1], levels[4], held[6] = 0.0, 6.0, False
    result = audit(replace(images, spread=levels, held=held), logits_of(features), around())
    assert [(one.reason, one.image) for one in result.findings] == [
        *(("blank", 1), ("blank", 6)),
        *(("near-constant", 4), ("not a number", 8)),
    ]
    assert result.sound.sum() == len(labels) - 4
    assert result.margins[[1, 4, 6, 8]].isnan().all()
    assert result.guesses[[1, 4, 6, 8]].tolist() == [-1] * 4
    assert np.isfinite(result.distance.mean)


def test_the_nearest_image_is_searched_within_the_class():
    features, labels = toy()
    result = audit(a_set(features, labels), logits_of(features), around())
    cosines = features @ features.T
    for i, j in enumerate(result.like.tolist()):
        others = [k for k in range(len(labels)) if k != i and labels[k] == labels[i]]
        assert j == max(others, key=lambda k: cosines[i, k])
    assert torch.allclose(result.test_cosine, (features @ toy(8)[0].T).amax(dim=1))


# ---------------------------------------------------------------- distance


def test_kid_is_the_unbiased_mmd_over_seeded_subsets():
    x, y = toy(1)[0].double(), toy(2)[0].double()
    rng, values = np.random.default_rng(3), []
    n = len(x)
    for _ in range(SUBSETS):
        a, b = x[rng.permutation(n)[:SUBSET]].numpy(), y[rng.permutation(n)[:SUBSET]].numpy()
        kernel = [(u @ v.T + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
        own = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernel[:2]]
        values.append(sum(own) - 2 * kernel[2].mean())
    measured = kid(x.float(), y.float(), seed=3)
    assert measured.mean == pytest.approx(np.mean(values), abs=1e-6)
    assert measured.std == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_kid_is_near_zero_for_one_kind_of_image_grows_with_the_shift_and_is_repeatable():
    rng = torch.Generator().manual_seed(0)

    def sample(shift: float) -> torch.Tensor:
        features = torch.randn(300, D, generator=rng) + 2 * torch.eye(D)[0]
        return normalize(features + shift * torch.eye(D)[1], dim=-1)

    real = sample(0)
    same, near, far = (kid(sample(shift), real) for shift in (0, 1, 3))
    assert abs(same.mean) < 3 * same.std / SUBSETS**0.5
    assert 0.05 < near.mean < far.mean
    assert kid(real, sample(0)) != same
    assert kid(real[:100], real[100:]) == kid(real[:100], real[100:])
    assert np.isnan(kid(real[:1], real).mean)


# ---------------------------------------------------------------- the filter


def bank() -> tuple[Labelled, torch.Tensor]:
    features, labels = toy()
    return Labelled(Batch(features), labels), logits_of(features)


def test_a_margin_is_the_score_of_the_class_minus_the_best_other_score():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -torch.inf]])
    scores = logits.double().softmax(dim=-1)
    expected = [float(scores[0, 2] - scores[0, 0]), float(scores[1, 0] - scores[1, 1])]
    assert margins(logits, torch.tensor([2, 0])).tolist() == pytest.approx(expected)


def test_the_filter_drops_images_below_the_margin_and_later_copies():
    images, logits = bank()
    margin = margins(logits, images.labels)
    least = float(margin.median())
    kept = credible(images, FidelitySettings(min_margin=least), logits)
    assert torch.equal(kept.batch.features, images.batch.features[margin >= least])
    features = images.batch.features.clone()
    features[[7, 9, 15]] = features[4].clone()
    doubled = Labelled(Batch(features), images.labels)
    assert copies(features, images.labels).nonzero().flatten().tolist() == [7, 9]
    kept = credible(doubled, FidelitySettings(duplicates="drop"), logits_of(features))
    assert len(kept) == len(images) - 2


def test_the_filter_keeps_the_best_image_of_each_class():
    images, logits = bank()
    logits[images.labels == 1] = torch.tensor([5.0, 0.0, 0.0])
    logits[EACH + 3] = torch.tensor([5.0, 1.0, 0.0])  # the largest margin
    kept = credible(images, FidelitySettings(min_margin=0.0, duplicates="drop"), logits)
    [left] = (kept.labels == 1).nonzero().flatten().tolist()
    assert torch.equal(kept.batch.features[left], images.batch.features[EACH + 3])
    assert set(kept.labels.tolist()) == {0, 1, 2}


def test_margins_are_over_the_drawn_classes():
    """In TRZSL all images are of unseen classes; seen classes do not count for the margin."""
    images, _ = bank()
    unseen = torch.tensor([1, 2])
    data = SimpleNamespace(synthetic=images, unseen=unseen)
    text = SimpleNamespace(
        logits=lambda batch: logits_of(batch.features) + torch.tensor([9.0, 0, 0])
    )
    spec = TrialSpec(
        dataset=REF, backbone=REF, generator=REF, fidelity=FidelitySettings(min_margin=0.0)
    )
    used = usable_synthetic(spec, data, text)
    own = logits_of(used.batch.features)[:, 1:].argmax(dim=1) + 1
    assert torch.equal(own, used.labels)
    assert len(used) > EACH
    assert usable_synthetic(replace(spec, fidelity=FidelitySettings()), data, text) is images


def test_the_filter_keeps_tokens_beside_their_features():
    images, logits = bank()
    tokens = torch.arange(len(images)).float()[:, None, None]
    whole = Labelled(Batch(images.batch.features, tokens), images.labels)
    kept = credible(whole, FidelitySettings(min_margin=0.2), logits)
    assert torch.equal(
        kept.batch.features, images.batch.features[kept.batch.tokens.flatten().long()]
    )
