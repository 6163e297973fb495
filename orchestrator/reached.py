"""Which code a stage reaches, by reading it: the other half of an artifact's identity.

A key says what was asked; this says by what it was computed. Every function, class and constant of
`air_core` that a stage comes to, and of the stage itself, is hashed without docstrings, comments
and layout. What a spec says is in the key already, so the modules of specs do not count, and of a
table of functions only the rows that the spec names. Imports nothing of what it reads.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from air_core.normal import normalised
from air_core.specs import TrialSpec
from orchestrator.keys import RECIPES, Stage, digest

ROOT = Path(__file__).resolve().parents[1]
# Python 3.11 fails with "AST constructor recursion depth mismatch" where two threads parse at once.
_parsing = threading.Lock()

# Where each stage begins. Trials begin in the method: what surrounds it only reads and records.
ENTRIES: dict[str, tuple[str, ...]] = {
    "features": ("orchestrator.stages.build_features",),
    "labels": ("orchestrator.stages.build_labels",),
    "lora": ("orchestrator.stages.build_lora",),
    "images": ("orchestrator.image_rows.open_generator", "orchestrator.image_rows._draw"),
    "synthetic": ("orchestrator.workshop.Workshop.encoded",),
    "trials": ("air_core.method.learn", "air_core.paradigms.make_split"),
}
FOLLOWED = ("air_core.", "orchestrator.stages.", "orchestrator.image_rows.")
PASSED = ("orchestrator.workshop.",)  # followed, and not counted
# What these say is in the key.
IN_THE_KEY = ("air_core.specs.", "air_core.flat.", "air_core.normal.", "air_core.weights.")


@dataclass(frozen=True)
class Code:
    """What a stage reaches, by qualified name: a hash of each definition."""

    parts: Mapping[str, str] = field(hash=False)
    digest: str

    def changed(self, before: Mapping[str, str]) -> list[str]:
        """`file: name` of what differs from another time."""
        names = [n for n in {*self.parts, *before} if self.parts.get(n) != before.get(n)]
        return sorted(f"{_file_of(name)}: {name.rpartition('.')[2]}" for name in names)


def code_of(spec: Stage) -> Code:
    """The code that computes what `spec` asks for, as it lies on disk."""
    if isinstance(spec, TrialSpec):
        spec = normalised(spec)
    stage = RECIPES[type(spec)][0]
    return _code(stage, frozenset(_words(spec)) & _rows_of_tables())


@cache
def _code(stage: str, words: frozenset[str]) -> Code:
    parts = {
        found.name: found.hash
        for found in reached(ENTRIES[stage], words)
        if not found.name.startswith(PASSED)
    }
    return Code(parts, code_digest(parts))


def code_digest(parts: Mapping[str, str]) -> str:
    """Of a code, by the hashes of what it is made of."""
    return digest(dict(parts))[:12]


def _words(value: Any) -> Iterator[str]:
    """Every word that a spec says, names of datasets and models among them."""
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from _words(getattr(value, each.name))


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Definition:
    """A function, class or constant on the top level of a module."""

    name: str  # qualified
    node: ast.stmt
    rows: Mapping[str, ast.expr] | None  # of a table: its key words and what they stand for

    @property
    def hash(self) -> str:
        return hashlib.blake2b(_skeleton(self.node).encode(), digest_size=6).hexdigest()

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or 0) - self.node.lineno + 1


@dataclass(frozen=True)
class Module:
    definitions: Mapping[str, Definition]
    imported: Mapping[str, str]  # local name -> qualified name


def reached(entries: Iterable[str], words: frozenset[str] | None) -> list[Definition]:
    """Every definition that `entries` come to, in no order that matters.

    Args:
        words: rows of tables that count; None: all.
    """
    found: dict[str, Definition] = {}
    waiting = list(entries)
    while waiting:
        definition = _find(waiting.pop())
        if definition is None or definition.name in found:
            continue
        found[definition.name] = definition
        module = _module(definition.name.rpartition(".")[0])
        assert module is not None
        if definition.rows is None:
            read: list[ast.AST] = [definition.node]
        else:
            read = [row for word, row in definition.rows.items() if words is None or word in words]
        waiting += [name for node in read for name in _names(node, module, definition)]
    return [one for one in found.values() if one.rows is None]


@cache
def _find(name: str) -> Definition | None:
    """Where a qualified name is defined, through whatever passes it on."""
    if not name.startswith((*FOLLOWED, *PASSED)) or name.startswith(IN_THE_KEY):
        return None
    place, _, own = name.rpartition(".")
    module = _module(place)
    if module is None:  # a method counts with its class
        return _find(place) if "." in place else None
    if own in module.definitions:
        return module.definitions[own]
    passed_on = module.imported.get(own, name)  # a module that imports its own child ends here
    return None if passed_on == name else _find(passed_on)


@cache
def _module(name: str) -> Module | None:
    file = _source(name)
    if file is None:
        return None
    with _parsing:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions: dict[str, Definition] = {}
    for node in tree.body:
        for own in _defined(node):
            definitions[own] = Definition(f"{name}.{own}", node, _table(node))
    imported: dict[str, str] = {}
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and each.module:
            imported |= {a.asname or a.name: f"{each.module}.{a.name}" for a in each.names}
        elif isinstance(each, ast.Import):
            imported |= {a.asname: a.name for a in each.names if a.asname}
    return Module(definitions, imported)


def _source(name: str) -> Path | None:
    place = ROOT.joinpath(*name.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def _file_of(name: str) -> str:
    file = _source(name.rpartition(".")[0])
    return str(file.relative_to(ROOT)) if file else name.rpartition(".")[0]


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            named = [one for target in targets for one in ast.walk(target)]
            return [one.id for one in named if isinstance(one, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
            return [name]
    return []


def _table(node: ast.stmt) -> dict[str, ast.expr] | None:
    """The rows of a dict from words to things that are defined elsewhere."""
    value = getattr(node, "value", None)
    if not isinstance(value, ast.Dict):
        return None
    rows: dict[str, ast.expr] = {
        str(key.value): row
        for key, row in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(row, ast.Name | ast.Attribute)
    }
    return rows if rows and len(rows) == len(value.keys) else None


@cache
def _rows_of_tables() -> frozenset[str]:
    """The key words of every table that any stage reaches."""
    words: set[str] = set()
    for file in (ROOT / "air_core").rglob("*.py"):
        module = _module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if module is not None:
            words |= {w for one in module.definitions.values() for w in one.rows or ()}
    return frozenset(words)


def _names(node: ast.AST, module: Module, owner: Definition) -> Iterator[str]:
    """Qualified names that a piece of code mentions; a local variable may be taken for one."""
    home = owner.name.rpartition(".")[0]
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            if each.id in module.definitions:
                yield f"{home}.{each.id}"
            elif each.id in module.imported:
                yield module.imported[each.id]
        elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
            of = module.imported.get(each.value.id)
            if of is not None:
                yield f"{of}.{each.attr}"


def _skeleton(node: Any) -> str:
    """A syntax tree as text: without docstrings and places, the same in every Python."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:]
        said = [
            f"{name}={_skeleton(value)}"
            for name, value in sorted(fields.items())
            if value not in (None, []) and name not in ("ctx", "kind", "type_comment")
        ]
        return f"{type(node).__name__}({','.join(said)})"
    if isinstance(node, list):
        return f"[{','.join(map(_skeleton, node))}]"
    return repr(node)
