"""Schemas of the trial keys in a sweep file, and their values as trials have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from air_core.datasets.dataset import is_template
from air_core.methods import EMBEDDED, METHODS
from air_core.settings import EvidenceScoring, SplitSettings
from air_core.settings.components import DATASETS, computed_from_registries
from air_core.settings.flat import trial_keys
from air_core.tools.captions import OF
from orchestrator.spec.schema import (
    FORMATS,
    LINE,
    NULL,
    Schema,
    described,
    list_schema,
    mapping_schema,
    schema_of,
    text_schema,
    typed,
)

METHOD = "name of the method; it pins the keys that define the method"
LORA = "false or null: no LoRA, the base model generates the images"
FOLDER = text_schema("folder:<path> of your own images", r"^folder:.+$")


def trial_names() -> tuple[str, ...]:
    return ("method", *trial_keys())


def _is_template(text: Any) -> bool:
    if not isinstance(text, str) or is_template(text):
        return True
    name, _, caption = text.partition(OF)
    return bool(name and caption) and is_template(f"{text}{{}}")


def _is_caption(text: Any) -> bool:
    """A caption of the domain has no {}."""
    return not isinstance(text, str) or _is_template(text if "{}" in text else f"{text}{{}}")


FORMATS.checks("template")(_is_template)
FORMATS.checks("caption")(_is_caption)
TEMPLATE = text_schema(
    "one line of text with {} once, for the class name, and no other brace, or `class = text`",
    r"^([^{}]*\{\}[^{}]*|[^{}]+ = [^{}]+)$",
    "template",
)
CAPTION = text_schema(
    "one line of text with {} at most once, for the class name, and no other brace",
    r"^[^{}]*(\{\}[^{}]*)?$",
    "caption",
)
# One, or a list of them.
TEXTS = {"generation.template": TEMPLATE, "lora.caption": CAPTION, "evidence.template": TEMPLATE}

# ---------------------------------------------------------------- values of a key

LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@computed_from_registries
@cache
def value_schema(name: str) -> Schema:
    """The schema of a trial key's value."""
    if name == "method":
        return {"enum": [*METHODS], "type": "string"}
    if name == "lora":  # true: on, with the lora.* settings; false and null: off
        return schema_of(bool | None)
    if name in ("dataset", "test_dataset"):
        registered = {"enum": [*DATASETS], "type": "string"}
        registered["title"] = "a name of `airsweep components dataset`"
        return {"anyOf": [registered, FOLDER, *([NULL] if name == "test_dataset" else [])]}
    if name in ("backbone", "generator"):
        return LINE
    if name in TEXTS:
        return {"anyOf": [TEXTS[name], list_schema(TEXTS[name])]}
    return schema_of(trial_keys()[name].type, **_limits(name))


def _limits(name: str) -> dict[str, float]:
    return {LIMITS[limit]: value for limit, value in trial_keys()[name].limits.items()}


def typed_value(name: str, value: Any) -> Any:
    """A valid value of a trial key as trials have it."""
    if name in ("method", "lora"):
        return value or None
    value = typed(trial_keys()[name].type, value)
    return value[0] if name in TEXTS and isinstance(value, tuple) and len(value) == 1 else value


def _description(name: str) -> str:
    return {"method": METHOD, "lora": LORA}.get(name) or trial_keys()[name].help


def _default(name: str) -> Any:
    if name in ("method", "lora"):
        return True if name == "lora" else None
    return EMBEDDED.get(name, trial_keys()[name].default)


def values_schema(name: str) -> Schema:
    """The schema of a list of distinct values of a trial key."""
    return list_schema(value_schema(name), uniqueItems=True)


def settings_schema(names: Iterable[str] | None = None, **more: Any) -> Schema:
    """The schema of one value for each of some trial keys; None: of all."""
    names = trial_names() if names is None else names
    properties = {n: described(value_schema(n), _default(n), _description(n)) for n in names}
    return mapping_schema(properties, **more)


