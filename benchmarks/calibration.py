"""Error rates of the significance marks in tables: false positives, and detected differences.

    python benchmarks/calibration.py [--simulations 500] [--methods 6]

The tables are simulated: equally accurate methods on the test images of one dataset, compared by
the code of real tables (`reporting._statistics`). A method classifies an image correctly if the sum
of the image's ease, the method's preference for the image (`taste`), and the effects of split, seed
and noise exceeds a threshold. The preference is the same for every seed, so two methods disagree on
the same images in every run. Noise differs between runs.

Baseline: a common practice, McNemar's test over the pooled images of all seeds, with each image of
each seed as an independent observation. `ratio` is the rate of false positives of the baseline
divided by that of airsweep if methods disagree on the same images for every seed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import options, progress, report
from orchestrator.reporting._statistics import (
    ALPHA,
    Difference,
    Run,
    Runs,
    corrected_p_values,
    paired_difference,
)

IMAGES, TEST = 1797, 540  # the digits
ACCURACY = 0.74


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Parameters of a simulation; standard deviations are in units of the ease of images."""

    splits: int = 1
    seeds: int = 3
    taste: float = 0.0  # of a method for an image; the same in every run
    noise: float = 0.0  # of an image in a run
    seed: float = 0.0  # 0.03 is about one point of accuracy
    split: float = 0.0
    test: int = TEST
    trzsl: bool = False
    gain: float = 0.0  # in accuracy, of all methods except the host

    @property
    def spread(self) -> float:
        """Standard deviation of the score over the images of one run."""
        return math.sqrt(1 + self.taste**2 + self.noise**2)


BOTH, TWO_POINTS = {"taste": 0.4, "noise": 0.4}, {"seed": 0.07}
NULL = {
    "one split, persistent": Scenario(taste=0.6),
    "one split, no seeds": Scenario(taste=0.6, seeds=0),
    "one split, independent": Scenario(noise=0.6),
    "one split, both": Scenario(**BOTH),
    "one split, both, TRZSL": Scenario(**BOTH, trzsl=True),
    "one split, both, seeds differ by 2 points": Scenario(**BOTH, **TWO_POINTS),
    "one split, independent, seeds 2 points": Scenario(noise=0.6, **TWO_POINTS),
    "5 splits x 2, seeds 1 point": Scenario(splits=5, seeds=2, **BOTH, seed=0.035),
}
# Scenarios in which tables refuse to test: the error rates if they tested all the same.
REFUSED = {
    "3 splits x 1, splits 2 points": Scenario(splits=3, seeds=1, **BOTH, seed=0.035, split=0.07),
    "one split, 2 seeds, independent, 2 points": Scenario(noise=0.6, seeds=2, **TWO_POINTS),
    "one split, differ on few images": Scenario(taste=0.025),
}
PLANTED = {
    "one split x 3, 1,880 images": Scenario(**BOTH, gain=0.05, test=1880),
    "5 splits x 2, 540 images, seeds 1 point": Scenario(
        splits=5, seeds=2, **BOTH, seed=0.035, gain=0.05
    ),
}


def simulate_runs(rng: np.random.Generator, world: Scenario, methods: int) -> list[Runs]:
    """Simulate the runs of `methods` methods; the first method is the host."""
    population = max(IMAGES, world.test)
    ease = rng.standard_normal(population)
    tastes = world.taste * rng.standard_normal((methods, population))
    middle = NormalDist().inv_cdf(ACCURACY)
    above = NormalDist().inv_cdf(ACCURACY + world.gain) - middle
    runs: list[list[Run]] = [[] for _ in range(methods)]
    for split in range(world.splits):
        ids = np.sort(rng.choice(population, world.test, replace=False))
        unseen = ids % 10 < 4 if world.trzsl else None
        by_split = world.split * rng.standard_normal(methods)
        for seed in range(max(1, world.seeds)):
            by_seed = world.seed * rng.standard_normal(methods)
            for k in range(methods):
                score = ease[ids] + tastes[k, ids] + by_split[k] + by_seed[k]
                if world.noise:
                    score = score + world.noise * rng.standard_normal(len(ids))
                line = -world.spread * (middle + (above if k else 0.0))
                runs[k].append(
                    Run(
                        split_seed=split,
                        seed=seed if world.seeds else None,
                        image_ids=ids,
                        correct=score > line,
                        unseen=unseen,
                    )
                )
    return [Runs(tuple(of)) for of in runs]


