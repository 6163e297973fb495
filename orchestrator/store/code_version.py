"""Code version of each stage: a hash of the code that computes it, as part of artifact keys.

`code_versions.json` has the version of each part whose results the recipe numbers stand for. That
version does not appear in keys. Any other version, for example after an edit, is written into the
spec, so that its artifacts get new keys. If the edit changes no result, `make golden` records its
version, and the artifacts keep their keys.

The version of a part is a hash of the definitions in its modules, without docstrings, comments,
layout and imports. Names and order of the modules do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from air_core.components import REGISTRIES
from air_core.models.families import FAMILIES
from orchestrator.files import ROOT
from orchestrator.keys import CodeVersions, StageSpec

RECORDED = Path(__file__).with_name("code_versions.json")
# Python 3.11 fails with "AST constructor recursion depth mismatch" if two threads parse at once.
_parsing = threading.Lock()

# Modules that do not affect results, or whose effect is in the key.
NOT_COUNTED = {
    "air_core.components",  # which modules belong to a component
    "air_core.datasets",  # the table of datasets
    "air_core.models.configs",  # refuses models; their content is in the key
    "air_core.models.families",  # the same, and the table of families
    "air_core.models.weights",  # paths of models; their content is in the key
    "air_core.printable",  # messages
    "air_core.seal",  # how files are written
    "air_core.specs",  # what is in the key
    "air_core.specs.conditions",  # which settings and inputs are in the key
    "air_core.specs.flat",  # spelling of keys
    "air_core.specs.normal",  # which settings are in the key
}
# Parts beside stages and readers of datasets: components with modules of their own.
COMPONENTS: dict[str, tuple[str, ...]] = {
    registry.part(name): component.modules
    for registry in REGISTRIES.values()
    for name, component in registry.items()
    if component.modules
} | {f"family:{kind}": (family.module,) for kind, family in FAMILIES.items()}


def modules_of(part: str) -> tuple[str, ...]:
    """Modules of a component, or of a dataset's reader with all that it imports."""
    return COMPONENTS.get(part) or (*imported([f"air_core.{part}"]),)


@cache
def part_version(part: str) -> str:
    """Code version of a component or a dataset's reader, from the files on disk: 12 hex digits."""
    return _version(modules_of(part))


@cache
def stage_version(spec: type[StageSpec]) -> str:
    """Code version of a stage: of its modules and of all that they import."""
    return _version(imported(spec.modules))


def imported(modules: Iterable[str]) -> set[str]:
    """Some modules of air_core with all that they import, but for NOT_COUNTED."""
    found, waiting = set[str](), [*modules]
    while waiting:
        module = waiting.pop()
        if module not in found | NOT_COUNTED:
            found.add(module)
            waiting += _parsed(module)[1]
    return found


def _version(modules: Iterable[str]) -> str:
    return _hash("".join(sorted(digest for module in modules for digest in _parsed(module)[0])))


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
    versions |= {part: part_version(part) for part in (*COMPONENTS, *readers)}
    recorded = recorded_versions()
    return tuple((part, found) for part, found in versions.items() if found != recorded.get(part))


@cache
def _parsed(module: str) -> tuple[list[str], list[str]]:
    """Hash of each top-level statement of a module, and the modules of air_core that it imports."""
    with _parsing:
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    definitions = [_hash(_text(node)) for node in tree.body if not _is_passive(node)]
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("air_core"):
            names = [f"air_core.{alias.name}" for alias in node.names]
            imports += names if node.module == "air_core" else [str(node.module)]
    return definitions, imports


def _source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py"
    return file if file.is_file() else path.with_suffix(".py")


def _is_passive(node: ast.stmt) -> bool:
    """Whether a statement is an import, a docstring or `__all__`, which compute nothing."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
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
        if name == "body" and isinstance(value, list):
            value = [child for child in value if not _is_passive(child)]
        parts.append(_text(value))
    return "".join(parts)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
