"""A plugin for tests: a pseudo-label strategy with a setting."""

from __future__ import annotations

MARGIN = '''"""Pseudo-labels of images whose two best classes differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import one_hot

from air_core.components import STRATEGIES, setting
from air_core.types import PseudoLabels


@dataclass(frozen=True)
class Margin:
    tau: float = setting(0.2, "smallest difference of the two largest scores", ge=0, le=1)


@STRATEGIES.add("margin", settings=Margin, summary="images whose two best classes differ by tau")
def margin(scores, settings, *, capacity, iteration, previous):
    best, classes = scores.topk(2, dim=-1)
    difference = best[:, 0] - best[:, 1]
    chosen = (difference >= min(settings.tau, float(difference.max()))).nonzero().flatten()
    labels = classes[chosen, 0]
    return PseudoLabels(chosen, one_hot(labels, scores.shape[1]).to(scores.dtype), labels)
'''
