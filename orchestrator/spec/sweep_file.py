"""Load and check sweep files. An error names file, line, column, key and the allowed values.

The checks cover everything that does not depend on data or model weights: names of weights are not
resolved. This module is independent of Ray, Optuna and the store.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from air_core.methods import EMBEDDED, METHODS
from air_core.settings.components import REGISTRIES, computed_from_registries
from orchestrator.files import ROOT, SHIPPED
from orchestrator.plugins import Plugin, components_of, read_plugin, use_plugins
from orchestrator.redact import find_password
from orchestrator.spec._trial_values import TEXTS, trial_names, typed_value
from orchestrator.spec.cells import combinations
from orchestrator.spec.checks import conflicting_keys, contradictions
from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    allowed_choices,
    line_column,
    parse,
    read,
    short_value,
)
from orchestrator.spec.schema import Schema, check, joined, key_choices, made, object_schema
from orchestrator.spec.sweep import SweepSpec, options_text, split_name

VERSION: Schema = {"const": 1, "description": "version of the file format"}


@computed_from_registries
@cache
def _file_schema() -> Schema:
    parts = object_schema(SweepSpec)
    properties = {"version": VERSION, **parts["properties"]}
    return {**parts, "properties": properties, "required": ["version", *parts["required"]]}


def sweep_schema() -> Schema:
    """The JSON schema of a sweep file, for editors: draft 7, which most editors support.

    It covers keys, types, limits and choices. `airsweep plan` also finds settings that
    contradict each other, such as a pinned key.
    """
    with_method = [
        {"required": [part], "properties": {part: {"required": ["method"]}}}
        for part in ("grid", "fixed")
    ]
    head: Schema = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return {**head, **_file_schema(), "title": "airsweep sweep file", "anyOf": with_method}


def load_sweep(path: Path, *, sets: Sequence[str] = (), only: Sequence[str] = ()) -> SweepSpec:
    """Read and check a sweep file. Runs the code of its plugins.

    Args:
        path: the file.
        sets: options of the form `key=value`. A trial key is set under `fixed`; a path such as
            `search.points` replaces that part of the file.
        only: options of the form `key=value[,value]`: the values of this grid key to keep.

    Raises:
        SpecError: the errors in the file and in `sets`, or the first error in `only`.
    """
    return sweep_from_document(read(path), sets, only)


def sweep_from_document(
    document: Document, sets: Sequence[str] = (), only: Sequence[str] = ()
) -> SweepSpec:
    """Check a file that is already parsed; see `load_sweep`."""
    if document.value is None:
        raise SpecError(
            f"{document.source}:1:1: the file is empty; a sweep file starts with `version: 1`"
        )
    _refuse_passwords(document, sets)
    plugins = _plugins_of(document)
    use_plugins(plugins)
    relative = frozenset(_relative_names(document.value))
    conflicts: list[SpecError] = []
    for option in sets:
        try:
            relative -= frozenset(_relative_names(_apply_option(document, option)))
        except SpecError as error:
            conflicts.append(SpecError(str(error), ("--set", option)))
    conflicts += conflicting_keys(document)
    check(document, _file_schema(), also=conflicts)
    spec = replace(
        made(SweepSpec, {key: value for key, value in document.value.items() if key != "version"}),
        question=_question(document.text),
        options=options_text(sets, only),
        source=document.source,
        text=document.text,
        document=document,
        relative_names=relative,
        plugins=tuple(plugins),
    )
    if "method" not in {**spec.grid, **spec.fixed}:
        allowed = f"allowed: {', '.join(METHODS)}"
        missing = document.error((), f"`method` is missing; set it under grid or fixed; {allowed}")
        raise joined([missing, *conflicts])
    if errors := [*conflicts, *contradictions(spec)]:
        raise joined(errors)
    return _select(spec, only)


def _plugins_of(document: Document) -> list[Plugin]:
    """Read the plugins that a file names; other mistakes in `plugins` are found later."""
    value = document.value
    names = value.get("plugins") if isinstance(value, dict) else None
    plugins = []
    for position, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str):
            try:
                plugins.append(read_plugin(name, Path(document.source).parent))
                components_of(plugins[-1])
            except (ValueError, OSError) as problem:
                raise document.error(("plugins", position), str(problem)) from None
    return plugins


def find_sweep(name_or_path: str) -> Path:
    """The path of a sweep file.

    A bare name is looked up in ./sweeps and its folders, in the working directory and among the
    sweeps that ship with airsweep.

    Raises:
        SpecError: no sweep has this name, or several have.
    """
    path = Path(name_or_path)
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    name = f"{path.name.removesuffix('.yaml')}.yaml"
    known: list[str] = []
    for files in (
        [*Path("sweeps").glob("*.yaml")],
        [*Path("sweeps").rglob("*.yaml")],
        [*Path().glob("*.yaml")],
        [*(SHIPPED / "sweeps").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")],
    ):
        found = sorted(str(file) for file in files if file.name == name and file.is_file())
        if len(found) > 1:
            raise SpecError(
                f"{name_or_path}: {len(found)} sweep files have this name; give the path of one: "
                f"{', '.join(found)}"
            )
        if found:
            return Path(found[0])
        known += [file.stem for file in files]
    close = difflib.get_close_matches(path.stem, sorted(set(known)), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "give the path of a sweep file"
    raise SpecError(f"{name_or_path}: no such file or sweep; {hint}")


def _refuse_passwords(document: Document, sets: Sequence[str]) -> None:
    # The store keeps the file with its comments and the options, and trackers show them.
    message = (
        "the address contains a password, which would be stored and shown with the results; remove "
        "user and password from the address and set environment variables instead: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_*"
    )
    index = find_password(document.text)
    if index is not None:
        line, column = line_column(document.text[:index])
        raise SpecError(f"{document.source}:{line}:{column}: {message}")
    for option in sets:
        if find_password(option) is not None:
            raise SpecError(f"--set {option.partition('=')[0]}: {message}")


# ---------------------------------------------------------------- options


def _apply_option(document: Document, option: str) -> dict[str, Any]:
    """Change the document; returns the value of the option, by its last key."""
    source = f"--set {option}"
    name, _, text = option.partition("=")
    if not text:
        raise SpecError(f"{source}: the option has no value; allowed: KEY=VALUE")
    value = parse(text, source).value
    head, _, rest = name.partition(".")
    parts = _file_schema()["properties"]
    if name in trial_names():
        keys: Keys = ("fixed", name)
        if isinstance(value, list) and name not in TEXTS:
            raise SpecError(
                f"{source}: --set {name} gives one value under fixed; to vary it, give "
                f"--set grid.{name}={text}; --only {name}=VALUE,VALUE keeps values of a grid"
            )
    elif head not in parts:
        raise SpecError(
            f"{source}: unknown key {name!r}; {key_choices(name, [*parts, *trial_names()])}"
        )
    elif name.startswith("search.space."):
        keys = ("search", "space", name.removeprefix("search.space."))
    elif rest:
        keys = (head, rest) if head in ("grid", "fixed") else (head, *rest.split("."))
    else:
        keys = (head,)
    document.set_value(keys, value, source)
    return {name.rpartition(".")[2]: value}


def _relative_names(value: Any, key: str = "") -> Iterator[str]:
    """Every `folder:<path>` and every name of a model in plain data that is no absolute path."""
    if isinstance(value, str):
        before, path = split_name(value)
        is_model = key in ("backbone", "generator") and value not in (
            EMBEDDED[key],
            *REGISTRIES[key],
        )
        if (is_model or before == "folder:") and not path.startswith(("/", "~")):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _relative_names(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _relative_names(item, name)


def only_values(grid: Mapping[str, Sequence[Any]], only: Sequence[str]) -> dict[str, list[Any]]:
    """The values of a grid that `key=value[,value]` options select, by key.

    Raises:
        SpecError: an option names a key or a value that is not in the grid.
    """
    selected: dict[str, list[Any]] = {}
    for option in only:
        source = f"--only {option}"
        key, _, text = option.partition("=")
        if key not in grid:
            raise SpecError(
                f"{source}: {key!r} is not a key of the grid; {allowed_choices(key, grid)}; --set "
                "changes other settings"
            )
        for item in parse(f"[{text}]", source).value:
            # A plugin that is not in use may have declared the key.
            value = typed_value(key, item) if key in trial_names() else item
            if value not in grid[key]:
                allowed = allowed_choices(value, grid[key])
                raise SpecError(f"{source}: {short_value(value)} is not in grid.{key}; {allowed}")
            selected.setdefault(key, []).append(value)
        if not selected.get(key):
            raise SpecError(
                f"{source}: the option has no value; allowed: {key}=VALUE or {key}=VALUE,VALUE"
            )
    return selected


def _select(spec: SweepSpec, only: Sequence[str]) -> SweepSpec:
    selected = only_values(spec.grid, only)
    grid = {
        key: tuple(value for value in values if value in selected.get(key, values))
        for key, values in spec.grid.items()
    }
    question = "" if only else spec.question  # which is about all cells
    smaller = replace(spec, grid=grid, axes=spec.grid, question=question)
    if next(combinations(smaller), None) is None:
        raise SpecError(
            f"--only {' --only '.join(only)}: no cell is left, because `exclude` removes them all"
        )
    return smaller


MODELINE = re.compile(r"#\s*yaml-language-server:")  # for editors; not part of the question


def _question(text: str) -> str:
    comment = itertools.takewhile(lambda line: line[:1] == "#", text.lstrip("\n").splitlines())
    lines = (line[1:].removeprefix(" ").rstrip() for line in comment if not MODELINE.match(line))
    return "\n".join(lines).strip()
