"""Code version of each stage: a hash of the code that computes it, as part of artifact keys.

`code_versions.json` lists, for each recipe number, the code versions that give the same results.
A listed version does not appear in keys. Any other version, for example after an edit, is written
into the spec, so that its artifacts get new keys.

The version of a part is a hash of the definitions in its modules, without docstrings, comments,
layout and imports. Names and order of the modules do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from air_core.components import REGISTRIES
from air_core.models.families import FAMILIES
from air_core.specs import STAGES, CodeVersions
from orchestrator.files import ROOT

LISTED = Path(__file__).with_name("code_versions.json")
FIRST_RECIPES = {"trials": 2}  # of runs that recorded none; of other stages 1
# Python 3.11 fails with "AST constructor recursion depth mismatch" if two threads parse at once.
_parsing = threading.Lock()

# The modules that compute each stage. Other parts are the reader of each dataset, and components
# with modules of their own (`COMPONENTS`).
PARTS: dict[str, tuple[str, ...]] = {spec.stage: spec.modules for spec in STAGES}
COMPONENTS: dict[str, tuple[str, ...]] = {
    registry.part(name): component.modules
    for registry in REGISTRIES.values()
    for name, component in registry.items()
    if component.modules
} | {f"family:{kind}": (family.module,) for kind, family in FAMILIES.items()}


def modules_of(part: str) -> tuple[str, ...]:
    """Modules of a stage, a component or a dataset's reader."""
    return PARTS.get(part) or COMPONENTS.get(part) or (f"air_core.{part}",)


@cache
def part_version(part: str) -> str:
    """Code version of a part, from the files on disk: 12 hex digits.

    Raises:
        ValueError: a dataset has no module of the same name.
    """
    modules = modules_of(part)
    if not _source(modules[0]).is_file():
        raise ValueError(
            f"{_source(modules[0])} does not exist: name the module of a dataset after the "
            "dataset, so that an edit of the module leads to new features"
        )
    definitions = sorted(digest for module in modules for digest in _definitions(module))
    return _hash("".join(definitions))


@cache
def listed_versions() -> dict[str, dict[str, Any]]:
    """Recipe number and its code versions, by part."""
    found: dict[str, dict[str, Any]] = json.loads(LISTED.read_text())
    return found


@cache
def unlisted_versions(*readers: str) -> CodeVersions:
    """Stages, components and dataset readers whose code version is not listed, with it."""
    versions = {part: part_version(part) for part in (*PARTS, *COMPONENTS, *readers)}
    return tuple(
        (part, found)
        for part, found in versions.items()
        if found not in listed_versions().get(part, {}).get("versions", ())
    )


def recipes() -> dict[str, int]:
    """Recipe number of each stage."""
    return {spec.stage: spec.recipe for spec in STAGES}


def recorded_versions(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Code versions of a recorded run, by part; `v<number>` where its recipe number is another one
    than now.

    Args:
        inputs: `Resolver.inputs` of that run.
    """
    versions = dict(inputs.get("code", {}))
    recorded = inputs.get("recipes", FIRST_RECIPES)
    for stage, number in recipes().items():
        if (then := recorded.get(stage, 1)) != number:
            versions[stage] = "+".join(filter(None, (f"v{then}", versions.get(stage))))
    return versions


@cache
def _definitions(module: str) -> tuple[str, ...]:
    """Hash of each top-level statement of a module."""
    with _parsing:
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        if not _is_passive(node):
            found.append(_hash("".join(_tokens(node))))
    return tuple(found)


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


def _tokens(node: Any) -> Iterator[str]:
    """Tokens of a syntax tree that do not depend on the version of Python."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name in node._fields:
            value = getattr(node, name, None)
            if name in ("ctx", "kind", "type_comment", "type_params") or value is None:
                continue
            if name == "body" and isinstance(value, list):
                value = [child for child in value if not _is_passive(child)]
            yield from _tokens(value)
    elif isinstance(node, list):
        yield "["
        for child in node:
            yield from _tokens(child)
        yield "]"
    else:
        yield repr(node)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
