"""A tiny pretrained CLIP and a tiny pretrained text-to-image pipeline, shipped with the package.

`weights/` contains both models. `python -m air_core.tiny --work DIR --out DIR` trains them again
from fonts and random numbers; MODEL_CARD.md lists their scores. No module of air_core imports this
package: importlib.resources locates the weights.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, str]:
    """BLAKE2b digests of all files in a folder, by relative path, except for the list itself."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != CHECKSUMS)
    return {
        file.relative_to(folder).as_posix(): blake2b(file.read_bytes(), digest_size=32).hexdigest()
        for file in files
    }
