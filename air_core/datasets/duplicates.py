"""Finds images that occur twice in a dataset, exactly or nearly, without comparing all pairs.

Source: difference hash, N. Krawetz, "Kind of Like That" (2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# N images.

SIDE = 16  # of the hash: 16 x 16 bits
STEP = 3  # smallest difference in levels of a brighter cell; noise stays below it
NEAR_BITS = 7  # that may differ between near duplicates
BAND_BYTES = 4  # hashes that differ in NEAR_BITS have one of their 8 bands of 4 bytes in common
NEXT = 16  # hashes of the same band with which one is compared, so that N images take N steps
FEWEST_BITS = 16  # a flat image has fewer, and resembles every other one


def pixel_digest(image: Image) -> bytes:
    """Digest of size and pixels, 16 bytes."""
    return blake2b(image.tobytes(), key=repr(image.size).encode(), digest_size=16).digest()


def difference_hash(image: Image) -> np.ndarray:
    """(256,) bool: whether a cell of the middle square is brighter than its left neighbour.

    Size, compression and brightness change few bits; a different image changes dozens.
    """
    import numpy as np
    from PIL import Image, ImageOps

    side = min(image.size)
    square = ImageOps.fit(image.convert("L"), (side, side))
    # BOX gives a pixel on the border of two cells to one of them, which depends on the size.
    cells = square.resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS)
    grey = np.array(cells, dtype=np.int16)  # (16, 17)
    return (grey[:, 1:] - grey[:, :-1] > STEP).reshape(-1)


def exact_pairs(digests: Sequence[bytes]) -> list[tuple[int, int]]:
    """Positions of each repeated digest: of its first occurrence, and of the repetition.

    >>> exact_pairs([b"a", b"b", b"a", b"a"])
    [(0, 2), (0, 3)]
    """
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digest, i), i) for i, digest in enumerate(digests)]
    return [(one, other) for one, other in pairs if one != other]


def near_pairs(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Sorted positions of images whose hashes differ in at most NEAR_BITS bits.

    Of images with a band in common, each is compared with the NEXT ones, so pairs can be missing
    where hundreds of images look alike.

    Args:
        hashes: (N, 32) uint8, from `difference_hash` by `np.packbits`.
    """
    import numpy as np

    kept = np.flatnonzero(np.bitwise_count(hashes).sum(axis=1) >= FEWEST_BITS)
    hashes = np.ascontiguousarray(hashes[kept])
    found: set[tuple[int, int]] = set()
    for band in hashes.view(f"u{BAND_BYTES}").T:  # (N,)
        order = np.argsort(band, kind="stable")
        for step in range(1, NEXT + 1):
            one, other = order[:-step], order[step:]
            alike = band[one] == band[other]
            if not alike.any():
                break
            one, other = one[alike], other[alike]
            close = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1) <= NEAR_BITS
            found.update(zip(kept[one[close]].tolist(), kept[other[close]].tolist(), strict=True))
    return sorted(found)
