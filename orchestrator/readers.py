"""Readers: each checks what stands at one place of a document and returns its value.

A leaf is checked by pydantic against a type and limits, strictly: no number is taken for another
type's, NaN never. What is allowed is said from the same type and limits.
"""

from __future__ import annotations

import dataclasses
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError

from air_core.datasets import DATASETS
from air_core.datasets.dataset import is_template
from air_core.flat import trial_keys
from orchestrator import presets
from orchestrator.marked_yaml import Document, Keys, choices, meant, shown

Reader = Callable[[Document, Keys], Any]
Limits = tuple[tuple[str, float], ...]

NAME = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# Names end up in tables on terminals: nothing invisible (\p{C}), no line ends.
LINE = Annotated[
    str, StringConstraints(pattern=r"^[^\p{C}\p{Z}]([^\p{C}\p{Zl}\p{Zp}]*[^\p{C}\p{Z}])?$")
]
FOLDER = Annotated[str, StringConstraints(pattern=r"^folder:[^\p{C}\p{Zl}\p{Zp}]+$")]


def _one_slot(text: str) -> str:
    if not is_template(text):
        raise ValueError
    return text


TEMPLATE = Annotated[str, AfterValidator(_one_slot)]

TRIAL_KEYS = trial_keys()


def mapping(
    document: Document, keys: Keys, readers: Mapping[str, Reader], needed: Sequence[str] = ()
) -> dict[str, Any]:
    """The checked values of a mapping with known keys."""
    found = document.mapping(keys)
    for name in found:
        if name not in readers:
            raise document.key_error((*keys, name), f"unknown key; {choices(name, readers)}")
    for name in needed:
        if name not in found:
            raise document.error(keys, f"`{name}` is missing; allowed here: {', '.join(readers)}")
    return {name: readers[name](document, (*keys, name)) for name in found}


def section(cls: Any, **special: Reader) -> Reader:
    """A reader of a dataclass, field by field."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    readers = {
        f.name: special.get(f.name)
        or leaf(hints[f.name], tuple(f.metadata.get("limits", {}).items()))
        for f in fields
    }
    needed = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return lambda document, keys: cls(**mapping(document, keys, readers, needed))


def trial_keys_at(document: Document, keys: Keys) -> list[str]:
    """The keys of a mapping, all of them trial keys or `method`."""
    names = list(document.mapping(keys))
    for name in names:
        if name not in trial_names():
            raise document.key_error((*keys, name), f"unknown key; {allowed_keys(name)}")
    return names


def trial_names() -> list[str]:
    return ["method", *TRIAL_KEYS]


def allowed_keys(word: str, others: Iterable[str] = ()) -> str:
    """For the end of a message: sections by name, and spelled out where the word is in one."""
    names = [*others, *trial_names()]
    head = word.partition(".")[0]
    section = [name for name in names if name.startswith(f"{head}.")]
    if "." in word and section:
        return choices(word, section)
    short = dict.fromkeys(re.sub(r"\..*", ".*", name) for name in names)
    return f"allowed: {', '.join(short)}{meant(word, names) or meant(head, names)}"


def trial_value(name: str) -> Reader:
    """A reader of values of a trial key."""
    if name == "lora":  # true: on, with its settings; false and null: off
        return lambda document, keys: leaf(bool | None)(document, keys) or None
    return leaf(*annotation_of(name))


def trial_number(name: str) -> Reader | None:
    """A reader of numbers of a trial key; None: it has no numbers."""
    number = _number(name)
    return leaf(*number) if number else None


def _number(name: str) -> tuple[Any, Limits] | None:
    annotation, limits = annotation_of(name)
    number = next((kind for kind in _options(annotation) if kind in (int, float)), None)
    return (number, limits) if number else None


def annotation_of(name: str) -> tuple[Any, Limits]:
    if name == "method":
        return operator.getitem(Literal, tuple(presets.METHODS)), ()
    if name in ("dataset", "test_dataset"):
        words = operator.getitem(Literal, tuple(DATASETS))
        none = () if name == "dataset" else (None,)
        return operator.getitem(typing.Union, (words, FOLDER, *none)), ()
    if name in ("backbone", "generator"):
        return LINE, ()
    if name in ("generation.template", "lora.caption"):
        return TEMPLATE, ()
    key = TRIAL_KEYS[name]
    return key.type, tuple(key.limits.items())


def leaf(annotation: Any, limits: Limits = ()) -> Reader:
    """A reader of one value of a type, within limits. No number is taken for another type's."""

    def check(document: Document, keys: Keys) -> Any:
        value = document.at(keys)
        try:
            return _adapter(annotation, limits).validate_python(value)
        except ValidationError:
            allowed = _allowed(annotation, limits) + meant(str(value), _literals(annotation))
            message = f"{shown(value)} is not allowed; allowed: {allowed}"
            raise document.error(keys, message) from None

    return check


@cache
def _adapter(annotation: Any, limits: Limits) -> TypeAdapter[Any]:
    bounds: dict[str, Any] = dict(limits)
    bounded: Any = Annotated[annotation, Field(**bounds)] if limits else annotation
    return TypeAdapter(bounded, config={"strict": True, "allow_inf_nan": False})


def _options(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _literals(annotation: Any) -> list[str]:
    kinds = [kind for kind in _options(annotation) if typing.get_origin(kind) is Literal]
    return [str(word) for kind in kinds for word in typing.get_args(kind)]


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    FOLDER: "folder:<path> of your own images",
    NAME: "up to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit",
    LINE: "text on one line, not empty, all of it visible",
    TEMPLATE: "text on one line with {} once, where the class name goes, and no other brace",
}


# For an editor: patterns that JavaScript and Python read alike, a little wider than the above.
_PATTERNS = {
    NAME: r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    LINE: r"^\S(.*\S)?$",
    FOLDER: r"^folder:.+$",
    TEMPLATE: r"^[^{}]*\{\}[^{}]*$",
}
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def leaf_schema(annotation: Any, limits: Limits = ()) -> dict[str, Any]:
    """The JSON schema of what `leaf` takes.

    >>> leaf_schema(int | None, (("ge", 1),))
    {'type': ['integer', 'null'], 'minimum': 1}
    """
    each: list[dict[str, Any]] = []
    plain: list[str] = []
    for kind in _options(annotation):
        if typing.get_origin(kind) is Literal:
            each.append({"enum": list(typing.get_args(kind))})
        elif kind in _PATTERNS:
            each.append({"type": "string", "pattern": _PATTERNS[kind]})
        else:
            plain.append(_TYPES[kind])
    if plain:
        bounds = {_BOUNDS[name]: bound for name, bound in limits}
        each.append({"type": plain[0] if len(plain) == 1 else plain, **bounds})
    return each[0] if len(each) == 1 else {"anyOf": each}


def trial_schema(name: str) -> dict[str, Any]:
    """The JSON schema of values of a trial key."""
    return leaf_schema(bool | None) if name == "lora" else leaf_schema(*annotation_of(name))


def number_schema(name: str) -> dict[str, Any] | None:
    """The JSON schema of numbers of a trial key; None: it has no numbers."""
    number = _number(name)
    return leaf_schema(*number) if number else None


def _allowed(annotation: Any, limits: Limits) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = " and ".join(f"{signs[name]} {bound}" for name, bound in limits)
    words = [", ".join(_literals(annotation))] if _literals(annotation) else []
    for kind in _options(annotation):
        if kind in _WORDS:
            words.append(f"{_WORDS[kind]} {bounds if kind in (int, float) else ''}".strip())
    return " or ".join(words)
