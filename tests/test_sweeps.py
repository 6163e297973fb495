"""Every shipped sweep file loads and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from air_core.datasets import get_dataset
from air_core.models.weights import find_backbone, generator_folder
from orchestrator.planning import Resolver
from orchestrator.planning.plan import plan_sweep
from orchestrator.spec import SweepSpec, cells_of, find_sweep, load_sweep
from orchestrator.spec.sweep import smoke_variant
from orchestrator.store import ArtifactStore, EventLog

FILES = sorted((Path(__file__).parents[1] / "sweeps").rglob("*.yaml"))
EACH = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def missing_input(spec: SweepSpec) -> str:
    """Why the sweep cannot be planned on this machine; empty if nothing is missing."""
    for cell in cells_of(spec):
        try:
            dataset = get_dataset(cell.flat["dataset"])
            dataset.files(None)
            find_backbone(cell.flat["backbone"])
            generator_folder(cell.flat["generator"])
        except ValueError as problem:
            return str(problem)
    return ""


@EACH
def test_a_file_is_named_like_its_sweep_and_is_planned_with_and_without_smoke(file, tmp_path):
    spec = load_sweep(file)
    assert spec.name == file.stem
    if reason := missing_input(spec):
        pytest.skip(reason)
    store = ArtifactStore(tmp_path / "runs")
    resolver = Resolver(tmp_path / "digests.json", None)
    plan = plan_sweep(spec, store, resolver, EventLog(tmp_path / "sweep"))
    assert plan.to_run > 0
    quick = plan_sweep(smoke_variant(spec), store, resolver, EventLog(tmp_path / "smoke"))
    assert 0 < quick.total <= plan.total


def test_the_quickstart_has_its_seeds_on_one_line_for_scripts():
    lines = find_sweep("quickstart").read_text().splitlines()
    assert [line for line in lines if line.startswith("seeds: [")]
