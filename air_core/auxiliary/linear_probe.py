"""Logistic regression as auxiliary classifier."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, normalize

from air_core.auxiliary.bank import Bank
from air_core.classifiers import LinearClassifier

PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 200, 1e-2, 1e-2


def linear_probe(bank: Bank) -> LinearClassifier:
    """Logistic regression on unit features: full-batch AdamW that starts at the class means."""
    x, counts = bank.unit, bank.counts
    weight = (bank.sharpness * normalize(bank.means(x), dim=-1)).requires_grad_()
    bias = torch.zeros(len(counts), requires_grad=True)
    balance = len(x) / (len(counts) * counts.to(x.dtype))  # all classes have equal weight
    optimiser = torch.optim.AdamW([weight, bias], lr=PROBE_RATE, weight_decay=PROBE_DECAY)
    with torch.enable_grad():
        for _ in range(PROBE_STEPS):
            loss = cross_entropy(x @ weight.T + bias, bank.labels, weight=balance)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    weight, bias = weight.detach(), bias.detach()
    return LinearClassifier(weight, bias, bank.center, unit=True, sharpness=1.0)
