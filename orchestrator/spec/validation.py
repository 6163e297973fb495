"""Validate a YAML document against a pydantic type; each error is one line with its position.

The allowed values in a message come from the JSON schema of the same type. This module does not
depend on the sweep format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    AllowInfNan,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from air_core.components import Registry
from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    allowed_choices,
    dotted_path,
    short_value,
    suggestion,
)

Schema = dict[str, Any]
T = TypeVar("T")

CONFIG = ConfigDict(extra="forbid")

# Strict types: `true` is not accepted as 1, and NaN is not accepted as a number.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field with a default. A default of None means that the key is optional."""
    return Field(default=default, description=description, **limits)


def text_schema(title: str, pattern: str) -> WithJsonSchema:
    """Schema of a text: messages show `title`; `pattern` must also be valid in JavaScript."""
    return WithJsonSchema({"type": "string", "title": title, "pattern": pattern})


@dataclass(frozen=True)
class NameOf:
    """Annotates a text that must name a component of a registry, those of plugins included."""

    registry: Registry

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> Schema:
        return {"enum": [*self.registry], "type": "string"}

    def _checked(self, name: str) -> str:
        if name not in self.registry:
            raise PydanticCustomError("component", "no component")
        return name


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_WORDS = "up to 64 letters, digits, `.`, `_` and `-`, starting with a letter or digit"
NAME = Annotated[
    str, StringConstraints(pattern=NAME_PATTERN), text_schema(NAME_WORDS, NAME_PATTERN)
]
# Tables print these texts on terminals: no invisible characters (\p{C}), no line breaks.
LINE = Annotated[
    str,
    StringConstraints(pattern=r"^[^\p{C}\p{Z}]([^\p{C}\p{Zl}\p{Zp}]*[^\p{C}\p{Z}])?$"),
    text_schema("one line of visible text, not empty", r"^\S(.*\S)?$"),
]
Version = Annotated[Whole, Field(ge=1, le=1), WithJsonSchema({"const": 1})]


def validate(document: Document, adapter: TypeAdapter[T], also: Iterable[SpecError] = ()) -> T:
    """The document's value as an instance of a type.

    Args:
        also: errors to report together with those of the value.

    Raises:
        SpecError: the value is invalid; the message has the positions and the allowed values.
    """
    try:
        return adapter.validate_python(document.value)
    except ValidationError as problem:
        errors = _spec_errors(document, problem, schema_of(adapter))
        wrong = {error.keys[:depth] for error in errors for depth in range(len(error.keys) + 1)}
        raise joined([*errors, *(error for error in also if error.keys not in wrong)]) from None


def validation_error(message: str, *loc: str | int) -> ValidationError:
    """An error for validators to raise; `loc` is the path to the invalid part of their value."""
    return validation_errors({loc: message})


def validation_errors(messages: Mapping[Keys, str]) -> ValidationError:
    """Errors for validators to raise, by the path to the invalid part of their value."""
    lines: list[Any] = [
        {"type": "value_error", "loc": loc, "input": None, "ctx": {"error": message}}
        for loc, message in messages.items()
    ]
    return ValidationError.from_exception_data("", lines)


def error_message(adapter: TypeAdapter[Any], value: Any) -> str:
    """The error message of validating a value; empty if it is valid."""
    try:
        validate(Document(source="", value=value), adapter)
    except SpecError as error:
        return str(error).removeprefix(": ")
    return ""


UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


MOST = 10  # mistakes in a message


def joined(errors: Iterable[SpecError]) -> SpecError:
    """One error with the first line of each place, in the order of the document."""
    first: dict[Keys, str] = {}
    for error in errors:
        first.setdefault(error.keys, str(error))
    messages = sorted(first.values(), key=_line_and_column)
    more = [f"and {len(messages) - MOST} more mistakes"] if len(messages) > MOST else []
    return SpecError("\n".join([*messages[:MOST], *more]))


def _spec_errors(document: Document, problem: ValidationError, schema: Schema) -> list[SpecError]:
    """An error for each key with a mistake.

    Of the errors within a key, the one with the longest path: each member of a union reports one.
    """
    longest: dict[Keys, tuple[Keys, ErrorDetails]] = {}
    for error in problem.errors():
        keys = _document_path(document, error)
        missing = error["loc"][-1:] if error["type"] == "missing" else ()
        # The values of `fixed` and `grid` are two levels deep, those of `search.space` three.
        depth = 3 if keys[:1] in (("search",), ("overrides",)) else 2
        place = (*keys, *missing)[:depth]
        if place not in longest or len(keys) > len(longest[place][0]):
            longest[place] = keys, error
    places = [
        p for p in longest if not any(p == other[: len(p)] for other in longest if other != p)
    ]
    return [_spec_error(document, *longest[place], schema) for place in places]


def _line_and_column(message: str) -> list[int]:
    found = re.match(r".*?:(\d+):(\d+): ", message)
    return [int(number) for number in found.groups()] if found else []


def _spec_error(document: Document, keys: Keys, error: ErrorDetails, schema: Schema) -> SpecError:
    if keys and (message := _section_message(document, keys, schema)):
        return document.key_error(keys, message)
    if error["type"] in UNKNOWN or error["loc"][-1:] == ("[key]",):
        if others := _other_places(schema, keys):
            return document.key_error(keys, f"unknown key here; allowed {others}")
        allowed = key_choices(str(keys[-1]), _keys(_part(schema, keys[:-1])))
        return document.key_error(keys, f"unknown key; {allowed}")
    part = _part(schema, keys)
    if error["type"] == "missing":
        allowed = ", ".join(_keys(part))
        name = str(error["loc"][-1])
        missing = document.error(keys, f"`{name}` is missing; keys here: {allowed}")
        return SpecError(str(missing), (*keys, name))
    value = document.value_at(keys)
    if error["type"] == "value_error":  # the error of a section points at its key
        error_at = document.key_error if isinstance(value, dict) else document.error
        return error_at(keys, str(error["ctx"]["error"]))
    allowed = f"allowed: {allowed_values(part)}"
    if keys[:1] == ("fixed",) and isinstance(value, list):
        allowed += "; a list of values is allowed under grid"
    meant = suggestion(str(value), map(str, _enum_values(part)))
    return document.error(keys, f"{short_value(value)} is not allowed; {meant}{allowed}")


