"""Sweeps with denoising evidence: killed while it is computed, resumed, with one and two actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import airsweep, count, events, run_and_kill_workers, table, write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.integration]

POOL, BLOCK, DRAWS = 90, 16, 2
SHARDS = DRAWS * -(-POOL // BLOCK)
BODY = f"""
grid: {{method: [cpl, cpl_evidence, cpl_real_evidence]}}
fixed:
  pool_size: {POOL}
  lora.rounds: 1
  lora.steps: 8
  evidence.draws: {DRAWS}
  evidence.prune_after: 1
  evidence.prune_to: 3
  evidence.block: {BLOCK}
  iterations: 2
  train.steps: 4
seeds: [1, 2]
"""


def shards(store: Path) -> dict[str, Path]:
    return {file.name: file for file in store.glob("artifacts/evidence/v1/*/*.safetensors")}


def test_evidence_that_is_killed_resumes_to_the_bits_of_a_single_actor(tmp_path):
    whole = tmp_path / "whole"
    one = write_sweep(tmp_path / "one", "e", BODY + "resources: {generator: {actors: 1}}\n")
    airsweep("run", one, "--store", whole)
    assert len([*whole.glob("sweeps/default/e/audit-agreement-*.json")]) == 1
    [audit] = json.loads(airsweep("audit", "e", "--store", whole, "--json").stdout)
    assert [entry["name"] for entry in audit["classifiers"]] == ["text", "evidence", "real images"]

    spec, store = write_sweep(tmp_path / "two", "e", BODY), tmp_path / "killed"
    computing = {
        "ray::MapWorker": lambda new: count(new, "artifact_prepared", stage="evidence") > 1
    }
    killed = run_and_kill_workers(spec, store, computing, **{CRASH_AT: "artifact_prepared:6"})
    assert killed.returncode == -9, killed.stderr
    before = {name: file.stat().st_mtime_ns for name, file in shards(store).items()}
    assert 1 < len(before) < SHARDS
    plan = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)
    [evidence] = [artifact for artifact in plan["artifacts"] if artifact["stage"] == "evidence"]
    assert len(before) <= evidence["have"] < evidence["need"] == SHARDS  # an actor may live longer

    airsweep("run", spec, "--store", store)
    after = shards(store)
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    assert table(store, "e") == table(whole, "e")
    assert errors(after) == errors(shards(whole))
    rows = {row["method"]: row for row in table(store, "e")}
    assert rows["cpl"]["mean"] != rows["cpl_evidence"]["mean"]
    verified = json.loads(airsweep("cache", "verify", "--store", store, "--json").stdout)
    assert (verified["damaged"], verified["unsealed"]) == ([], 0)
    removable = airsweep("cache", "gc", "--store", store, "--all-users", "--json")
    assert json.loads(removable.stdout)["removals"] == []
    log = events(store, "e")
    assert count(log, "trial_failed") == count(log, "artifact_failed") == 0


def errors(found: dict[str, Path]) -> dict[str, Any]:
    arrays = {name: load_file(file)["errors"] for name, file in found.items()}
    assert all(np.isfinite(array).any(axis=1).all() for array in arrays.values())
    return {name: array.tobytes() for name, array in arrays.items()}
