"""Check plain YAML against a pydantic type: a mistake is one line that names its place.

What is allowed there is read from the JSON schema of the same type. Knows nothing of sweeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import (
    AllowInfNan,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from orchestrator.spec.marked_yaml import Document, Keys, SpecError, choices, meant, shown

Schema = dict[str, Any]
T = TypeVar("T")

CONFIG = ConfigDict(extra="forbid")

# No number is taken for another type's: `true` is not 1, and NaN is no number.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field of a type. None as default: the key may be left out, as the field's type tells."""
    return Field(default=default, description=description, **limits)


def text_schema(title: str, pattern: str) -> WithJsonSchema:
    """`title` is what a message calls allowed; the pattern is one that JavaScript reads alike."""
    return WithJsonSchema({"type": "string", "title": title, "pattern": pattern})


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_WORDS = "up to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit"
NAME = Annotated[
    str, StringConstraints(pattern=NAME_PATTERN), text_schema(NAME_WORDS, NAME_PATTERN)
]
# Names end up in tables on terminals: nothing invisible (\p{C}), no line ends.
LINE = Annotated[
    str,
    StringConstraints(pattern=r"^[^\p{C}\p{Z}]([^\p{C}\p{Zl}\p{Zp}]*[^\p{C}\p{Z}])?$"),
    text_schema("text on one line, not empty, all of it visible", r"^\S(.*\S)?$"),
]
Version = Annotated[Whole, Field(ge=1, le=1), WithJsonSchema({"const": 1})]


def validate(document: Document, adapter: TypeAdapter[T]) -> T:
    """A document as a type.

    Raises:
        SpecError: it is not of this type; names the place of the mistake and what is allowed.
    """
    try:
        return adapter.validate_python(document.value)
    except ValidationError as problem:
        raise _explained(document, problem, schema_of(adapter)) from None


def wrong(message: str, *loc: str | int) -> ValidationError:
    """For validators to raise: the message is about the part at `loc` of what they check."""
    line: Any = {"type": "value_error", "loc": loc, "input": None, "ctx": {"error": message}}
    return ValidationError.from_exception_data("", [line])


def problem_with(adapter: TypeAdapter[Any], value: Any) -> str:
    """Why a value is not of a type; empty: it is."""
    try:
        validate(Document(source="", value=value), adapter)
    except SpecError as error:
        return str(error).removeprefix(": ")
    return ""


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _explained(document: Document, problem: ValidationError, schema: Schema) -> SpecError:
    """The deepest of the errors as a message: each member of a union reports one."""
    found = [(_place(document, error), error) for error in problem.errors()]
    keys, error = max(found, key=lambda one: len(one[0]))
    if error["type"] in UNKNOWN or error["loc"][-1:] == ("[key]",):
        allowed = key_choices(str(keys[-1]), _keys(_part(schema, keys[:-1])))
        return document.key_error(keys, f"unknown key; {allowed}")
    part = _part(schema, keys)
    if error["type"] == "missing":
        known = ", ".join(_keys(part))
        return document.error(keys, f"`{error['loc'][-1]}` is missing; allowed here: {known}")
    value = document.at(keys)
    if error["type"] == "value_error":  # a section is named by its key
        where = document.key_error if isinstance(value, dict) else document.error
        return where(keys, str(error["ctx"]["error"]))
    allowed = words(part) + meant(str(value), map(str, _enumerated(part)))
    return document.error(keys, f"{shown(value)} is not allowed; allowed: {allowed}")


def _place(document: Document, error: ErrorDetails) -> Keys:
    """The steps of an error's location that the document has; others name parts of types."""
    value: Any = document.value
    keys: Keys = ()
    for step in error["loc"]:
        inside = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if inside or (isinstance(value, dict) and step in value):
            value, keys = value[step], (*keys, step)
    return keys


# ---------------------------------------------------------------- JSON schema, and its words


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # it would repeat the key


def schema_of(adapter: TypeAdapter[Any]) -> Schema:
    """The JSON schema of what an adapter takes, without references."""
    found = adapter.json_schema(schema_generator=_Untitled)
    inlined: Schema = _inlined(found, found.get("$defs", {}))
    return inlined


def _inlined(node: Any, definitions: Schema) -> Any:
    if isinstance(node, list):
        return [_inlined(one, definitions) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**definitions[node["$ref"].rpartition("/")[2]], **node}
    default = node.get("default")
    dropped = {"$ref", "$defs"}
    if isinstance(default, list | dict) or (default is None and "anyOf" not in node):
        dropped.add("default")  # what a part is without it, which is no value to write
    return {key: _inlined(one, definitions) for key, one in node.items() if key not in dropped}


def _part(schema: Schema, keys: Keys) -> Schema:
    """What a schema says of the value at `keys`."""
    for step in keys:
        for option in _options(schema):
            named = option.get("properties", {}).get(step) or option.get("additionalProperties")
            inner = option.get("items") if isinstance(step, int) else named
            if inner:
                schema = inner
                break
    return schema


def _options(schema: Schema) -> Iterator[Schema]:
    yield schema
    for option in schema.get("anyOf", []):
        yield from _options(option)


def _keys(schema: Schema) -> list[str]:
    """The keys of a mapping, by the first option that knows them."""
    found = [
        option.get("properties") or option.get("propertyNames", {}).get("enum")
        for option in _options(schema)
    ]
    return list(next(filter(None, found), []))


def _enumerated(schema: Schema) -> list[Any]:
    return [word for option in _options(schema) for word in option.get("enum", [])]


_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "`key: value` lines",
}


def words(schema: Schema) -> str:
    """What a schema allows.

    >>> words({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'a whole number >= 1 or null'
    """
    if "title" in schema and "properties" not in schema:
        return str(schema["title"])
    if "const" in schema or "enum" in schema:
        return ", ".join(map(plain, schema.get("enum") or [schema["const"]]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(words(option) for option in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"a list, not empty, each: {words(schema['items'])}"
    bounds = " and ".join(f"{_SIGNS[name]} {schema[name]}" for name in _SIGNS if name in schema)
    return f"{_TYPES[schema['type']]} {bounds}".strip()


def plain(value: Any) -> str:
    """A value as YAML spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def key_choices(word: str, names: Iterable[str]) -> str:
    """Allowed keys for the end of a message: long sections by name, unless the word is in one."""
    names = list(names)
    head = word.partition(".")[0]
    section = [name for name in names if name.startswith(f"{head}.")]
    if len(names) < 20:
        return choices(word, names)
    if "." in word and section:
        return choices(word, section)
    short = dict.fromkeys(re.sub(r"\..*", ".*", name) for name in names)
    return f"allowed: {', '.join(short)}{meant(word, names) or meant(head, names)}"
