"""Check a document against a JSON schema; each error is one line with its position.

The schema comes from dataclasses, and it is the one that editors read. This module does not depend
on the sweep format.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, get_args, get_origin

from jsonschema import Draft7Validator, FormatChecker, ValidationError
from jsonschema.validators import extend

from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    dotted_path,
    short_value,
    suggestion,
)

Schema = dict[str, Any]
T = TypeVar("T")

# `true` is no number, and neither are NaN and 1.0 a whole one.
_TYPES = Draft7Validator.TYPE_CHECKER.redefine_many(
    {
        "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
        "number": lambda _, value: (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ),
    }
)
_VALIDATOR: Any = extend(Draft7Validator, type_checker=_TYPES)
FORMATS = FormatChecker(formats=())  # checks of texts that a pattern cannot express


def text_schema(title: str, pattern: str, check: str = "line") -> Schema:
    """Schema of a text.

    Args:
        title: what messages show as allowed.
        pattern: also valid in JavaScript.
        check: name of a function in FORMATS.
    """
    return {"type": "string", "title": title, "pattern": pattern, "format": check}


def _is_line(text: Any) -> bool:
    """Tables print texts on terminals: no invisible characters, no line breaks."""
    return not isinstance(text, str) or (text.isprintable() and text == text.strip())


FORMATS.checks("line")(_is_line)


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_WORDS = "up to 64 letters, digits, `.`, `_` and `-`, starting with a letter or digit"
NAME = text_schema(NAME_WORDS, NAME_PATTERN)
LINE = text_schema("one line of visible text, not empty", r"^\S(.*\S)?$")
NULL: Schema = {"type": "null"}

# ---------------------------------------------------------------- dataclasses and their schema


def setting(
    default: Any,
    help: str,
    schema: Schema | Callable[[], Schema] | None = None,
    read: Callable[[Any], Any] | None = None,
    **limits: Any,
) -> Any:
    """A key of a part of the file, as a field of its dataclass.

    Args:
        default: MISSING: the key is required.
        schema: of its values, or a function that depends on the plugins in use; None: that of its
            annotation, with `limits`.
        read: converts a valid value; None: `typed`.
    """
    facts = {"help": help, "schema": schema, "read": read, "limits": limits}
    of: Any = {"default_factory" if callable(default) else "default": default}
    return dataclasses.field(**of, metadata=facts)


def object_schema(owner: Any) -> Schema:
    """The schema of the settings of a dataclass."""
    settings = [f for f in dataclasses.fields(owner) if f.metadata]
    hints, properties = typing.get_type_hints(owner), {}
    for f in settings:
        schema = f.metadata["schema"] or schema_of(hints[f.name], **f.metadata["limits"])
        schema = schema() if callable(schema) else schema
        properties[f.name] = described(schema, f.default, f.metadata["help"])
    nothing = dataclasses.MISSING
    required = [f.name for f in settings if f.default is f.default_factory is nothing]
    return mapping_schema(properties, **({"required": required} if required else {}))


def mapping_schema(properties: Mapping[str, Schema], **more: Any) -> Schema:
    """The schema of a mapping with some of these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def described(schema: Schema, default: Any, help: str) -> Schema:
    """The schema with a description, and with the default if a user can write it as a value."""
    is_shown = isinstance(default, bool | int | float | str)
    is_shown |= default is None and NULL in schema.get("anyOf", ())
    return {**schema, **({"default": default} if is_shown else {}), "description": help}


