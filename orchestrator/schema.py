"""The JSON schema of a sweep file, for editors: from the types that the reader checks with.

It knows keys, types, limits and words. What a file cannot mean (`sweep_lint`, pinned keys, twice
the same value) only `airsweep validate` finds. Draft 7, which editors know best.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from orchestrator import presets
from orchestrator.readers import (
    LINE,
    NAME,
    TRIAL_KEYS,
    leaf_schema,
    number_schema,
    trial_names,
    trial_schema,
)
from orchestrator.sweep import (
    JOURNAL,
    Budget,
    EncoderResources,
    GeneratorResources,
    Pruning,
    Resources,
    Search,
    TrialResources,
)
from orchestrator.sweep_file import POSTGRES, may_be_searched

Schema = dict[str, Any]

METHOD = "what is learned, and from what"
LORA = "false or null: no LoRA, images of the base model"
WHEN = "drawn only where this holds, such as `images_per_class > 0`"


def sweep_schema() -> Schema:
    """The schema of a whole sweep file."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "airsweep sweep file",
        "description": "One question: a grid of settings, a search in each cell, seeds.",
        **_object({name: part() for name, part in PARTS.items()}, ("version", "name")),
        "anyOf": [_with_method("grid"), _with_method("fixed")],
        "definitions": {name: _trial_key(name) for name in trial_names()},
    }


def _with_method(part: str) -> Schema:
    return {"required": [part], "properties": {part: {"required": ["method"]}}}


def _trial_key(name: str) -> Schema:
    key = TRIAL_KEYS.get(name)
    about = {"method": METHOD, "lora": LORA}.get(name) or (key.help if key else "")
    found = {"description": about, **trial_schema(name)}
    if key is None:  # of a method there is no default
        return found
    default = True if name == "lora" else presets.OUTSIDE.get(name, key.default)
    return {**found, "default": default}


# ---------------------------------------------------------------- parts of a file


def _version() -> Schema:
    return {"description": "of this form of file", "const": 1}


def _name() -> Schema:
    about = "of the sweep, in the store and in every command"
    return {"description": about, **leaf_schema(NAME)}


def _grid() -> Schema:
    about = "every combination is a cell; the first key varies slowest"
    axes = {name: _list(_ref(name), 2) for name in trial_names()}
    return {"description": about, **_object(axes)}


def _exclude() -> Schema:
    about = "combinations of the grid that are left out: some of its keys with a value each"
    one = {**_object({name: _ref(name) for name in trial_names()}), "minProperties": 1}
    return {"description": about, "type": "array", "items": one, "minItems": 1}


def _fixed() -> Schema:
    about = "the same for every cell; a method's pinned keys stay as they are"
    return {"description": about, **_object({name: _ref(name) for name in trial_names()})}


def _search() -> Schema:
    about = "an Optuna study in each cell; without it a cell is one point"
    parts = {"space": _space, "pruning": _pruning, "storage": _storage}
    return {"description": about, **_section(Search, **parts)}


def _storage() -> Schema:
    return {"type": "string", "pattern": f"^({JOURNAL}|{POSTGRES}.+)$"}


def _space() -> Schema:
    searched = {name: _dimension(name) for name in trial_names() if may_be_searched(name) is None}
    return {**_object(searched), "minProperties": 1}


def _dimension(name: str) -> Schema:
    about = _trial_key(name)["description"]
    values: Schema = {"description": "one of these", **_list(_ref(name), 2)}
    when: Schema = {"description": WHEN, "type": "string"}
    number = number_schema(name)
    if number is None:
        return {"description": about, **_object({"values": values, "when": when}, ("values",))}
    ends = {
        "min": {"description": "a range with both ends in it", **number},
        "max": {"description": "a range with both ends in it", **number},
        "log": {"description": "drawn evenly on a logarithmic scale", "type": "boolean"},
    }
    either = [
        {"required": ["values"], "not": {"anyOf": [{"required": [name]} for name in ends]}},
        {"required": ["min", "max"], "not": {"required": ["values"]}},
    ]
    return {
        "description": about,
        **_object({"values": values, **ends, "when": when}),
        "oneOf": either,
    }


def _pruning() -> Schema:
    return {"anyOf": [_section(Pruning, rungs=_rungs), {"type": "null"}]}


def _rungs() -> Schema:
    return _list({"type": "integer", "minimum": 1}, 1)


def _seeds() -> Schema:
    about = "each point runs once for each; the default is [1, 2, 3]"
    whole: Schema = {"type": "integer", "minimum": 0}
    entry: Schema = {"anyOf": [whole, {"type": "array", "items": whole, "minItems": 1}]}
    varied: Schema = {
        "description": "what a number of `values` is for: a list there gives each its own",
        **_list({"enum": ["seed", "split_seed"]}, 1),
    }
    full = _object({"values": _list(entry, 1), "vary": varied}, ("values",))
    return {"description": about, "anyOf": [_list(entry, 1), full]}


def _budget() -> Schema:
    about = "a run stops before what comes next would cost more; the next run goes on"
    return {"description": about, **_section(Budget, wall=_seconds)}


def _resources() -> Schema:
    about = "what runs ask of the machines; changes no result"
    parts = {
        "trial": lambda: _section(TrialResources, timeout=_seconds, custom=_custom),
        "generator": lambda: _section(GeneratorResources, custom=_custom),
        "encoder": lambda: _section(EncoderResources),
        "wait": _seconds,
    }
    return {"description": about, **_section(Resources, **parts)}


def _custom() -> Schema:
    return {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}


def _seconds() -> Schema:
    units = {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?[smh]$"}
    return {"anyOf": [units, {"type": ["number", "null"], "exclusiveMinimum": 0}]}


def _project() -> Schema:
    about = "the experiment is air/<project>; default: AIRSWEEP_PROJECT, else default"
    return {"description": about, **leaf_schema(NAME)}


def _tracking() -> Schema:
    uri = {"description": "http(s)://..., sqlite:///..., none", **leaf_schema(LINE)}
    return {"description": "where MLflow's runs go (docs/tracking.md)", **_object({"uri": uri})}


def _data_root() -> Schema:
    about = "folder of real datasets; changes no result"
    return {"description": about, **leaf_schema(LINE)}


PARTS: dict[str, Callable[[], Schema]] = {
    "version": _version,
    "name": _name,
    "grid": _grid,
    "exclude": _exclude,
    "fixed": _fixed,
    "search": _search,
    "seeds": _seeds,
    "budget": _budget,
    "resources": _resources,
    "project": _project,
    "tracking": _tracking,
    "data_root": _data_root,
}


# ---------------------------------------------------------------- what parts are made of


def _object(properties: dict[str, Schema], needed: tuple[str, ...] = ()) -> Schema:
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(needed)} if needed else found


def _list(items: Schema, fewest: int) -> Schema:
    return {"type": "array", "items": items, "minItems": fewest, "uniqueItems": True}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _section(cls: Any, **special: Callable[[], Schema]) -> Schema:
    """A dataclass, field by field."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for f in dataclasses.fields(cls):
        limits = tuple(f.metadata.get("limits", {}).items())
        found = special[f.name]() if f.name in special else leaf_schema(hints[f.name], limits)
        about = {"description": f.metadata["help"]} if "help" in f.metadata else {}
        simple = isinstance(f.default, str | int | float | None)
        default = {"default": f.default} if simple else {}
        properties[f.name] = {**about, **found, **default}
    needed = tuple(
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return _object(properties, needed)
