"""Recorded sweeps: real store, event log and records, by default written without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from air_core.settings.conditions import uses_evidence
from air_core.tools.seal import sealed_json
from orchestrator.planning import Slot, plan_of
from orchestrator.planning.ledger import LEDGER, ledger_json
from orchestrator.planning.requests import SweepRequest, location_for
from orchestrator.spec import load_sweep
from orchestrator.store import ArtifactStore, SweepLocation
from orchestrator.store.records import PREDICTIONS
from tests.helpers.sweeps import write_sweep

TESTED = 400  # images of a run

# Methods of which each is better than the one before.
SWEEP = """
grid: {method: [zero_shot, fpl, cpl]}
fixed: {dataset: digits}
seeds: [1, 2, 3]
"""
ACCURACIES = {"zero_shot": 0.5, "fpl": 0.62, "cpl": 0.7}

Write = Callable[[Slot, ArtifactStore], object]


def record_sweep(
    store: Path,
    name: str,
    body: str,
    write: Write,
    done: Callable[[int], bool] = lambda index: True,
) -> SweepLocation:
    """Write a recorded sweep into a store.

    Args:
        body: the sweep file below version and name.
        write: writes the record of a slot, as `by_method`.
        done: whether a trial, given its index in the plan, has a record.
    """
    sweep = load_sweep(write_sweep(store / "files", name, body))
    location = location_for(SweepRequest(sweep), str(store), None)
    location.store.initialize()
    event_log = location.event_log()
    event_log.lock()
    location.write("spec.yaml", sweep.text)
    location.write("resolved.json", sealed_json({"sets": [], "only": [], "source": sweep.source}))
    plan = plan_of(sweep, location)
    location.write(LEDGER, ledger_json(plan, {}))
    event_log.append("sweep_started", total=plan.total, spec="", to_run=plan.to_run)
    for index, slot in enumerate(plan.slots):
        if done(index):
            write(slot, location.store)
            event_log.append("trial_done", slot=slot.id, cell=slot.cell.id, key=slot.key.digest)
    event_log.unlock()
    return location


def write_record(slot: Slot, store: ArtifactStore, accuracy: float) -> None:
    spec = slot.spec
    rng = np.random.default_rng(int(slot.key.digest[:12], 16))
    ease = np.random.default_rng(spec.split_seed).random(TESTED)
    labels = (np.arange(TESTED) % 10).astype(np.int32)
    correct = ease + 0.03 * rng.standard_normal(TESTED) < accuracy
    predictions = np.where(correct, labels, (labels + 1) % 10).astype(np.int32)
    metrics = dict.fromkeys(("test/accuracy", "test/accuracy_text"), float(correct.mean()))
    metrics["pseudo/accuracy"] = accuracy + 0.05
    if spec.fusion_weight > 0:
        metrics["test/accuracy_fused"] = float(correct.mean()) + 0.02
    if uses_evidence(spec):
        metrics["pool/accuracy_evidence"] = accuracy + 0.06

    def build(folder: Path) -> dict[str, Any]:
        arrays = {"index": np.arange(TESTED), "predictions": predictions, "labels": labels}
        save_file(arrays | {"text": predictions}, folder / PREDICTIONS)
        return {
            "metrics": metrics,
            "curves": {},
            "objectives": {"mutual_information": 0.0},
            "per_class": [1.0] * 10,
        }

    store.get_or_build(spec, build)


def by_method(accuracies: Mapping[str, float]) -> Write:
    """Writes records with an accuracy per method; images are equally easy for all, up to noise."""
    return lambda slot, store: write_record(slot, store, accuracies[slot.cell.method])


def trained(slot: Slot, store: ArtifactStore) -> None:
    """Runs the trial of a slot, whose features the store must have."""
    from orchestrator.stages.trial_run import run_trial  # imports torch

    run_trial(slot.spec, store)
