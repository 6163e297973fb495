"""Training of the two embedded models, a tiny CLIP and a tiny text-to-image pipeline.

`python -m tools.tiny_world --work DIR --out DIR` trains them from fonts and random numbers. The
package contains the weights, in `air_core/tiny/weights`; MODEL_CARD.md there lists their scores.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

WEIGHTS = Path(__file__).parents[2] / "air_core" / "tiny" / "weights"
CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, str]:
    """BLAKE2b digests of all files in a folder, by relative path, except for the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != CHECKSUMS)
    return {
        file.relative_to(folder).as_posix(): blake2b(file.read_bytes(), digest_size=32).hexdigest()
        for file in files
    }
