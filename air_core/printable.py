"""Text from outside, such as names of files and classes, made fit for terminals and tables."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, marks that reverse the order of the letters
# that follow, and halves of surrogate pairs: a terminal obeys them, or a reader is misled by them.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text in which each unprintable character is an escape, as JSON writes it.

    >>> printable("a\x1b[31m\n.jpg"), printable("Übung 花.png")
    ('a\\u001b[31m\\u000a.jpg', 'Übung 花.png')
    """
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
