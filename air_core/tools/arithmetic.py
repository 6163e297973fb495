"""Makes sums bit-reproducible on one machine. Standard library only.

On Intel processors torch uses MKL, which by default adds numbers in an order that depends on the
memory addresses of arrays, so the last bits of a trial vary between runs. The environment variable
MKL_CBWR fixes the order (MKL's manual: conditional numerical reproducibility).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def sums_in_one_order() -> None:
    """Set MKL_CBWR unless the user has. Call this before the first computation of a process."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "GenuineIntel" in processor and " avx2" in processor:  # slows other processors down
        os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
