"""Memory and time of the method's steps on a large pool of synthetic features or scores.

Baseline: one more matrix of images x classes in float32, which a step would need if it copied the
scores once. Each step runs in a process of its own:

    logits                       CLIP's text classifier
    prototype, knn, cache        auxiliary classifiers of 16 images of each class
    fuse                         search of the temperature that matches two confidences
    pool_scores                  text, prototype and evidence together
    evidence, sinkhorn           probabilities by two draws of errors, and their balance
    objectives, transductive     mutual information of the pool, Gaussian mixture
    candidate_sets, balanced_choice, predicted    parts of pseudo-labelling
    round                        pseudo-labels of the last round of CPL

    python benchmarks/memory.py [NAME...] [--images 128000] [--classes 1000] [--width 512]
        [--threads 1]

Without a name it runs all of them, half an hour. The last line is JSON: `ratio` is the size of the
matrix divided by the largest `extra_gib` of a step, its peak without inputs and result. `peak_gib`
is that of the whole process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.auxiliary import AuxiliaryClassifier, auxiliary_classifier
from air_core.classifiers import CachedClassifier, FusedClassifier, LinearClassifier, fuse
from air_core.evaluation import objectives
from air_core.evidence import balanced, evidence_probabilities
from air_core.pseudo_labels import assign, balanced_choice, candidate_sets
from air_core.settings import AuxiliarySettings, PseudoLabelSettings
from air_core.transduction import transductive
from air_core.types import Classes, Encoded, Labelled, PseudoLabels
from benchmarks.harness import environment, measure_time, options, progress, report

GIB = 2**30
ALPHA, BETA = 0.75, 0.99
PER_CLASS, DRAWS = 16, 2
PART = 4096  # images that are drawn at a time
SHARPNESS = 30.0


class Pool:
    """Synthetic inputs of the steps, each made when it is first read."""

    def __init__(self, arguments: Any) -> None:
        self.images, self.classes = arguments.images, arguments.classes
        self.width = arguments.width
        self.generator = torch.Generator().manual_seed(0)
        self.centers = self._unit_noise(self.classes)

    @cached_property
    def batch(self) -> Encoded:
        features = torch.empty(self.images, self.width)
        for part in features.split(PART):
            part.copy_(self._features(len(part)))
        return Encoded(features)

    @cached_property
    def scores(self) -> Tensor:
        scores = torch.empty(self.images, self.classes)
        for part in scores.split(PART):
            torch.softmax(SHARPNESS * self._features(len(part)) @ self.centers.T, 1, out=part)
        return scores

    @cached_property
    def errors(self) -> Tensor:
        return torch.empty(DRAWS, self.images, self.classes).uniform_(generator=self.generator)

    @cached_property
    def text(self) -> LinearClassifier:
        zeros = torch.zeros(self.classes), torch.zeros(self.width)
        return LinearClassifier(self.centers, *zeros, False, SHARPNESS)

    @cached_property
    def cached(self) -> CachedClassifier:
        """The text classifier with the logits of the pool."""
        cached = CachedClassifier(self.text)
        cached.logits(self.batch)
        return cached

    @cached_property
    def every(self) -> Classes:
        return Classes(self.classes)

    @cached_property
    def prototype(self) -> AuxiliaryClassifier:
        return self._auxiliary("prototype")

    @cached_property
    def knn(self) -> AuxiliaryClassifier:
        return self._auxiliary("knn")

    @cached_property
    def cache(self) -> AuxiliaryClassifier:
        return self._auxiliary("cache")

    @cached_property
    def fused(self) -> FusedClassifier:
        return FusedClassifier(
            self.cached,
            self.prototype,
            0.5,
            "probability",
            self.every,
            self.scores,
            0.3,
        )

    def _auxiliary(self, kind: str) -> AuxiliaryClassifier:
        labels = torch.arange(self.classes).repeat_interleave(PER_CLASS)
        features = normalize(0.5 * self.centers[labels] + self._unit_noise(len(labels)), dim=1)
        bank, settings = Labelled(Encoded(features), labels), AuxiliarySettings(kind=kind)
        return auxiliary_classifier(settings, bank, None, self.batch, self.classes, SHARPNESS)

    def _features(self, count: int) -> Tensor:
        labels = torch.randint(self.classes, (count,), generator=self.generator)
        return normalize(0.35 * self.centers[labels] + self._unit_noise(count), dim=1)

    def _unit_noise(self, count: int) -> Tensor:
        return normalize(torch.randn(count, self.width, generator=self.generator), dim=1)


def last_round(pool: Pool, kind: str) -> PseudoLabels:
    settings = PseudoLabelSettings(kind=kind, growth="growing", alpha=ALPHA, beta=BETA)
    return assign(pool.scores, settings, iteration=9, iterations=10, previous=None)


def quarter(pool: Pool) -> Tensor:
    """Slots of each class for a quarter of the pool."""
    return torch.full((pool.classes,), max(1, pool.images // pool.classes // 4))


# Inputs that a step reads, and the step.
STEPS: dict[str, tuple[tuple[str, ...], Callable[[Pool], Any]]] = {
    "logits": (("batch", "text"), lambda pool: pool.text.logits(pool.batch)),
    "prototype": (("prototype",), lambda pool: pool.prototype.logits(pool.batch)),
    "knn": (("knn",), lambda pool: pool.knn.logits(pool.batch)),
    "cache": (("cache",), lambda pool: pool.cache.logits(pool.batch)),
    "fuse": (
        ("cached", "prototype"),
        lambda pool: fuse(
            pool.cached, pool.prototype, pool.batch, pool.every, 0.5, "match_confidence"
        ),
    ),
    "pool_scores": (("fused",), lambda pool: pool.fused.pool_scores(pool.batch)),
    "evidence": (("errors",), lambda pool: evidence_probabilities(pool.errors, 0.8)),
    "sinkhorn": (("scores",), lambda pool: balanced(pool.scores)),
    "objectives": (
        ("cached",),
        lambda pool: objectives(pool.cached, pool.batch, None, pool.every),
    ),
    "transductive": (
        ("cached",),
        lambda pool: transductive(pool.cached, pool.batch, pool.every),
    ),
    "candidate_sets": (("scores",), lambda pool: candidate_sets(pool.scores, ALPHA, BETA)),
    "balanced_choice": (("scores",), lambda pool: balanced_choice(pool.scores, quarter(pool))),
    "predicted": (("scores",), lambda pool: last_round(pool, "predicted")),
    "round": (("scores",), lambda pool: last_round(pool, "candidates")),
}


def gib(result: Any) -> float:
    """Size of a result that consists of tensors."""
    if isinstance(result, PseudoLabels):
        return sum(map(gib, vars(result).values()))
    return result.nbytes / GIB if isinstance(result, Tensor) else 0.0


def measure(name: str, arguments: Any) -> dict[str, float]:
    pool, found = Pool(arguments), []
    inputs, work = STEPS[name]
    for each in inputs:
        getattr(pool, each)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / GIB
    seconds, cpu = measure_time(lambda: found.append(work(pool)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    result = 0.0 if found[0] is pool.__dict__.get("scores") else gib(found[0])
    return {
        "extra_gib": peak - before - result,
        "result_gib": result,
        "peak_gib": peak,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def main() -> None:
    names = []
    while sys.argv[1:] and sys.argv[1] in STEPS:
        names.append(sys.argv.pop(1))
    arguments = options(__doc__, images=128_000, classes=1000, width=512, threads=1)
    torch.set_num_threads(arguments.threads)
    figures = {}
    for name in names or STEPS:
        if len(names) == 1:
            figures[name] = measure(name, arguments)
            continue
        command = [sys.executable, __file__, name, *sys.argv[1:]]
        done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
        figures[name] = json.loads(done.stdout.splitlines()[-1])["steps"][name]
        progress(name, figures[name])
    matrix = 4 * arguments.images * arguments.classes / GIB
    report(
        "memory",
        matrix / max(each["extra_gib"] for each in figures.values()),
        f"one matrix of {arguments.images} images x {arguments.classes} classes in float32",
        matrix_gib=matrix,
        images=arguments.images,
        classes=arguments.classes,
        steps=figures,
    )


if __name__ == "__main__":
    main()
