"""What real stages do on a disk with no room left; `test_chaos.py` has the sweep around them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.disks import PAGE, small_disk
from tests.helpers.sweeps import environment

MAKE = """
import sys
from pathlib import Path

from orchestrator.spec import (presets)
from orchestrator.failures import classify
from orchestrator.stages.image_rows import build_image_block, open_generator
from orchestrator.planning import (Resolver)
from orchestrator.stages.build import build_features
from orchestrator.store import (ArtifactStore)
from orchestrator.stages.context import WorkerContext

root, digests, drawn = map(Path, sys.argv[1:])
worker = WorkerContext(ArtifactStore(root))
flat = {**presets.defaults("air_fpl", {}), "generator": f"folder:{drawn}", "generation.block": 8}
flat["images_per_class"] = 16
trial = Resolver(digests, None).trial(flat)
row = trial.synthetic_features
generator = open_generator(row.images, worker)

def outcome(make):
    try:
        make()
    except Exception as problem:
        return classify(problem)
    return "made"

print(outcome(lambda: build_features(trial.features, worker)))
for block in range(2):
    print(outcome(lambda: build_image_block(row, 0, block, worker, lambda: generator)))
"""


def test_features_and_blocks_that_find_no_room_leave_nothing_and_say_disk(tmp_path, drawn_digits):
    with small_disk(tmp_path / "store", 9 * PAGE) as disk:

        def make() -> list[str]:
            arguments = [str(disk.place), str(tmp_path / "digests.json"), str(drawn_digits)]
            done = subprocess.run(
                [*disk.inside, sys.executable, "-c", MAKE, *arguments],
                capture_output=True,
                text=True,
                env=environment(),
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

        def files() -> set[Path]:
            return {file for file in disk.seen.rglob("*") if file.is_file()}

        assert make() == ["disk", "made", "disk"]
        assert not [
            file for file in files() if file.name.startswith(".") or file.suffix == ".tries"
        ]
        assert len([file for file in files() if file.suffix == ".parquet"]) == 1
        disk.resize(64 * 2**20)
        assert make() == ["made", "made", "made"]
