"""The same sums on the same machine, to the last bit. Standard library only.

Intel's MKL, which torch computes with on their processors, adds in an order that depends on where
arrays happen to lie in memory, unless it is told not to (its manual: conditional numerical
reproducibility). Without that a CPU trial came out with other last bits each time.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def sums_in_one_order() -> None:
    """To be called before the first sum of a process; MKL_CBWR of the user is left as it is."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "GenuineIntel" in processor and " avx2" in processor:  # others would be slowed down
        os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
