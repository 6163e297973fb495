"""Plain YAML with the line and column of each value, for error messages.

The reader accepts the data part of YAML only: mappings with text keys, lists, text, numbers,
true/false and null. It refuses tags, merge keys, a second document and aliases that expand to many
values. It does not depend on the sweep format.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 200_000  # which take a second
DICT = "<dict>"  # source of a sweep that Python code gave as a dict
MAX_VALUES = 10_000  # each use of an alias counts: ten lines can expand to billions of values
MAX_DEPTH = 12
TOO_LARGE = (
    f"the document is too large; allowed: {MAX_DEPTH} levels and {MAX_VALUES:,} values after "
    "aliases are expanded"
)

Keys = tuple[str | int, ...]  # the path from the root to a value


class SpecError(ValueError):
    """Errors in a sweep file or in an option that changes it. The message has one line for each.

    Args:
        keys: the path to the wrong value of the file.
    """

    def __init__(self, message: str, keys: Keys = ()) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(kw_only=True)
class Document:
    """A value and the position (file:line:column) of each of its parts."""

    source: str
    text: str = ""
    value: Any = None
    positions: dict[Keys, str] = field(default_factory=dict)  # where each value starts
    key_positions: dict[Keys, str] = field(default_factory=dict)  # where its key starts

    def value_at(self, keys: Keys) -> Any:
        value = self.value
        for step in keys:
            value = value[step]
        return value

    def section(self, keys: Keys) -> dict[str, Any]:
        """The mapping at `keys`; empty if there is none."""
        try:
            value = self.value_at(keys)
        except (LookupError, TypeError):
            return {}
        return value if isinstance(value, dict) else {}

    def set_value(self, keys: Keys, value: Any, position: str) -> None:
        """Set a value and create missing mappings above it; errors about it name `position`."""
        parent: Any = self.value
        for depth, step in enumerate(keys):
            if not isinstance(parent, dict):
                raise SpecError(
                    f"{position}: {dotted_path(keys[:depth])} does not contain `key: value` lines"
                )
            current = keys[: depth + 1]
            if step not in parent or current == keys:
                for positions in (self.positions, self.key_positions):
                    for path in [p for p in positions if p[: len(current)] == current]:
                        del positions[path]
                self.positions[current] = self.key_positions[current] = position
                parent[step] = value if current == keys else {}
            parent = parent[step]

    def error(self, keys: Keys, message: str) -> SpecError:
        """An error at the value; if the value is missing, at the closest mapping above it."""
        return self._error(self.positions, keys, message)

    def key_error(self, keys: Keys, message: str) -> SpecError:
        """An error at the key."""
        return self._error(self.key_positions, keys, message)

    def _error(self, positions: dict[Keys, str], keys: Keys, message: str) -> SpecError:
        for length in range(len(keys), -1, -1):
            position = positions.get(keys[:length]) or self.positions.get(keys[:length])
            if position:
                break
        path = f"{dotted_path(keys)}: " if keys else ""
        return SpecError(f"{position or self.source}: {path}{message}", keys)


def dotted_path(keys: Keys) -> str:
    """The path to a value as text.

    >>> dotted_path(("grid", "lora.rank", 1))
    'grid.lora.rank[1]'
    """
    path = ""
    for step in keys:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += ("." if path else "") + (step if step and step.isprintable() else repr(step))
    return path


def short_value(value: Any) -> str:
    """A value for a message: at most 60 characters, on one line, with YAML's null, true, false."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        SpecError: the file cannot be read, is not UTF-8, is too large, or is not plain YAML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path} is larger than 200 kB; allowed: files up to 200 kB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = line_column(data[: error.start].decode("latin-1"))
        raise SpecError(f"{path}:{line}:{column}: the file is not UTF-8 text") from None
    return parse(text, str(path))


def document_of(content: Mapping[str, Any]) -> Document:
    """A document with this content; lines in messages are those of its YAML.

    Raises:
        SpecError: a value is not plain data.
    """
    try:
        plain = json.loads(json.dumps(dict(content)))  # with lists for tuples, which YAML lacks
    except (TypeError, ValueError) as problem:
        raise SpecError(f"the sweep has a value that is not plain data: {problem}") from None
    return parse(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), DICT)


