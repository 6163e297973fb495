"""Comparison with the public code of CPL and GRIP on the same inputs.

tests/fixtures/reference has the outputs of the public code; its README describes how they were
recorded. Each known difference has a test that explains it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from air_core.datasets.places import classnames_of
from air_core.losses import confidence
from air_core.paradigms import labelled_positions, seen_unseen
from air_core.pseudo_labels import balanced_choice, candidate_sets, capacity
from air_core.settings import PseudoLabelSettings
from air_core.settings.components import LOSSES, STRATEGIES
from air_core.types import PseudoLabels, sparse
from tests.fixtures.reference import reference_inputs as inputs

# N images, C classes. "Theirs" are the recorded outputs.

FLOOR = 1e-7  # in CPL, a class with a smaller share of an image's mass is no candidate


@cache
def facts() -> dict:
    return json.loads((inputs.HERE / "outputs.json").read_text())


@cache
def array(name: str) -> np.ndarray:
    with np.load(inputs.HERE / "outputs.npz", allow_pickle=False) as outputs:
        return outputs[name]


@cache
def scores(case: int, turn: int = 0) -> Tensor:
    return inputs.scores(inputs.logits(case, turn))


def masks(name: str, per_case: int) -> list[list[Tensor]]:
    """The (N, C) bool matrices of each case."""
    bits, found, at = np.unpackbits(array(name)).astype(bool), [], 0
    for case in inputs.CASES:
        images, classes = inputs.shape(case)
        size = images * classes
        found.append([])
        for _ in range(per_case):
            found[-1].append(torch.from_numpy(bits[at : at + size].reshape(images, classes)))
            at += size
    return found


def test_the_inputs_equal_those_of_the_recorded_outputs():
    turns = range(inputs.ROUNDS)
    drawn = [inputs.digest(*(inputs.logits(c, turn) for turn in turns)) for c in inputs.CASES]
    assert drawn == facts()["inputs"]
    assert [inputs.digest(scores(c)) for c in inputs.CASES] == facts()["scores"]


# ---------------------------------------------------------------- CPL: candidate sets


def mass_threshold(p: Tensor, alpha: float) -> Tensor:
    """The mass that an image's candidates must exceed."""
    return p.amax(dim=-1).quantile(alpha)


def mass_ahead(p: Tensor) -> Tensor:
    """(N, C) total mass of the classes that have a higher score for the image."""
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(p).scatter(1, order, pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0)))


