"""The embedded world: a tiny CLIP and a tiny text-to-image pipeline that are really pretrained.

`weights/` is what ships. The scripts beside it make it again from nothing but fonts and random
numbers (`python -m air_core.tiny --work DIR --out DIR`); MODEL_CARD.md says how well it does.
Nothing in air_core imports this package: the weights are found with importlib.resources.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, str]:
    """BLAKE2b of every file below a folder, by relative path; but for the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != CHECKSUMS)
    return {
        file.relative_to(folder).as_posix(): blake2b(file.read_bytes(), digest_size=32).hexdigest()
        for file in files
    }
