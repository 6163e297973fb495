"""Contract tests of splits, on digits and on a dataset with fixed parts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from air_core.datasets import get_dataset
from air_core.datasets.stratified import stratified
from air_core.paradigms import PARADIGMS, labelled_positions, make_split, seen_unseen
from air_core.settings import SplitSettings
from air_core.types import Split


@cache
def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and parts."""
    if name == "fixed":
        return np.arange(120) % 6, np.repeat(["train", "val", "test"], 40)
    examples = get_dataset(name).load(None)
    return examples.labels, examples.parts


def split(
    name: str, paradigm: str = "ul", pool: str = "train", seed: int = 0, **more: int
) -> Split:
    settings = SplitSettings(paradigm=paradigm, pool=pool, split_seed=seed, **more)
    return make_split(*load(name), settings)


def parts(found: Split) -> list[set[int]]:
    """Images of training, validation and test."""
    train = set(found.pool.tolist()) | set(found.labelled.tolist())
    return [train, set(found.validation.tolist()), set(found.test.tolist())]


@pytest.mark.parametrize("pool", ["train", "train+val"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("name", ["digits", "fixed"])
def test_parts_are_disjoint_cover_every_image_and_follow_from_the_seed(name, paradigm, pool):
    for seed in range(5):
        found = split(name, paradigm, pool, seed)
        training, validation, test = parts(found)
        assert not training & validation
        assert not training & test  # the pool never contains a test image
        assert not validation & test
        assert training | validation | test == set(range(len(load(name)[0])))
        assert not set(found.pool.tolist()) & set(found.labelled.tolist())
        assert len(found.pool)
        assert len(found.test)
        assert (len(found.labelled) > 0) == (paradigm != "ul")
        for part in (found.pool, found.labelled, found.validation, found.test):
            assert part.tolist() == sorted(set(part.tolist()))
        assert parts(found) == parts(split(name, paradigm, pool, seed))
        first = parts(split(name, paradigm, pool))
        assert validation == first[1]  # the same for every seed
        assert name == "digits" or test == first[2]  # as fixed parts are


def test_ssl_has_shots_labels_per_class_which_depend_on_the_split_seed():
    labels, _ = load("digits")
    first, other = (split("digits", "ssl", seed=seed, shots=4) for seed in (0, 1))
    assert np.bincount(labels[first.labelled]).tolist() == [4] * 10
    assert first.unseen is None
    fixed = [split("fixed", "ssl", seed=seed).labelled.tolist() for seed in (0, 1, 0)]
    assert fixed[0] == fixed[2] != fixed[1]
    assert parts(first)[2] != parts(other)[2]


def test_trzsl_labels_no_image_of_an_unseen_class():
    labels, _ = load("digits")
    found = split("digits", "trzsl", class_seed=500)
    seen, unseen = seen_unseen(10, 500)
    assert found.unseen.tolist() == list(unseen)
    assert set(labels[found.labelled]) == set(seen)
    assert set(labels[found.pool]) == set(unseen)  # all images of seen classes are labelled


def test_a_leaky_pool_contains_the_test_images_and_is_not_the_default():
    settings = SplitSettings(leaky_pool=True)
    found = make_split(*load("fixed"), settings)
    assert set(found.test.tolist()) <= set(found.pool.tolist())
    assert not SplitSettings().leaky_pool


def test_too_few_classes_or_images_are_errors():
    with pytest.raises(ValueError, match="at least 4 classes, there are 3"):
        seen_unseen(3, 0)
    with pytest.raises(ValueError, match=r"wants 3 labelled .* class 1 has 2"):
        labelled_positions(np.array([0, 0, 0, 1, 1]), 3, 0)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_smaller_pool_is_a_subset_that_depends_on_the_split_seed(paradigm):
    whole = split("digits", paradigm)
    for seed in (0, 1):
        small = split("digits", paradigm, seed=seed, pool_size=50)
        assert len(small.pool) == 50
        assert set(small.pool.tolist()) <= set(split("digits", paradigm, seed=seed).pool.tolist())
        if paradigm != "trzsl":
            assert len(small.labelled) == len(split("digits", paradigm, seed=seed).labelled)
    assert split("digits", paradigm, pool_size=10**6).pool.tolist() == whole.pool.tolist()


def test_a_smaller_pool_has_fewer_labelled_images_of_seen_classes():
    whole, other = split("digits", "trzsl"), split("digits", "trzsl", seed=1, pool_size=30)
    small = split("digits", "trzsl", pool_size=30)
    assert len(small.labelled) == 30
    assert set(small.labelled.tolist()) < set(whole.labelled.tolist())
    assert small.labelled.tolist() != other.labelled.tolist()
    assert set(small.pool.tolist()) < set(whole.pool.tolist())  # no seen class among them
    assert len(split("digits", "ssl", pool_size=10).labelled) == 20  # shots are never left out


def test_an_imbalanced_pool_has_rare_and_missing_classes_and_the_full_test_set():
    labels, _ = load("digits")
    found = split("digits", pool_ratio=10.0, pool_missing=0.3)
    counts = np.bincount(labels[found.pool], minlength=10)
    assert (counts == 0).sum() == 3
    present = counts[counts > 0]
    assert 8 < present.max() / present.min() < 13
    assert found.test.tolist() == split("digits").test.tolist()


@pytest.mark.parametrize("name", ["digits", "fixed"])
def test_a_pool_with_validation_images_leaves_none_and_keeps_the_test_images(name):
    separate, combined = split(name, pool="train"), split(name, pool="train+val")
    if name == "digits":
        assert [len(part) for part in parts(separate)] == [1077, 180, 540]
    assert len(combined.validation) == 0
    assert parts(combined)[0] == parts(separate)[0] | parts(separate)[1]
    assert parts(combined)[2] == parts(separate)[2]


# ---------------------------------------------------------------- datasets with fixed parts

LABELS = np.arange(12) % 2


def test_a_stratified_split_is_that_of_scikit_learn():
    rng, refused = np.random.default_rng(0), 0
    for seed in range(200):
        classes = int(rng.integers(2, 40))
        labels = rng.integers(0, classes, rng.integers(2 * classes, 60 * classes))
        size = int(rng.integers(1, len(labels)))
        try:
            _, expected = train_test_split(
                np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed
            )
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="are too few"):
                stratified(labels, size, seed)
        else:
            assert sorted(stratified(labels, size, seed)) == sorted(expected)
    assert 0 < refused < 100


@pytest.mark.parametrize(
    ("part", "pool", "counts"), [("test", "train+val", "0 pool"), ("train", "train", "0 test")]
)
def test_the_error_for_an_empty_pool_or_test_part_counts_both(part, pool, counts):
    with pytest.raises(ValueError, match=f"{counts}.*both need at least one"):
        make_split(LABELS, np.full(12, part), SplitSettings(pool=pool))
