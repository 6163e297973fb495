"""docs/spec_reference.md: the schema of a sweep file as a page. `make golden` writes it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator import presets
from orchestrator.schema import Schema, sweep_schema

HEAD = """\
# Sweep files: every key

*Written by `make golden` from the schema that `airsweep schema` prints; not edited by hand.*

A sweep file is one question in YAML; [tutorial.md](tutorial.md) shows how one grows. A mistake is a
message with line, column, what is allowed and what you probably meant. An editor that has
yaml-language-server says so while you type, with the schema in a file beside it:

```
airsweep schema > airsweep.schema.json
```

and its name in the first line of the sweep file:

```yaml
# yaml-language-server: $schema=airsweep.schema.json
```

The comment that the file opens with is the question: MLflow shows it above the table. Numbers are
read as people mean them (`1e-4` is a number). Keys with a dot stand as they are: `lora.rank: 4`.
"""

SEARCHED = """\
A dimension has `values`, or `min` and `max` where the key has numbers (`log: true`: evenly on a
logarithmic scale), and maybe `when`, a condition on other keys such as `images_per_class > 0`.
A search may use every setting below but seeds, names of the cell and what changes the images; these
stand under `grid`. Not searched:"""

TRIAL = """\
These stand under `grid` (a list), `fixed` (a value), `exclude` and `search.space`. Precedence:
default < world < method < `fixed` < `grid` < `search.space`. `airsweep plan SPEC --explain` prints
the value of each in every cell, and where it comes from."""

WORLDS = """\
Defaults above are those of Stable Diffusion 1.5 and CLIP ViT-B/32. With the embedded models and the
digits these hold instead:"""

METHODS = """\
What a method pins defines it and cannot be overridden; other settings are free."""

SEEDS = """\
`[1, 2, 3]` runs each point three times, with these values of `seed`. To vary more than one,
`{values: [[1, 301], [2, 302]], vary: [seed, split_seed]}`; a plain number there is for all. Every
`split_seed` is another pool, with a LoRA and images of its own."""


def reference() -> str:
    """The page, the same bytes for the same code."""
    schema = sweep_schema()
    blocks = [HEAD.rstrip(), "## Parts of a file", _parts(schema)]
    blocks += ["### `seeds`", SEEDS]
    for name in ("search", "budget", "resources"):
        blocks += [f"### `{name}`", _sections(schema["properties"][name], name)]
        if name == "search":
            blocks.append(_searched(schema))
    blocks += ["## Settings of a trial", TRIAL]
    for group, names in _groups(schema["definitions"]).items():
        blocks += [f"### `{group}`"] if group else []
        blocks.append(_settings({name: schema["definitions"][name] for name in names}))
    blocks += ["## Defaults of the small world", WORLDS, _worlds()]
    blocks += ["## Methods", METHODS, _methods()]
    return "\n\n".join(blocks) + "\n"


def _parts(schema: Schema) -> str:
    needed = schema["required"]
    lines = []
    for name, part in schema["properties"].items():
        must = "needed; " if name in needed else ""
        lines.append([f"`{name}`", must + _text(part), _values(part)])
    return _table(("part", "what", "values"), lines)


def _sections(section: Schema, name: str) -> str:
    return _table(("key", "what", "values", "default"), list(_lines(section, name)))


def _lines(section: Schema, path: str) -> Iterator[list[str]]:
    """One for each key below a section, down to the leaves."""
    for name, found in section["properties"].items():
        inner = next((one for one in [found, *found.get("anyOf", [])] if "properties" in one), None)
        here = f"{path}.{name}"
        if inner is None or name == "space":
            yield [f"`{here}`", _text(found), _values(found), _default(found)]
        else:
            yield from _lines(inner, here)


def _searched(schema: Schema) -> str:
    space = schema["properties"]["search"]["properties"]["space"]["properties"]
    left_out = [name for name in schema["definitions"] if name not in space]
    heads = dict.fromkeys(name.partition(".")[0] for name in left_out)
    return "\n".join(
        [SEARCHED, *textwrap.wrap(", ".join(f"`{head}`" for head in heads) + ".", 100)]
    )


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Trial keys by what stands before their dot; first those without one."""
    every = list(names)
    heads = {name.partition(".")[0] for name in every if "." in name}
    groups: dict[str, list[str]] = {"": []}
    for name in every:
        head = name.partition(".")[0]
        groups.setdefault(head if head in heads else "", []).append(name)
    return groups


def _settings(definitions: Mapping[str, Schema]) -> str:
    lines = [
        [f"`{name}`", _default(found), _values(found), _text(found)]
        for name, found in definitions.items()
    ]
    return _table(("key", "default", "values", "what"), lines)


def _worlds() -> str:
    lines = [
        [f"`{key}: {value}`", _several(settings)]
        for (key, value), settings in presets.WORLDS.items()
    ]
    lines += [
        [f"`{key}: {value}` and `method: {name}`", _several(settings)]
        for (key, value, name), settings in presets.METHOD_WORLDS.items()
    ]
    return _table(("where", "default"), lines)


def _methods() -> str:
    lines = [
        [
            f"`{name}`",
            _several(method.pins),
            _several(method.sets),
            f"`{method.host}`" if method.host else "",
            f"`{method.control}`" if method.control else "",
            ", ".join(method.paradigms),
        ]
        for name, method in presets.METHODS.items()
    ]
    header = ("method", "pins", "other defaults", "compared with", "control", "paradigms")
    return _table(header, lines)


# ---------------------------------------------------------------- words

_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "keys",
}
# What only a pattern says, by how it begins.
_PATTERNS = {
    "^folder:": "`folder:<path>`",
    "^[A-Za-z0-9]": "letters, digits, `.`, `_`, `-`; up to 64",
    "^[0-9]": "`90s`, `30m`, `12h`",
}


def _text(found: Schema) -> str:
    return str(found.get("description", "")).replace("<", "\\<")  # else a tag of HTML


def _values(found: Schema) -> str:
    if "$ref" in found:
        return "value"
    if "const" in found:
        return _code(found["const"])
    if "enum" in found:
        return ", ".join(map(_code, found["enum"]))
    if found.get("type") == "array":
        each = _values(found["items"])
        return "list" if " or " in each else f"list, each: {each}"
    if "anyOf" in found:
        return " or ".join(_values(one) for one in found["anyOf"])
    pattern = found.get("pattern", "")
    words = [words for begin, words in _PATTERNS.items() if pattern.startswith(begin)]
    if words:
        return words[0]
    types = found.get("type", "")
    bounds = " and ".join(f"{_SIGNS[name]} {found[name]}" for name in _SIGNS if name in found)
    kinds = [types] if isinstance(types, str) else types
    return " or ".join(
        f"{_TYPES[kind]} {bounds if kind in ('integer', 'number') else ''}".strip()
        for kind in kinds
    )


def _default(found: Schema) -> str:
    return _code(found["default"]) if "default" in found else ""


def _several(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {_plain(value)}`" for key, value in settings.items())


def _code(value: Any) -> str:
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    # A bar ends a cell, in code too.
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [list(header), ["---"] * len(header), *safe]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
