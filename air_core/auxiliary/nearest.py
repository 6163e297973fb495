"""Auxiliary classifiers that compare an image with single images of a class."""

from __future__ import annotations

from air_core.auxiliary.bank import Bank, BankClassifier


def knn(bank: Bank) -> BankClassifier:
    """Mean cosine to the nearest images of each class."""
    return bank.compared(min(bank.settings.neighbours, int(bank.counts.min())))


def cache(bank: Bank) -> BankClassifier:
    """Tip-Adapter's cache model (arXiv:2111.03930)."""
    return bank.compared(nearest=0)