def _section_message(document: Document, keys: Keys, schema: Schema) -> str:
    """The message for a mapping in place of keys with a dot; empty for any other value."""
    if isinstance(keys[-1], int):  # a mapping in a list
        keys = keys[:-1]
    section, value = keys[-1], document.value_at(keys)
    known = [name for name in _keys(_part(schema, keys[:-1])) if name.startswith(f"{section}.")]
    items = value if isinstance(value, list) else [value]
    items = [item for item in items if isinstance(item, dict) and item]
    if not known or not items:
        return ""
    inner = next(iter(items[0]))
    name = f"{section}.{inner}"
    if name not in known:
        return f"unknown key {name}; {allowed_choices(name, known)}"
    values = [item[inner] for item in items if inner in item]
    is_axis = keys[:1] == ("grid",) and not isinstance(values[0], list)
    wanted = f"{name}: {short_value(values if is_axis else values[0])}"
    return f"the settings of {section} are keys with a dot; write `{wanted}`"


def _other_places(schema: Schema, keys: Keys) -> str:
    """The sections above and below an unknown key that allow it."""
    *above, key = keys
    ancestors: list[Keys] = [tuple(above[:depth]) for depth in range(len(above))]
    found = [dotted_path(path) for path in ancestors if key in _keys(_part(schema, path))]
    here = _part(schema, tuple(above))
    for name in _keys(here):
        names = _keys(_part(here, (name,)))
        if any(each == key or each.startswith(f"{key}.") for each in names):
            found.append(dotted_path((*above, name)))
    return ", ".join(f"under {path}" if path else "at the top of the file" for path in found)


def _document_path(document: Document, error: ErrorDetails) -> Keys:
    """The steps of an error's location that exist in the document; others name parts of types."""
    value: Any = document.value
    keys: Keys = ()
    for step in error["loc"]:
        inside = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if inside or (isinstance(value, dict) and step in value):
            value, keys = value[step], (*keys, step)
    return keys


# ---------------------------------------------------------------- JSON schema and its description


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would repeat the key


def schema_of(adapter: TypeAdapter[Any]) -> Schema:
    """The JSON schema of an adapter's input, without references."""
    schema = adapter.json_schema(schema_generator=_Untitled)
    inlined: Schema = _inline_references(schema, schema.get("$defs", {}))
    return inlined


def _inline_references(node: Any, definitions: Schema) -> Any:
    if isinstance(node, list):
        return [_inline_references(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**definitions[node["$ref"].rpartition("/")[2]], **node}
    default = node.get("default")
    dropped = {"$ref", "$defs"}
    if isinstance(default, list | dict) or (default is None and "anyOf" not in node):
        dropped.add("default")  # a user cannot write these defaults as a value
    return {
        key: _inline_references(item, definitions)
        for key, item in node.items()
        if key not in dropped
    }


def _part(schema: Schema, keys: Keys) -> Schema:
    """The part of a schema that describes the value at `keys`."""
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
    """The keys of a mapping, from the first option that lists them."""
    listed = (
        option.get("properties") or option.get("propertyNames", {}).get("enum")
        for option in _options(schema)
    )
    return list(next(filter(None, listed), []))


def _enum_values(schema: Schema) -> list[Any]:
    return [value for option in _options(schema) for value in option.get("enum", [])]


_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "`key: value` lines",
}


LISTED = "a non-empty list of: "


def allowed_values(schema: Schema) -> str:
    """The values that a schema allows, as text.

    >>> allowed_values({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'a whole number >= 1 or null'
    """
    if "title" in schema and "properties" not in schema:
        return str(schema["title"])
    if "const" in schema or "enum" in schema:
        return ", ".join(map(yaml_text, schema.get("enum") or [schema["const"]]))
    if "anyOf" in schema:
        texts = dict.fromkeys(allowed_values(option) for option in schema["anyOf"])
        return " or ".join(
            "a non-empty list of these" if text.endswith(f"{LISTED}{next(iter(texts))}") else text
            for text in texts
        )
    if schema.get("type") == "array":
        return LISTED + allowed_values(schema["items"])
    bounds = " and ".join(f"{_SIGNS[name]} {schema[name]}" for name in _SIGNS if name in schema)
    return f"{_TYPES[schema['type']]} {bounds}".strip()


def yaml_text(value: Any) -> str:
    """A value in YAML's notation."""
    return value if isinstance(value, str) else json.dumps(value)


def key_choices(word: str, names: Iterable[str]) -> str:
    """The end of a message: the allowed keys, long sections as `lora.*` unless `word` is in one."""
    names = list(names)
    head = word.partition(".")[0]
    section = [name for name in names if name.startswith(f"{head}.")]
    if len(names) < 20:
        return allowed_choices(word, names)
    if section:
        return allowed_choices(word, section) if word != head else f"allowed: {', '.join(section)}"
    short = dict.fromkeys(re.sub(r"\..*", ".*", name) for name in names)
    return f"{suggestion(word, names) or suggestion(head, names)}allowed: {', '.join(short)}"