def parse(text: str, source: str) -> Document:
    """Parse YAML text; error messages name `source`."""
    document = Document(source=source, text=text)
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        why = " ".join(filter(None, (error.context, error.problem)))
        why += "; indent with spaces" if r"'\t'" in why else ""
        mark = error.problem_mark or error.context_mark
        raise _error(source, mark, f"the file is not valid YAML: {why}") from None
    except yaml.reader.ReaderError as error:
        line, column = line_column(text[: error.position])
        raise SpecError(f"{source}:{line}:{column}: YAML does not allow this character") from None
    except RecursionError:
        raise _error(source, loader.get_mark(), TOO_LARGE) from None
    except (ValueError, OverflowError):  # PyYAML passes the number of "\U00110000" to chr()
        raise _error(source, loader.get_mark(), "an escape is not a character") from None
    if node is not None:
        document.value = _Reader(document).plain(node, ())
    return document


def _error(source: str, mark: yaml.Mark | None, message: str) -> SpecError:
    return SpecError(f"{_position(source, mark) if mark else source}: {message}")


def _position(source: str, mark: yaml.Mark) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}"


def line_column(before: str) -> tuple[int, int]:
    """Line and column, from 1, of the character that follows a text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars unlike YAML 1.1: `1e-4` is a number and `12:30` is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the parent's type)


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # 19 or more digits do not fit into 64 bits; they become a float.
    "int": (r"[-+]?[0-9]{1,18}", "-+0123456789", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "bool": (
        r"(?i:true|false|yes|no|on|off)",
        "tTfFyYnNoO",
        lambda text: text.lower() in ("true", "yes", "on"),
    ),
    "null": (r"~|null|Null|NULL|", "~nN", lambda _: None),
}
for _name, (_pattern, _first, _) in _SCALARS.items():
    _empty = [""] if _name == "null" else []
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), [*_first, *_empty])


class _Reader:
    """Converts nodes to plain values and records their positions."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def plain(self, node: yaml.Node, keys: Keys) -> Any:
        self.document.positions[keys] = _position(self.document.source, node.start_mark)
        self.count += 1
        if len(keys) > MAX_DEPTH or self.count > MAX_VALUES:
            raise self._error(node, TOO_LARGE)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.plain(item, (*keys, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind == "str":
            return node.value
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            pattern, _, value = _SCALARS[kind]
            if not re.fullmatch(pattern, node.value):
                raise self._error(node, f"{short_value(node.value)} is not of type {kind}")
            return value(node.value)
        raise self._error(node, f"the tag {node.tag!r} is not allowed; allowed: plain YAML")

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != _TAG + "str":
                raise self._error(key_node, "a key must be text; put it in quotes")
            if key == "<<":
                raise self._error(key_node, "merge keys (<<) are not supported; write each key")
            path = (*keys, key)
            if key in mapping:
                first = self.document.key_positions[path].removeprefix(self.document.source + ":")
                raise self._error(
                    key_node, f"the key {short_value(key)} is repeated; first at {first}"
                )
            self.document.key_positions[path] = _position(self.document.source, key_node.start_mark)
            mapping[key] = self.plain(value_node, path)
        return mapping

    def _error(self, node: yaml.Node, message: str) -> SpecError:
        return _error(self.document.source, node.start_mark, message)


def allowed_choices(word: Any, allowed: Iterable[Any]) -> str:
    """The end of a message: the allowed value that is closest to `word`, and all of them.

    >>> allowed_choices("tpo", ["tpe", "random"])
    'did you mean tpe? allowed: tpe, random'
    """
    options = [_plain(option) for option in allowed]
    return f"{suggestion(_plain(word), options)}allowed: {', '.join(options) or 'nothing'}"


def suggestion(word: str, options: Iterable[str]) -> str:
    """`did you mean ...? `, or an empty text if no option resembles the word."""
    by_case = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_case, n=1)
    return f"did you mean {by_case[close[0]]}? " if close else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else short_value(value)
