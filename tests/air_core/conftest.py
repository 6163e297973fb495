"""Fixtures of the tests of air_core."""

from __future__ import annotations

import pytest

from air_core import chunks
from air_core.auxiliary import bank


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Chunks of a few rows, where a plain reference has all rows; whole trials have one chunk."""
    monkeypatch.setattr(chunks, "ELEMENTS", 20)
    monkeypatch.setattr(bank, "COSINES", 100)