def axes_schema() -> Schema:
    """The schema of values for some trial keys."""
    values = {name: values_schema(name) for name in trial_names()}
    return mapping_schema({n: described(of, None, _description(n)) for n, of in values.items()})


def condition_schema() -> Schema:
    """The schema of `when`: for each key the value or values with which it holds."""
    either = {name: {"anyOf": [value_schema(name), values_schema(name)]} for name in trial_names()}
    properties = {n: described(of, None, _description(n)) for n, of in either.items()}
    return mapping_schema(properties, minProperties=1)


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: typed_value(name, value) for name, value in given.items()}


def read_values(given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The values of some trial keys, in a list or alone."""
    return {
        name: tuple(typed_value(name, each) for each in (v if isinstance(v, list) else [v]))
        for name, v in given.items()
    }


# ---------------------------------------------------------------- search space

# LoRA training and image generation depend on these keys. A search over one of them would need new
# images for each point, which costs GPU-hours; a grid prepares each value once.
IMAGES_DEPEND_ON = (
    *("dataset", "backbone", "precision", "initial_labels", "lora", "generator", "generation"),
    *(field.name for field in dataclasses.fields(SplitSettings)),
)
# These change the denoising errors of the pool.
ERRORS_DEPEND_ON = (
    "evidence.images",
    *(f"evidence.{field.name}" for field in dataclasses.fields(EvidenceScoring)),
)


def reason_not_searchable(name: str) -> str | None:
    """Why a trial key cannot be searched and where it is set instead; None if it can."""
    if name in ("seed", "split_seed"):
        return "a seed cannot be searched; allowed: list its values under `seeds`"
    if name.partition(".")[0] in IMAGES_DEPEND_ON or name in ERRORS_DEPEND_ON:
        made = "denoising errors" if name in ERRORS_DEPEND_ON else "images"
        why = f"changes the {made}"
    elif name in ("method", "modality", "test_dataset"):
        why = "is part of a cell's name"
    else:
        return None
    return (
        f"`{name}` {why}, so it cannot be searched; "
        "allowed: values under `grid`, or one value under `fixed`"
    )


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A searched key: a list of values or a range that includes both ends."""

    key: str
    values: tuple[Any, ...] | None = None
    min: float | None = None  # int if the key takes whole numbers
    max: float | None = None
    log: bool = False


def _number(name: str) -> Any:
    """The type of a key's numbers: int, float, or None."""
    kinds = get_args(trial_keys()[name].type) or (trial_keys()[name].type,)
    return next((kind for kind in kinds if kind in (int, float)), None)


def space_schema() -> Schema:
    """The schema of `search.space`."""
    properties = {}
    for name in trial_names():
        reason = reason_not_searchable(name)
        part = {"title": reason, "not": {}} if reason else _dimension_schema(name)
        properties[name] = {**part, "description": _description(name)}
    return mapping_schema(properties, minProperties=1)


def _dimension_schema(name: str) -> Schema:
    properties = {"values": described(values_schema(name), None, "the values to choose from")}
    if number := _number(name):
        end = schema_of(number, **_limits(name))
        properties |= {
            "min": described(end, None, "lower end of the range, inclusive"),
            "max": described(end, None, "upper end of the range, inclusive"),
            "log": described(schema_of(bool), False, "sample uniformly on a logarithmic scale"),
        }
    values = {"required": ["values"], "maxProperties": 1}
    ends = {"required": ["min", "max"], "not": {"required": ["values"]}}
    return mapping_schema(properties, oneOf=[values, ends])


def read_space(given: Mapping[str, Mapping[str, Any]]) -> tuple[Dimension, ...]:
    """The dimensions, in the order of the file."""
    dimensions = []
    for name, dimension in given.items():
        read = {key: typed(_number(name), value) for key, value in dimension.items()}
        if "values" in read:
            read["values"] = tuple(typed_value(name, value) for value in read["values"])
        dimensions.append(Dimension(key=name, **read))
    return tuple(dimensions)
