"""A trial is found in a store by its key, or in a sweep by its slot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from air_core.seal import sealed_json
from orchestrator.planning.ledger import Slot, read_ledger
from orchestrator.reporting.selection import named_trial
from orchestrator.store import SweepLocation
from tests.helpers.outcomes import ACCURACIES, SWEEP, by_method, record_sweep


@pytest.fixture
def location(tmp_path: Path) -> SweepLocation:
    return record_sweep(tmp_path, "small", SWEEP, by_method(ACCURACIES))


def slots_of(location: SweepLocation) -> list[Slot]:
    return list(read_ledger(location).slots)


def test_a_slot_is_found_in_its_sweep_and_a_key_in_each(location) -> None:
    longer = SWEEP.replace("digits", "digits, prompt.length: 3")
    other = record_sweep(location.store.root, "other", longer, by_method(ACCURACIES))
    slot, later = slots_of(location)[-1], slots_of(other)[-1]
    assert slot.id == later.id
    with pytest.raises(ValueError, match="no trial keys"):
        named_trial(slot.id, location.store)
    assert named_trial(slot.id, location.store, other).record.key == later.key.digest
    with pytest.raises(ValueError, match="is not a finished trial of the sweep default/small"):
        named_trial(later.key.digest, location.store, location)


def test_a_trial_of_another_version_is_refused(location) -> None:
    slot = slots_of(location)[-1]
    file = location.store.path(slot.key) / "record.json"
    record = json.loads(file.read_text())
    record["spec"]["train"]["renamed"] = record["spec"]["train"].popitem()[1]
    file.write_bytes(sealed_json({**record, "commit": "0123abc"}))
    with pytest.raises(ValueError, match=r"another version of the code.*commit 0123abc"):
        named_trial(slot.key.digest, location.store)
