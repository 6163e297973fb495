"""Invisible characters in external text, such as names of files and classes."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, direction marks, surrogates, and characters
# without width. Terminals interpret them, or they make a text look like another one. The joiners
# \u200c and \u200d are not among them, since Persian and Indic words need them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Replace each unprintable character with an escape in JSON's notation.

    >>> printable("a\x1b[31m\n.jpg"), printable("Übung 花.png")
    ('a\\u001b[31m\\u000a.jpg', 'Übung 花.png')
    """
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
