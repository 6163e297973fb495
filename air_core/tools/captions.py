"""Captions of images for a diffusion model: one text for all classes, or texts of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from air_core.settings import Templates

OF = " = "  # between a class and its own caption


def text_of(texts: Templates, classname: str, i: int = 0) -> str:
    """The text of image `i` of a class. It does not depend on the number of images.

    >>> text_of(("a {}", "a small {}"), "rose", 3)
    'a small rose'
    >>> text_of(("a {}", "rose = a rose, red or white"), "rose")
    'a rose, red or white'
    """
    own, others = _parts(texts)
    name = classname.replace("_", " ")
    if name in own:
        return own[name][i % len(own[name])]
    return others[i % len(others)].format(name)


def caption_problem(texts: Templates, classnames: Sequence[str]) -> str:
    """What is wrong with captions of classes; empty if nothing is."""
    own, others = _parts(texts)
    names = [name.replace("_", " ") for name in classnames]
    if unknown := [name for name in own if name not in names]:
        return f"{unknown[0]!r} before {OF!r} is no class; allowed: {', '.join(names)}"
    if not others and (lacking := [name for name in names if name not in own]):
        return f"no text for class {lacking[0]!r}; add '{lacking[0]}{OF}...', or a text for all"
    return ""


def _parts(texts: Templates) -> tuple[dict[str, list[str]], list[str]]:
    """The captions of each class that has some, and the other texts."""
    own: dict[str, list[str]] = {}
    others = []
    for text in (texts,) if isinstance(texts, str) else texts:
        name, found, caption = text.partition(OF)
        if found:
            own.setdefault(name, []).append(caption)
        else:
            others.append(text)
    return own, others
