"""Real stages on a full disk. `test_chaos.py` tests whole sweeps on a full disk."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.disks import PAGE, SmallDisk
from tests.helpers.sweeps import python

BUILD = """
import sys
from pathlib import Path

from orchestrator.spec import presets
from orchestrator.failures import classify
from orchestrator.stages.synthetic import build as build_image_block
from orchestrator.planning import Resolver
from orchestrator.stages.features import build as build_features
from orchestrator.store import (ArtifactStore)
from orchestrator.stages.context import WorkerContext

root, digests, drawn = map(Path, sys.argv[1:])
worker = WorkerContext(ArtifactStore(root))
flat = {**presets.defaults("air_fpl", {}), "generator": f"folder:{drawn}", "generation.block": 8}
flat["images_per_class"] = 16
trial = Resolver(digests, None).trial(flat)
row = trial.synthetic_features
generator = row.images.open(worker)

def outcome(build):
    try:
        build()
    except Exception as problem:
        return classify(problem)
    return "built"

print(outcome(lambda: build_features(trial.features, worker)))
for block in range(2):
    print(outcome(lambda: build_image_block(row, 0, block, worker, lambda: generator)))
"""


def test_features_and_blocks_on_a_full_disk_fail_with_disk_and_leave_no_file(
    tmp_path, drawn_digits
):
    with SmallDisk(tmp_path / "store", 9 * PAGE) as disk:

        def build() -> list[str]:
            arguments = (disk.place, tmp_path / "digests.json", drawn_digits)
            return python("-c", BUILD, *arguments, inside=disk.inside).stdout.split()

        def files() -> set[Path]:
            return {file for file in disk.seen.rglob("*") if file.is_file()}

        assert build() == ["disk", "built", "disk"]
        assert not [
            file for file in files() if file.name.startswith(".") or file.suffix == ".tries"
        ]
        assert len([file for file in files() if file.suffix == ".parquet"]) == 1
        disk.resize(64 * 2**20)
        assert build() == ["built", "built", "built"]
