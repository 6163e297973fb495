"""Large matrices in chunks of rows, so that a computation needs no second matrix of that size.

Formulas with a number for each image and class need it, since a pool can have a million images:
logits of classifiers, fused scores, evidence, the mixture, and the choice of pseudo-labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ELEMENTS = 2**22  # numbers of a chunk, 16 MiB in float32; a smaller matrix is one chunk
# Chunks have a multiple of ROWS, or fewer rows: a power of two. Other sizes change rounding.
ROWS = 256


def chunks(count: int, width: int, elements: int | None = None) -> Iterator[slice]:
    """Slices that cover `count` rows of `width` numbers each; one empty slice if there is no row.

    Args:
        elements: numbers of a chunk, ELEMENTS by default; a row is never divided.

    >>> [*chunks(1000, 4, elements=2400)]
    [slice(0, 512, None), slice(512, 1000, None)]
    """
    size = max(1, (elements or ELEMENTS) // max(1, width))
    size = size // ROWS * ROWS or 2 ** (size.bit_length() - 1)
    for start in range(0, max(1, count), size):
        yield slice(start, min(count, start + size))


def by_rows(
    function: Callable[..., Tensor],
    first: Tensor,
    *others: Tensor | None,
    width: int | None = None,
    elements: int | None = None,
) -> Tensor:
    """`function(first, *others)`, computed in chunks of the rows that all of them have.

    Args:
        others: None is passed on.
        width: numbers that the function needs at a time for each row; None: columns of `first`.
        elements: see `chunks`.
    """
    if torch.compiler.is_compiling():  # torch.export: the number of rows is a symbol
        return function(first, *others)
    result = None
    for rows in chunks(len(first), width or first.shape[1], elements):
        found = function(
            first[rows], *(other if other is None else other[rows] for other in others)
        )
        if len(found) == len(first):
            return found
        if result is None:
            result = found.new_empty(len(first), *found.shape[1:])
        result[rows] = found
    assert result is not None
    return result