def exact_sets(p: Tensor, enough: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Classes that are plausible for an image; images that are plausible for a class."""
    return mass_ahead(p) <= enough, p >= p.quantile(beta, dim=0)


def floored_sets(p: Tensor, enough: Tensor, beta: float) -> Tensor:
    """Classes in both sets, without those whose share of either set's mass is below FLOOR."""
    parts = [mask * p for mask in exact_sets(p, enough, beta)]
    return torch.stack([part > FLOOR * part.sum(dim=-1, keepdim=True) for part in parts]).all(dim=0)


@cache
def sets_by_pair() -> list[tuple[Tensor, float, float, Tensor]]:
    """600 cases: scores, alpha, beta and the sets of CPL."""
    found = masks("cpl_candidates", len(inputs.PAIRS))
    return [
        (scores(case), alpha / 100, beta, theirs)
        for case in inputs.CASES
        for (alpha, beta), theirs in zip(inputs.PAIRS, found[case], strict=True)
    ]


def test_candidate_sets_equal_cpl_except_for_the_differences_below():
    equal = [torch.equal(candidate_sets(p, a, b), theirs) for p, a, b, theirs in sets_by_pair()]
    assert Counter(equal) == {True: 591, False: 9}


def test_cpl_drops_candidates_below_a_ten_millionth_and_we_keep_them():
    """CPL selects the members of a set by `> 1e-7`, which matters for nearly one-hot scores.

    With the same floor all sets are equal.
    """
    floor_matters = 0
    for p, alpha, beta, theirs in sets_by_pair():
        within, inter = exact_sets(p, mass_threshold(p, alpha), beta)
        both = within & inter
        floor_matters += not torch.equal(both, theirs)
        assert not (theirs & ~both).any()
        assert (p[both & ~theirs] < 2 * FLOOR).all()
        assert torch.equal(floored_sets(p, mass_threshold(p, alpha), beta), theirs)
    assert floor_matters == 9


def test_an_alpha_of_zero_is_the_mean_confidence_for_cpl_and_the_smallest_for_us():
    """CPL interprets 0 as "no quantile". None of its published settings is 0."""
    for case, (theirs,) in zip(inputs.CASES, masks("cpl_candidates_alpha_0", 1), strict=True):
        p = scores(case)
        assert torch.equal(floored_sets(p, p.amax(dim=-1).mean(), 0.5), theirs)
        assert not torch.equal(candidate_sets(p, 0.0, 0.5), theirs)


# ---------------------------------------------------------------- CPL: balanced choice


@cache
def rounds() -> list[SimpleNamespace]:
    """400 rounds, four per case; each starts from CPL's result of the round before."""
    found, at = [], 0
    targets = masks("cpl_targets", inputs.ROUNDS)
    for case in inputs.CASES:
        images, _ = inputs.shape(case)
        alpha, beta = inputs.PAIRS[case % len(inputs.PAIRS)]
        settings = PseudoLabelSettings(
            kind="candidates", growth="growing", alpha=alpha / 100, beta=beta
        )
        previous = None
        for turn in range(inputs.ROUNDS):
            place = torch.from_numpy(array("cpl_places")[at : at + images].astype(np.int64))
            at += images
            chosen = (place >= 0).nonzero().flatten()
            p, k = scores(case, turn), inputs.round_size(case, turn)
            ours = STRATEGIES.load("candidates")(
                p, settings, capacity=k, iteration=turn, previous=previous
            )
            one = {"case": case, "turn": turn, "scores": p, "settings": settings, "capacity": k}
            one |= {"previous": previous, "ours": ours, "place": place}
            found.append(SimpleNamespace(**one, sets=targets[case][turn]))
            previous = PseudoLabels(chosen, targets[case][turn][chosen].float(), place[chosen])
    return found


def is_equal(r: SimpleNamespace) -> bool:
    """Whether images, their classes and their candidate sets are equal."""
    place, sets = torch.full_like(r.place, -1), torch.zeros_like(r.sets)
    place[r.ours.indices] = r.ours.labels
    sets[r.ours.indices] = sparse(r.ours.targets).dense() > 0
    return torch.equal(place, r.place) and torch.equal(sets, r.sets)


def limits(r: SimpleNamespace) -> Tensor:
    """(C,) slots of each class; a class that was not filled in the last round stays limited."""
    classes = r.scores.shape[1]
    if r.previous is None:
        return torch.full((classes,), r.capacity)
    filled = r.previous.labels.bincount(minlength=classes)
    return (filled + r.capacity - filled.max()).clamp(max=r.capacity)


def test_balanced_choice_and_targets_equal_cpl_over_rounds_except_for_the_differences_below():
    assert Counter(is_equal(r) for r in rounds()) == {True: 371, False: 29}


def test_where_a_round_differs_cpl_has_other_sets_or_ranks_by_fewer_digits():
    """CPL ranks the images of a class by `1 - score` in float32, where scores that differ by less
    than 6e-8 are equal, and then keeps the earlier image. Its candidate sets differ as in the tests
    above. With its sets, the scores of the selected images are equal up to this precision.
    """
    reasons: Counter[str] = Counter()
    for r in rounds():
        if is_equal(r):
            continue
        p = r.scores
        theirs = floored_sets(p, mass_threshold(p, r.settings.alpha), r.settings.beta)
        place = balanced_choice(p, limits(r), theirs)
        if torch.equal(place, r.place):
            reasons["sets"] += 1
            continue
        reasons["ranks"] += 1
        for c in range(p.shape[1]):
            ours, their = (1 - p[chosen == c, c] for chosen in (place, r.place))
            torch.testing.assert_close(ours.sort().values, their.sort().values, atol=1.2e-7, rtol=0)
    assert reasons == {"sets": 9, "ranks": 20}


def test_targets_of_the_first_growing_round_are_renormalised_scores_as_in_cpl():
    at = 0
    for r in rounds():
        if r.turn:
            assert set(sparse(r.ours.targets).values.tolist()) <= {0.0, 1.0}  # later: the whole set
        if r.turn or r.case not in inputs.SOFT:
            continue
        size = r.sets.numel()
        theirs = torch.from_numpy(array("cpl_soft_targets")[at : at + size]).view(r.sets.shape)
        at += size
        if is_equal(r):
            ours = torch.zeros_like(theirs)
            ours[r.ours.indices] = sparse(r.ours.targets).dense()
            torch.testing.assert_close(ours, theirs)
    assert at == len(array("cpl_soft_targets"))


# ---------------------------------------------------------------- CPL: losses


def losses() -> list[tuple[Tensor, Tensor, Tensor, bool, dict[str, Tensor]]]:
    """40 batches: logits, targets, later logits, whether targets are soft, and CPL's outputs."""
    found, at = [], 0
    names = ("cc", "ce", "rc", "rc_later")
    for number, case in enumerate(inputs.LOSSES):
        for soft in (False, True):
            z, targets, later = inputs.loss_batch(case, soft)
            theirs = {}
            for name in names:
                value = array(f"cpl_loss_{name}")[2 * number + soft]
                theirs[name] = torch.tensor(value)
            for name in (*(f"{n}_gradient" for n in names), "rc_confidence", "rc_cleaned"):
                flat = array(f"cpl_loss_{name}")[at : at + z.numel()]
                theirs[name] = torch.from_numpy(flat).view(z.shape)
            at += z.numel()
            found.append((z, targets, later, soft, theirs))
    return found


def value_and_gradient(kind: str, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = LOSSES.load(kind)(z, targets)
    loss.backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("kind", ["cc", "ce"])
def test_the_loss_and_its_gradient_equal_cpl(kind):
    for z, targets, _, _, theirs in losses():
        value, gradient = value_and_gradient(kind, z, targets)
        torch.testing.assert_close(value, theirs[kind], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, theirs[f"{kind}_gradient"], rtol=1e-4, atol=1e-6)


def test_rc_weighs_by_confidence_as_cpl_does_before_and_after_an_update():
    for z, targets, later, soft, theirs in losses():
        even = targets / targets.sum(dim=-1, keepdim=True)
        value, gradient = value_and_gradient("rc", z, even)
        torch.testing.assert_close(value, theirs["rc"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, theirs["rc_gradient"], rtol=1e-4, atol=1e-6)
        if soft:
            continue
        value, gradient = value_and_gradient("rc", later, confidence(later, targets))
        torch.testing.assert_close(value, theirs["rc_later"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, theirs["rc_later_gradient"], rtol=1e-4, atol=1e-5)


def test_the_confidence_equals_cpl_but_for_its_cleaning_and_its_soft_targets():
    """CPL sets confidences below a millionth to 0 and normalises again, which changes no value by
    more than 2e-6. Targets are soft only in the first round of growth: CPL normalises softmax times
    target; our confidence uses only which classes are in the set.
    """
    cleaned = 0
    for _, targets, later, soft, theirs in losses():
        ours = confidence(later, targets)
        if not soft:
            torch.testing.assert_close(ours, theirs["rc_confidence"], rtol=1e-4, atol=1e-7)
            cleaned += int(((theirs["rc_cleaned"] == 0) & (ours > 0)).sum())
            torch.testing.assert_close(ours, theirs["rc_cleaned"], rtol=1e-4, atol=2e-6)
            continue
        assert (ours - theirs["rc_confidence"]).abs().max() > 1e-3
        product = ours * targets
        product = product / product.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(product, theirs["rc_confidence"], rtol=1e-4, atol=1e-6)
    assert cleaned > 10


def test_cc_is_finite_where_cpl_takes_the_logarithm_of_zero():
    """CPL sums scores, which underflow, and its training stops. We sum in log space."""
    assert facts()["cpl_loss_underflow"] == "inf"
    loss = LOSSES.load("cc")(torch.tensor([[200.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    assert loss.item() == pytest.approx(200 - math.log(1 + math.exp(-1)))


# ---------------------------------------------------------------- GRIP: leader boards


@cache
def boards() -> list[SimpleNamespace]:
    """Leader boards of three sizes per case: few slots, FPL's 16, and a slot for every image."""
    found = []
    there, moved = masks("grip_boards", 3), masks("grip_boards_permuted", 3)
    for case in inputs.CASES:
        p, order = scores(case), torch.from_numpy(inputs.order(case))
        for at, k in enumerate(inputs.board_sizes(case)):
            permuted = torch.zeros_like(p, dtype=torch.bool)
            permuted[order] = our_board(p[order], k)
            ordered = p.sort(dim=0).values
            overflows = bool((p.argmax(dim=-1).bincount() > k).any())
            ties = bool((ordered[1:] == ordered[:-1]).any())
            one = {"scores": p, "k": k, "overflows": overflows, "ties": ties}
            one |= {"ours": our_board(p, k), "ours_permuted": permuted}
            one |= {"theirs": there[case][at], "theirs_permuted": moved[case][at]}
            found.append(SimpleNamespace(**one))
    return found


def our_board(p: Tensor, k: int) -> Tensor:  # (N, C) bool
    settings = PseudoLabelSettings(kind="top_k", growth="fixed", k=k)
    labels = STRATEGIES.load("top_k")(p, settings, capacity=k, iteration=0, previous=None)
    board = torch.zeros_like(p, dtype=torch.bool)
    board[labels.indices] = sparse(labels.targets).dense() > 0
    return board


def is_unstable(p: Tensor, board: Tensor, k: int) -> bool:
    """Whether an image prefers another class whose board has a free slot or a weaker image."""
    weakest = p.masked_fill(~board, math.inf).amin(dim=0).where(board.sum(dim=0) >= k, -math.inf)
    own = p.masked_fill(~board, -math.inf).amax(dim=-1, keepdim=True)
    return bool(((p > weakest) & (p > own)).any())


def test_boards_that_never_overflow_equal_grip():
    free = [b for b in boards() if not b.overflows]
    assert len(free) == 110
    for b in free:
        assert torch.equal(b.ours, b.theirs)
        assert torch.equal(b.theirs_permuted, b.theirs)


def test_grips_boards_depend_on_the_order_of_files_and_ours_do_not():
    """GRIP compares a new image with the last entry of a full board, but sorts the board only when
    it first overflows: the last entry may not be the weakest. Here no two scores of a class are
    equal."""
    found = [b for b in boards() if b.overflows and not b.ties]
    assert len(found) == 159
    assert all(torch.equal(b.ours, b.ours_permuted) for b in found)
    assert [torch.equal(b.theirs, b.theirs_permuted) for b in found].count(False) == 138


def test_the_order_of_files_decides_between_equal_scores_only():
    """Many images of a confident model have the float32 score 1; we select the earlier ones."""
    moved = [b for b in boards() if not torch.equal(b.ours, b.ours_permuted)]
    assert len(moved) == 5
    for b in moved:
        assert b.ties
        for c in range(b.scores.shape[1]):
            one, other = (b.scores[board[:, c], c] for board in (b.ours, b.ours_permuted))
            assert torch.equal(one.sort().values, other.sort().values)


def test_where_boards_differ_grip_omits_better_images():
    """In GRIP an image that is displaced from a full board gets no other class, and an image that
    is not accepted is offered to all other boards, so that it can be on several. In the remaining
    case scores are equal and GRIP selects the later file."""
    several = better = tied = equal = 0
    for b in boards():
        assert (b.ours.sum(dim=-1) <= 1).all()
        assert not is_unstable(b.scores, b.ours, b.k)
        if torch.equal(b.ours, b.theirs):
            equal += b.overflows
            continue
        several += bool((b.theirs.sum(dim=-1) > 1).any())
        if is_unstable(b.scores, b.theirs, b.k):
            better += 1
        else:
            tied += b.ties
    assert (several, better, tied, equal) == (76, 143, 1, 46)


# ---------------------------------------------------------------- growth


def test_the_slots_of_a_class_grow_as_in_both_repositories_but_are_never_zero():
    """Both repositories select no image in a round that has fewer images than classes."""
    growth = facts()["growth"]
    assert all(found == growth["CPL"] for found in growth.values())
    settings = PseudoLabelSettings(growth="growing")
    raised = 0
    for (images, classes, turns), theirs in zip(
        inputs.sizes_for_growth(), growth["CPL"], strict=True
    ):
        ours = [capacity(settings, images, classes, turn, turns) for turn in range(turns)]
        assert ours == [max(1, k) for k in theirs]
        raised += ours != theirs
    assert raised == 13


# ---------------------------------------------------------------- splits


def test_seen_classes_equal_both_repositories_in_the_order_in_which_they_were_drawn():
    """Our unseen classes ascend; theirs have the order of a Python set."""
    drawn, published = facts()["splits"], facts()["published_splits"]
    assert len(drawn["CPL"]) == len(published) == 18
    classes = {**inputs.SPLIT_CLASSES, "MNIST": 10}
    for theirs in (*drawn.values(), published):
        for name, (seen, unseen) in theirs.items():
            dataset, seed = name.split()
            assert seen_unseen(classes[dataset], int(seed)) == (tuple(seen), tuple(sorted(unseen)))


@pytest.mark.parametrize("repository", ["CPL", "GRIP"])
@pytest.mark.parametrize("shots", inputs.SSL_PER_CLASS)
def test_labelled_images_of_ssl_equal_both_repositories(repository, shots):
    ours = labelled_positions(inputs.ssl_labels(), shots, 0)
    assert ours.tolist() == facts()["ssl"][repository][str(shots)]


NAMES = {
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "FGVCAircraft": "fgvc_aircraft",
    "Flowers102": "flowers102",
    "RESICS45": "resisc45",
}


@pytest.mark.parametrize(("theirs", "ours"), NAMES.items())
def test_classnames_equal_those_of_the_repositories_in_their_order(theirs, ours):
    """RESISC45 is compared with the sorted names of their splits, as in the dataset."""
    names = classnames_of(ours)
    assert [inputs.name_digest(name) for name in names] == facts()["names"][theirs]
