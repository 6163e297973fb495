"""Code version of each stage: a hash of the code that computes it, as part of artifact keys.

`code_versions.json` has the version of each part whose results the recipe numbers stand for. That
version does not appear in keys. Any other version, for example after an edit, is written into the
spec, so that its artifacts get new keys. If the edit changes no result, `make golden` records its
version, and the artifacts keep their keys.

The version of a stage is a hash of the definitions in its modules, without docstrings, comments,
layout and imports. Names and order of the modules do not count. That of a component is a hash of
its definition and of those in its module that it uses. Of such a module, a stage counts what other
modules import from it and what that uses: an edit of a strategy changes the keys of its trials.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from air_core.models.families import FAMILIES
from air_core.settings.components import DATASETS, REGISTRIES, added_by, syntax
from orchestrator.keys import CodeVersions, StageSpec

RECORDED = Path(__file__).with_name("code_versions.json")

# Modules that do not affect results, or whose effect is in the key.
NOT_COUNTED = {
    "air_core.settings.components",  # which modules belong to a component
    "air_core.datasets",  # the table of datasets
    "air_core.models.configs",  # refuses models; their content is in the key
    "air_core.models.families",  # the same, and the table of families
    "air_core.models.weights",  # paths of models; their content is in the key
    "air_core.tools.printable",  # messages
    "air_core.tools.seal",  # how files are written
    "air_core.settings",  # what is in the key
    "air_core.settings.conditions",  # which settings and inputs are in the key
    "air_core.settings.flat",  # spelling of keys
    "air_core.settings.normal",  # which settings are in the key
}
# Parts beside stages and readers of datasets: components, `module:name`, and families of models.
COMPONENTS: dict[str, str] = {
    registry.part(name): component.target
    for registry in REGISTRIES.values()
    for name, component in registry.items()
    if registry.of_trials and registry is not DATASETS and not component.source
}
_OF_COMPONENTS = {target.partition(":")[0] for target in COMPONENTS.values()}
PARTS = COMPONENTS | {f"family:{kind}": family.module for kind, family in FAMILIES.items()}


@cache
def part_version(part: str) -> str:
    """Code version of a part that is no stage, from the files on disk: 12 hex digits."""
    if part not in PARTS:  # a dataset's reader, with all that it imports
        return _version(_counted([f"air_core.{part}"]))
    module, _, name = PARTS[part].partition(":")
    return _version(_definitions(module, {name or ALL}))


@cache
def stage_version(spec: type[StageSpec]) -> str:
    """Code version of a stage: of its modules and of all that they import."""
    return _version(_counted(spec.modules))


def imported(modules: Iterable[str]) -> dict[str, set[str]]:
    """Some modules of air_core with all that they import, but for NOT_COUNTED, and the names that
    are imported from each."""
    found = {module: {ALL} for module in modules}
    waiting = [*found]
    while waiting:
        for module, names in _parsed(waiting.pop())[1].items():
            if module not in found.keys() | NOT_COUNTED:
                waiting.append(module)
            if module not in NOT_COUNTED:
                found.setdefault(module, set()).update(names)
    return found


def _counted(modules: Iterable[str]) -> Iterator[str]:
    """Hashes of the definitions in some modules and in all that they import."""
    for module, names in imported(modules).items():
        yield from _definitions(module, names if module in _OF_COMPONENTS else {ALL})


def _version(digests: Iterable[str]) -> str:
    return _hash("".join(sorted(digests)))


@cache
def recorded_versions() -> dict[str, str]:
    """The version of each part that is that of its recipe."""
    found: dict[str, str] = json.loads(RECORDED.read_text())
    return found


@cache
def changed_versions(stages: tuple[type[StageSpec], ...], *readers: str) -> CodeVersions:
    """Stages, components and dataset readers whose code is not that of the recipe, with its
    version."""
    versions = {spec.stage: stage_version(spec) for spec in stages}
    versions |= {part: part_version(part) for part in (*PARTS, *readers)}
    recorded = recorded_versions()
    return tuple((part, found) for part, found in versions.items() if found != recorded.get(part))


ALL = "*"  # every name of a module


@dataclass(frozen=True)
class _Definition:
    """A top-level statement: its hash, the names that it binds, and those that it contains."""

    digest: str
    names: frozenset[str]
    uses: frozenset[str]


def _definitions(module: str, names: set[str]) -> list[str]:
    """Hashes of the definitions of these names in a module, and of all that they use there."""
    left, uses = _parsed(module)[0], names
    while reached := [one for one in left if ALL in names or not one.names or one.names & uses]:
        left = [one for one in left if one not in reached]
        uses = uses.union(*(one.uses for one in reached))
    return [one.digest for one in _parsed(module)[0] if one not in left]


@cache
def _parsed(module: str) -> tuple[list[_Definition], dict[str, set[str]]]:
    """The definitions of a module, and the modules of air_core with the names that it imports."""
    tree = syntax(module)
    definitions = [_definition(node) for node in tree.body if not _is_passive(node)]
    imports: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("air_core"):
            for alias in node.names:
                at_top = node.module == "air_core"
                source = f"air_core.{alias.name}" if at_top else str(node.module)
                imports.setdefault(source, set()).add(ALL if at_top else alias.name)
    return definitions, imports


def _definition(node: ast.stmt) -> _Definition:
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    binds = {each.id for each in names if isinstance(each.ctx, ast.Store)}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        binds = {node.name}
    uses = frozenset(each.id for each in names)
    return _Definition(_hash(_text(node)), frozenset(binds), uses)


def _is_passive(node: ast.stmt) -> bool:
    """Whether a statement is an import or a docstring, which compute nothing."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _text(node: Any) -> str:
    """A syntax tree as text that does not depend on the version of Python."""
    if isinstance(node, list):
        return f"[{''.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [type(node).__name__]
    for name in node._fields:
        value = getattr(node, name, None)
        if name in ("ctx", "kind", "type_comment", "type_params") or value is None:
            continue
        if name == "decorator_list":  # what a registry says about a component is no code of it
            value = [each for each in value if not added_by(each)]
        if name == "body" and isinstance(value, list):
            value = [child for child in value if not _is_passive(child)]
        parts.append(_text(value))
    return "".join(parts)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
