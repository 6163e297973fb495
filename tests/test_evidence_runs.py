"""Denoising evidence of trials: killed while it is computed, resumed, with one and two actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from orchestrator.store.event_log import CRASH_AT
from tests.helpers.sweeps import (
    airsweep,
    count,
    damaged_files,
    events,
    run_and_kill,
    table,
    write_sweep,
)

pytestmark = [pytest.mark.ray, pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

POOL, BLOCK, DRAWS = 90, 16, 2
SHARDS = DRAWS * -(-POOL // BLOCK)
BODY = f"""
grid: {{method: [cpl, cpl_evidence, cpl_real_evidence]}}
fixed:
  pool_size: {POOL}
  initial_labels.k: 4
  lora.steps: 8
  images_per_class: 2
  generation.block: 4
  generation.num_inference_steps: 2
  evidence.draws: {DRAWS}
  evidence.prune_after: 1
  evidence.prune_to: 3
  evidence.block: {BLOCK}
  iterations: 2
  train.steps: 4
seeds: [1]
"""


def shards(store: Path) -> dict[str, Path]:
    files = store.glob("artifacts/evidence/v*/*/*.safetensors")
    return {f"{file.parent.name}/{file.name}": file for file in files}


def test_evidence_that_is_killed_resumes_to_the_bits_of_a_single_actor(tmp_path):
    whole = tmp_path / "whole"
    one = write_sweep(tmp_path / "one", "e", BODY + "resources: {generator: {actors: 1}}\n")
    airsweep("run", one, "--store", whole)

    spec, store = write_sweep(tmp_path / "two", "e", BODY), tmp_path / "killed"
    crash_at = {CRASH_AT: "artifact_prepared:7"}
    killed = run_and_kill(spec, store, "ray::ArtifactMaker", "evidence", **crash_at)
    assert killed.returncode == -9, killed.stderr
    before = {name: file.stat().st_mtime_ns for name, file in shards(store).items()}
    assert 1 < len(before) < SHARDS
    plan = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)
    [evidence] = [each for each in plan["artifacts"] if each["stage"] == "evidence"]
    assert evidence["need"] == SHARDS
    assert len(before) <= evidence["have"] < SHARDS  # an actor may live longer

    airsweep("run", spec, "--store", store)
    after = shards(store)
    assert len(after) == SHARDS
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    assert table(store, "e") == table(whole, "e")
    assert errors(after) == errors(shards(whole))
    rows = {row["method"]: row for row in table(store, "e")}
    assert rows["cpl"]["mean"] != rows["cpl_evidence"]["mean"]
    assert damaged_files(store) == []
    removable = airsweep("cache", "gc", "--store", store, "--all-users", "--json")
    assert json.loads(removable.stdout)["removals"] == []
    log = events(store, "e")
    assert count(log, "trial_failed") == count(log, "artifact_failed") == 0

    plan = json.loads(airsweep("plan", spec, "--store", store, "--json").stdout)
    assert {artifact["state"] for artifact in plan["artifacts"]} == {"present"}


def errors(found: dict[str, Path]) -> dict[str, Any]:
    """The triples of each shard; each of its images is scored."""
    shards = {name: load_file(file) for name, file in found.items()}
    assert all({*each["image"]} == {*range(each["shape"][0])} for each in shards.values())
    return {
        name: {part: array.tobytes() for part, array in each.items()}
        for name, each in shards.items()
    }