_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def schema_of(kind: Any, **limits: Any) -> Schema:
    """The schema of an annotation, with limits of its numbers."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return {"enum": list(options), "type": "string"}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": schema_of(options[0])}
    if dataclasses.is_dataclass(kind):
        return object_schema(kind)
    if options:
        return {"anyOf": [schema_of(option, **limits) for option in options]}
    return {"type": _KINDS[kind], **(limits if kind in (int, float) else {})}


def list_schema(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}


def made(owner: type[T], given: Mapping[str, Any]) -> T:
    """An instance of a dataclass from the valid mapping of a document."""
    hints, facts = typing.get_type_hints(owner), owner.__dataclass_fields__  # type: ignore[attr-defined]
    read = {name: facts[name].metadata["read"] or partial(typed, hints[name]) for name in given}
    return owner(**{name: read[name](value) for name, value in given.items()})


def typed(kind: Any, value: Any) -> Any:
    """A valid value as an annotation has it: with floats, tuples and dataclasses."""
    options = (kind,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return made(option, value)  # type: ignore[arg-type]
        if option is float and type(value) is int:
            return float(value)
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(typed(get_args(option)[0], item) for item in value)
    return value


# ---------------------------------------------------------------- errors


def check(document: Document, schema: Schema, also: Iterable[SpecError] = ()) -> None:
    """Check a document's value.

    Args:
        also: errors to report together with those of the value.

    Raises:
        SpecError: the value is invalid; the message has the positions and the allowed values.
    """
    if errors := list(_errors(document, schema)):
        wrong = {error.keys[:depth] for error in errors for depth in range(len(error.keys) + 1)}
        raise joined([*errors, *(error for error in also if error.keys not in wrong)])


def error_message(schema: Schema, value: Any) -> str:
    """The error message of a value; empty if it is valid."""
    errors = _errors(Document(source="", value=value), schema)
    return next((str(error).removeprefix(": ") for error in errors), "")


MOST = 10  # mistakes in a message


def joined(errors: Iterable[SpecError]) -> SpecError:
    """One error with the first line of each place, in the order of the document."""
    first: dict[Keys, str] = {}
    for error in errors:
        first.setdefault(error.keys, str(error))
    messages = sorted(first.values(), key=_line_and_column)
    more = [f"and {len(messages) - MOST} more mistakes"] if len(messages) > MOST else []
    return SpecError("\n".join([*messages[:MOST], *more]))


def _line_and_column(message: str) -> list[int]:
    found = re.match(r".*?:(\d+):(\d+): ", message)
    return [int(number) for number in found.groups()] if found else []


def _errors(document: Document, schema: Schema) -> Iterator[SpecError]:
    for error in _VALIDATOR(schema, format_checker=FORMATS).iter_errors(document.value):
        for inner in _innermost(error):
            yield from _spec_errors(document, inner, schema)


def _innermost(error: ValidationError) -> list[ValidationError]:
    """Of a value that fits none of several types the mistakes inside it, or the error itself."""
    depth = len(error.absolute_path)
    within = [
        inner
        for option in (error.context or () if error.validator == "anyOf" else ())
        for inner in _innermost(option)
        if len(inner.absolute_path) > depth
        or inner.validator in ("required", "additionalProperties")
    ]
    return within or [error]


def _spec_errors(document: Document, error: ValidationError, schema: Schema) -> Iterator[SpecError]:
    keys: Keys = tuple(error.absolute_path)
    value, rule, part = error.instance, error.validator_value, error.schema
    if error.validator == "required":
        known = ", ".join(part["properties"])
        for name in (name for name in rule if name not in value):
            missing = document.error(keys, f"`{name}` is missing; keys here: {known}")
            yield SpecError(str(missing), (*keys, name))
    elif error.validator == "additionalProperties":
        for name in (name for name in value if name not in part["properties"]):
            message = _unknown_key(document, (*keys, name), part, schema)
            yield document.key_error((*keys, name), message)
    elif error.validator == "uniqueItems":
        i = next(i for i, item in enumerate(value) if item in value[:i])
        yield document.error((*keys, i), f"{short_value(value[i])} is listed twice; allowed: once")
    elif error.validator == "oneOf":  # of keys that are required together
        choices = " or ".join(
            " and ".join(f"`{name}`" for name in option["required"]) for option in rule
        )
        yield document.key_error(keys, f"the keys do not fit together; allowed: {choices}")
    elif error.validator == "not":
        yield document.key_error(keys, part["title"])
    elif error.validator == "minProperties":
        yield document.key_error(keys, "the mapping is empty; allowed: one key or more")
    elif keys and (message := _section_message(document, keys, schema)):
        yield document.key_error(keys, message)
    else:
        allowed = f"allowed: {allowed_values(part)}"
        if keys[:1] == ("fixed",) and isinstance(value, list):
            allowed += "; a list of values is allowed under grid"
        listed = (each for option in _options(part) for each in option.get("enum", []))
        meant = suggestion(str(value), map(str, listed))
        yield document.error(keys, f"{short_value(value)} is not allowed; {meant}{allowed}")


def _unknown_key(document: Document, keys: Keys, part: Schema, schema: Schema) -> str:
    """The message for an unknown key of a mapping with the schema `part`."""
    if message := _section_message(document, keys, schema):
        return message
    if others := _other_places(schema, keys):
        return f"unknown key here; allowed {others}"
    return f"unknown key; {key_choices(str(keys[-1]), part['properties'])}"


def _section_message(document: Document, keys: Keys, schema: Schema) -> str:
    """The message for a mapping in place of keys with a dot; empty for any other value."""
    section, value = keys[-1], document.value_at(keys)
    allowed = _keys(_part(schema, keys[:-1]))
    is_section = any(name.startswith(f"{section}.") for name in allowed)
    if not is_section or not isinstance(value, dict) or not value:
        return ""
    inner = next(iter(value))
    name = f"{section}.{inner}"
    if name not in allowed:
        return f"unknown key {name}; {key_choices(name, allowed)}"
    wanted = f"{name}: {short_value(value[inner])}"
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


def _part(schema: Schema, keys: Keys) -> Schema:
    """The part of a schema that describes the value at `keys`."""
    for step in keys:
        for option in _options(schema):
            named = option.get("properties", {}).get(step)
            if inner := option.get("items") if isinstance(step, int) else named:
                schema = inner
                break
    return schema


def _options(schema: Schema) -> Iterator[Schema]:
    yield schema
    for option in schema.get("anyOf", []):
        yield from _options(option)


def _keys(schema: Schema) -> list[str]:
    """The keys of a mapping, from the first option that lists them."""
    listed = (option["properties"] for option in _options(schema) if "properties" in option)
    return list(next(listed, ()))


# ---------------------------------------------------------------- a schema in words

_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WORDS = {
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
    if schema["type"] == "array":
        return LISTED + allowed_values(schema["items"])
    bounds = " and ".join(f"{_SIGNS[name]} {schema[name]}" for name in _SIGNS if name in schema)
    return f"{_WORDS[schema['type']]} {bounds}".strip()


def yaml_text(value: Any) -> str:
    """A value in YAML's notation."""
    return value if isinstance(value, str) else json.dumps(value)


def key_choices(word: str, names: Iterable[str]) -> str:
    """The end of a message: the allowed keys; of many those in the section of `word`, or some."""
    names = list(names)
    head = word.partition(".")[0]
    section = [name for name in names if name.startswith(f"{head}.")]
    meant = suggestion(word, names) or suggestion(head, names)
    listed = names if len(names) < 20 else section or names
    more = ", ... (all: docs/spec_reference.md)" if len(listed) > 10 and len(names) >= 20 else ""
    return f"{meant}allowed: {', '.join(listed[:3] if more else listed)}{more}"
