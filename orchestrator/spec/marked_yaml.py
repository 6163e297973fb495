"""Plain YAML that remembers where everything stood, so that a message can point at it.

Knows nothing of sweeps. It reads the data part of YAML only: mappings with text keys, lists, text,
numbers, true/false, null. No tags, no merge keys, one document, and aliases that stay small. At its
end, our own cluster files are read and written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # an alias counts each time it is used: ten lines can stand for billions
MAX_DEPTH = 12
TOO_MUCH = (
    f"too much: allowed are {MAX_DEPTH} levels and {MAX_VALUES:,} values, aliases written out"
)

Keys = tuple[str | int, ...]  # the way from the root to a value


class SpecError(ValueError):
    """A sweep file, or an option that changes it, is wrong. One line, ready to be printed."""


@dataclass(kw_only=True)
class Document:
    """A value and the place of each of its parts."""

    source: str
    text: str = ""
    value: Any = None
    places: dict[Keys, str] = field(default_factory=dict)  # where a value starts
    key_places: dict[Keys, str] = field(default_factory=dict)  # where its key starts

    def at(self, keys: Keys) -> Any:
        value = self.value
        for step in keys:
            value = value[step]
        return value

    def put(self, keys: Keys, value: Any, place: str) -> None:
        """Write a value where a mapping is, or can be made; messages about it name `place`."""
        owner: Any = self.value
        for depth, step in enumerate(keys):
            if not isinstance(owner, dict):
                raise SpecError(f"{place}: {dotted(keys[:depth])} holds no `key: value` lines")
            here = keys[: depth + 1]
            if step not in owner or here == keys:
                self._forget(here)
                self.places[here] = self.key_places[here] = place
                owner[step] = value if here == keys else {}
            owner = owner[step]

    def _forget(self, keys: Keys) -> None:
        for places in (self.places, self.key_places):
            for known in [known for known in places if known[: len(keys)] == keys]:
                del places[known]

    def error(self, keys: Keys, message: str) -> SpecError:
        """An error about the value; where there is none, about what should hold it."""
        return self._error(self.places, keys, message)

    def key_error(self, keys: Keys, message: str) -> SpecError:
        """An error about the key."""
        return self._error(self.key_places, keys, message)

    def _error(self, places: dict[Keys, str], keys: Keys, message: str) -> SpecError:
        for length in range(len(keys), -1, -1):
            place = places.get(keys[:length]) or self.places.get(keys[:length])
            if place:
                break
        path = f"{dotted(keys)}: " if keys else ""
        return SpecError(f"{place or self.source}: {path}{message}")


def dotted(keys: Keys) -> str:
    """The way to a value as people write it.

    >>> dotted(("grid", "lora.rank", 1))
    'grid.lora.rank[1]'
    """
    path = ""
    for step in keys:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += ("." if path else "") + (step if step.isprintable() else repr(step))
    return path


def shown(value: Any) -> str:
    """A value for a message: short, on one line, and in the words of YAML where they differ."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read(path: Path) -> Document:
    """A YAML file.

    Raises:
        SpecError: it cannot be read, is not UTF-8, too large, or not the YAML we take.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path}: larger than 1 MB; a sweep file is a page or two")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_column(data[: error.start].decode("latin-1"))
        raise SpecError(f"{path}:{line}:{column}: not UTF-8 text") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """YAML text; `source` names it in messages."""
    document = Document(source=source, text=text)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(source, mark) if mark else source
        raise SpecError(f"{place}: {_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        line, column = _line_column(text[: error.position])
        raise SpecError(f"{source}:{line}:{column}: not a character that YAML allows") from None
    except (ValueError, OverflowError):  # PyYAML turns "\\U00110000" into chr() unchecked
        raise SpecError(f"{source}: an escape in quotes that is no character") from None
    if node is not None:
        document.value = _Reader(document).plain(node, ())
    return document


def _place(source: str, mark: yaml.Mark) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}"


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _problem(error: yaml.MarkedYAMLError) -> str:
    if "another document" in (error.problem or ""):
        return "a second document starts here; a sweep file holds one"
    if error.problem == TOO_MUCH:
        return TOO_MUCH
    if r"'\t'" in (error.problem or ""):
        return "a tab, where YAML allows only spaces"
    return f"not YAML: {error.problem or error.context}"


class _Loader(yaml.SafeLoader):
    """Plain scalars as people mean them: 1e-4 is a number and 12:30 is not (YAML 1.1 differs)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the parent's type)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=TOO_MUCH, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # 19 digits and more would not fit into 64 bits; they are read as a float.
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
    """Nodes to plain values, noting places on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def plain(self, node: yaml.Node, keys: Keys) -> Any:
        self.document.places[keys] = _place(self.document.source, node.start_mark)
        self.count += 1
        if len(keys) > MAX_DEPTH or self.count > MAX_VALUES:
            raise self._refused(node, TOO_MUCH)
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
                raise self._refused(node, f"{shown(node.value)} is no {kind}")
            return value(node.value)
        raise self._refused(node, f"the tag {node.tag!r} is not allowed; write plain YAML")

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != _TAG + "str":
                raise self._refused(key_node, "a key must be text; quote it if it is")
            if key == "<<":
                raise self._refused(key_node, "merge keys (<<) are not read; write the keys out")
            here = (*keys, key)
            if key in mapping:
                first = self.document.key_places[here].removeprefix(self.document.source + ":")
                raise self._refused(key_node, f"{shown(key)} stands here again, after {first}")
            self.document.key_places[here] = _place(self.document.source, key_node.start_mark)
            mapping[key] = self.plain(value_node, here)
        return mapping

    def _refused(self, node: yaml.Node, message: str) -> SpecError:
        return SpecError(f"{_place(self.document.source, node.start_mark)}: {message}")


def choices(word: Any, allowed: Iterable[Any]) -> str:
    """What is allowed, for the end of a message, and what was probably meant.

    >>> choices("tpo", ["tpe", "random"])
    'allowed: tpe, random; did you mean tpe?'
    """
    options = [_plain(option) for option in allowed]
    return f"allowed: {', '.join(options) or 'nothing'}{meant(_plain(word), options)}"


def meant(word: str, options: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no option looks like the word."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else shown(value)


# ---------------------------------------------------------------- cluster files


def all_documents(text: str) -> list[Any]:
    """The documents of a file of ours: no limits, and nothing is remembered of places."""
    return list(yaml.safe_load_all(text))


def written(documents: Iterable[Any]) -> str:
    """Documents as YAML that all readers take for the same: no aliases, keys in their order."""
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Text with line breaks as a block; text that YAML 1.2 takes for a number in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    odd = not value.replace("\n", "").isprintable()  # PyYAML takes U+0085 for a line break
    style = '"' if odd else "|" if "\n" in value else None
    return dumper.represent_scalar(_TAG + "str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
