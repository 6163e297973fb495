"""Tables of docs/spec_reference.md from the schema of a sweep file; `make golden` writes them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from air_core.datasets import DATASETS, keeps_validation
from air_core.methods import METHODS
from air_core.settings import Paradigm
from orchestrator.spec import presets, sweep_schema
from orchestrator.spec._trial_values import reason_not_searchable, trial_names
from orchestrator.spec.schema import Schema, allowed_values, yaml_text

NO_IMAGES = METHODS["pseudo"].pins
# Settings that many methods share, by their name in the table of methods.
SHARED = {
    "*CPL*": {k: v for k, v in METHODS["cpl"].pins.items() if k not in NO_IMAGES},
    "*GRIP*": {k: v for k, v in METHODS["grip"].pins.items() if k not in NO_IMAGES},
    "*no images*": NO_IMAGES,
    "*AiR*": METHODS["air"].sets,
}


def refresh_tables(page: str) -> str:
    """The page with every table between two marker comments generated again."""
    schema = sweep_schema()
    tables = {
        "parts": _keys(_rows(schema, "")),
        "not searched": _not_searched(),
        "settings": _keys(schema["properties"]["fixed"]["properties"].items()),
        "worlds": _worlds(),
        "methods": _methods(),
    }
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
        before, rest = page.split(start)
        page = before + start + table + end + rest.split(end)[1]
    return page


def _rows(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Each key of a file with its schema; sections of trial keys are one row."""
    for name, part in schema["properties"].items():
        inner = next((s for s in [part, *part.get("anyOf", [])] if "properties" in s), None)
        if inner is None or name in ("grid", "fixed", "space", "seeds"):
            yield f"{path}{name}", part
        else:
            yield from _rows(inner, f"{path}{name}.")


def _keys(rows: Iterable[tuple[str, Schema]]) -> str:
    lines = [
        [
            f"`{name}`",
            f"`{yaml_text(schema['default'])}`" if "default" in schema else "",
            _text(allowed_values(schema)),
            _text(schema["description"]),
        ]
        for name, schema in rows
    ]
    return _table(("key", "default", "values", "meaning"), lines)


def _not_searched() -> str:
    names = dict.fromkeys(
        name.partition(".")[0] for name in trial_names() if reason_not_searchable(name)
    )
    return textwrap.fill(", ".join(f"`{name}`" for name in names) + ".", 100)


def _worlds() -> str:
    datasets = [name for name in [*DATASETS, "folder:PATH"] if keeps_validation(name)]
    worlds = {("dataset", name): presets.KEPT for name in datasets} | presets.WORLDS
    lines = [[f"`{key}: {value}`", _several(settings)] for (key, value), settings in worlds.items()]
    return _table(("with", "defaults"), lines)


def _methods() -> str:
    lines = [
        [
            f"`{name}`",
            method.summary,
            _with_shared(method.pins),
            _with_shared(method.sets),
            f"`{method.host}`" if method.host else "",
            f"`{method.control}`" if method.control else "",
            ", ".join(name for name in get_args(Paradigm) if name not in method.paradigms),
        ]
        for name, method in METHODS.items()
    ]
    names = ("method", "is", "pins", "other defaults", "compared with", "control")
    legend = [f"- {name}: {_several(settings)}" for name, settings in SHARED.items()]
    return "\n".join([*legend, "", _table((*names, "not in paradigm"), lines)])


def _with_shared(settings: Mapping[str, Any]) -> str:
    """Settings, where a group of `SHARED` is its name alone."""
    names = [name for name, group in SHARED.items() if group.items() <= settings.items()]
    known = {key for name in names for key in SHARED[name]}
    own = {key: value for key, value in settings.items() if key not in known}
    return ", ".join(filter(None, [*names, _several(own)]))


def _several(settings: Mapping[str, Any]) -> str:
    # All methods but the bounds that are named after it pin it to null.
    shown = {
        key: value
        for key, value in settings.items()
        if key != "initial_labels.true_share" or value is not None
    }
    return ", ".join(f"`{key}: {yaml_text(value)}`" for key, value in shown.items())


def _text(text: str) -> str:
    return re.sub("<(?=[a-z])", r"\\<", text)  # Markdown would read `<path>` as HTML


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    # A bar ends a cell, even inside code.
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [list(header), ["---"] * len(header), *safe]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