def compare_with_host(runs: Sequence[Runs], samples: int = 500) -> list[Difference]:
    """Compare every method with the host, and the second with the third as a control."""
    host, *others = runs
    pairs = [(one, host) for one in others]
    if len(others) > 1:
        pairs.append((others[0], others[1]))
    found = [paired_difference(a, b, samples=samples) for a, b in pairs]
    return [one for one in found if one is not None]


def mcnemar_pooled(a: Runs, b: Runs) -> float:
    """The p value of McNemar's test with every image of every run as an independent observation."""
    ours = np.concatenate([run.correct for run in a])
    theirs = np.concatenate([run.correct for run in b])
    first, second = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if first + second == 0:
        return 1.0
    return math.erfc(abs(first - second) / math.sqrt(2 * (first + second)))


@dataclass
class Counts:
    """Number of simulated tables of a scenario, and of tables with a positive result."""

    tables: int = 0
    single: int = 0  # the uncorrected interval of the first comparison excludes 0
    any_single: int = 0  # the same of any comparison
    any_corrected: int = 0  # any comparison, corrected, if no test were refused
    any_mark: int = 0  # any significance mark in the table
    first_mark: int = 0
    baseline: int = 0
    inconsistent: int = 0  # p value and interval disagree


def count_positives(world: Scenario, simulations: int, methods: int, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    counts = Counts()
    for _ in range(simulations):
        runs = simulate_runs(rng, world, methods)
        found = compare_with_host(runs)
        p = corrected_p_values(found)
        left_out = [not one.low <= 0 <= one.high for one in found]
        below = [one.p < ALPHA for one in found]
        marks = [
            value < ALPHA and not one.reason_not_tested for one, value in zip(found, p, strict=True)
        ]
        counts.tables += 1
        counts.single += left_out[0]
        counts.any_single += any(left_out)
        counts.any_corrected += min(p) < ALPHA
        counts.any_mark += any(marks)
        counts.first_mark += marks[0]
        counts.inconsistent += left_out != below
        counts.baseline += mcnemar_pooled(runs[1], runs[0]) < ALPHA
    return counts


def rate(found: int, of: int) -> dict[str, float]:
    """A rate in % with its 95 % interval (Clopper and Pearson)."""
    ends = binomtest(found, of).proportion_ci()
    return {
        "rate": round(100 * found / of, 2),
        "low": round(100 * ends.low, 2),
        "high": round(100 * ends.high, 2),
    }


def main() -> None:
    args = options(__doc__, simulations=500, methods=6, only="")
    groups: dict[str, dict[str, Any]] = {}
    for title, worlds in (("null", NULL), ("refused", REFUSED), ("planted", PLANTED)):
        for name, world in worlds.items():
            if not any(part in name for part in args.only.split("|")):
                continue
            found = count_positives(world, args.simulations, args.methods)
            rates = {
                "one_comparison": found.single,
                "some_uncorrected": found.any_single,
                "some_corrected": found.any_corrected,
                "some_mark": found.any_mark,
                "first_mark": found.first_mark,
                "baseline": found.baseline,
            }
            figures = {key: rate(count, found.tables) for key, count in rates.items()}
            groups.setdefault(title, {})[name] = figures
            columns = [f"{k} {v['rate']} [{v['low']}, {v['high']}]" for k, v in figures.items()]
            progress(f"{title}: {name}:", ", ".join(columns))
    first = groups.get("null", {}).get("one split, persistent")
    report(
        "calibration",
        first and first["baseline"]["rate"] / max(first["one_comparison"]["rate"], 1e-9),
        "McNemar's test over the pooled images of all seeds",
        simulations=args.simulations,
        methods=args.methods,
        **groups,
    )


if __name__ == "__main__":
    main()
