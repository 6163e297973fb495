"""Paradigms by contract: what a split may never do, for every dataset and paradigm."""

from __future__ import annotations

import itertools
import typing
from functools import cache

import numpy as np
import pytest

from air_core.datasets import DATASETS, Examples
from air_core.paradigms import make_split
from air_core.specs import SplitSettings
from air_core.types import Split

PARADIGMS = typing.get_args(typing.get_type_hints(SplitSettings)["paradigm"])
POOLS = typing.get_args(typing.get_type_hints(SplitSettings)["pool"])
EVERY = pytest.mark.parametrize(
    ("name", "paradigm", "pool"), list(itertools.product(DATASETS, PARADIGMS, POOLS))
)


@cache
def load(name: str) -> Examples:
    return DATASETS[name].load(None)


def split(name: str, paradigm: str = "ul", pool: str = "train", seed: int = 0) -> Split:
    examples = load(name)
    settings = SplitSettings(paradigm=paradigm, pool=pool, split_seed=seed)
    return make_split(examples.labels, examples.parts, settings)


def parts(found: Split) -> list[set[int]]:
    return [set(part.tolist()) for part in (found.pool, found.validation, found.test)]


@EVERY
def test_the_parts_are_disjoint_and_cover_every_image(name, paradigm, pool):
    pool_, validation, test = parts(split(name, paradigm, pool))
    assert not pool_ & validation
    assert not pool_ & test
    assert not validation & test
    assert pool_ | validation | test == set(range(len(load(name).labels)))


@EVERY
def test_the_pool_never_holds_a_test_image_whatever_the_seed(name, paradigm, pool):
    for seed in range(5):
        pool_, _, test = parts(split(name, paradigm, pool, seed))
        assert pool_
        assert test
        assert not pool_ & test


@EVERY
def test_the_same_seed_gives_the_same_split(name, paradigm, pool):
    assert parts(split(name, paradigm, pool, 3)) == parts(split(name, paradigm, pool, 3))


@EVERY
def test_positions_ascend(name, paradigm, pool):
    found = split(name, paradigm, pool)
    for part in (found.pool, found.validation, found.test):
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize("name", DATASETS)
def test_the_validation_images_are_the_same_for_every_seed(name):
    first, *others = [parts(split(name, seed=seed))[1] for seed in range(4)]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", DATASETS)
def test_a_pool_that_takes_validation_in_leaves_none_and_moves_no_test_image(name):
    apart, together = split(name, pool="train"), split(name, pool="train+val")
    assert len(together.validation) == 0
    assert parts(together)[0] == parts(apart)[0] | parts(apart)[1]
    assert parts(together)[2] == parts(apart)[2]


def test_digits_are_split_into_1077_180_and_540():
    found = split("digits")
    assert [len(part) for part in (found.pool, found.validation, found.test)] == [1077, 180, 540]
    assert len(split("digits", pool="train+val").pool) == 1257


def test_another_seed_moves_the_digits_between_pool_and_test():
    one, other = parts(split("digits", seed=0)), parts(split("digits", seed=1))
    assert one[2] != other[2]
    assert one[0] | one[2] == other[0] | other[2]


@pytest.mark.parametrize("seed", range(3))
def test_pool_and_test_have_the_same_share_of_every_class(seed):
    labels, found = load("digits").labels, split("digits", seed=seed)
    shares = [np.bincount(labels[part]) / len(part) for part in (found.pool, found.test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.003


# ---------------------------------------------------------------- datasets with parts of their own

LABELS = np.arange(12) % 2
FIXED = np.array(["train", "val", "test"] * 4)


def test_parts_that_a_dataset_fixes_are_kept_for_every_seed():
    for seed in range(3):
        found = make_split(LABELS, FIXED, SplitSettings(pool="train", split_seed=seed))
        assert parts(found) == [{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8, 11}]


@pytest.mark.parametrize(
    ("there", "pool", "counts"), [("test", "train+val", "0 pool"), ("train", "train", "0 test")]
)
def test_a_split_without_pool_or_test_is_an_error_that_counts_both(there, pool, counts):
    with pytest.raises(ValueError, match=f"{counts}.*both need at least one"):
        make_split(LABELS, np.full(12, there), SplitSettings(pool=pool))
