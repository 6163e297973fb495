"""Trial keys in a sweep file: what each may be, lists of it, and the dimensions of a search."""

from __future__ import annotations

import operator
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticKnownError

from air_core.datasets import DATASETS
from air_core.datasets.dataset import is_template
from air_core.flat import trial_keys
from orchestrator import presets
from orchestrator.expressions import compile_when, constants_of, names_of
from orchestrator.marked_yaml import shown
from orchestrator.validation import (
    CONFIG,
    LINE,
    ByKey,
    Schema,
    at,
    key_choices,
    problem_with,
    schema_of,
    text_schema,
    unknown_key,
)

TRIAL_KEYS = trial_keys()
TRIAL_NAMES = ("method", *TRIAL_KEYS)

METHOD = "what is learned, and from what"
LORA = "false or null: no LoRA, images of the base model"

FOLDER = Annotated[
    str,
    StringConstraints(pattern=r"^folder:[^\p{C}\p{Zl}\p{Zp}]+$"),
    text_schema("folder:<path> of your own images", r"^folder:.+$"),
]


def _template(text: str) -> str:
    if not is_template(text):
        raise PydanticKnownError("string_pattern_mismatch", {"pattern": "{}"})
    return text


TEMPLATE = Annotated[
    str,
    AfterValidator(_template),
    text_schema(
        "text on one line with {} once, where the class name goes, and no other brace",
        r"^[^{}]*\{\}[^{}]*$",
    ),
]


# ---------------------------------------------------------------- the values of a key


@cache
def value_type(name: str) -> TypeAdapter[Any]:
    """What a trial key may be."""
    return _adapter(_annotation(name))


@cache
def list_type(name: str) -> TypeAdapter[Any]:
    """Two or more different values of a trial key."""

    def different(values: list[Any]) -> tuple[Any, ...]:
        if len(values) == 1:
            raise ValueError(f"one value is no axis; allowed: two or more, or `{name}` under fixed")
        for i, value in enumerate(values):
            if value in values[:i]:
                with at(i):
                    raise ValueError(f"{shown(value)} stands here twice; allowed: once")
        return tuple(values)

    several: Any = types.GenericAlias(list, (_annotation(name),))
    return _adapter(Annotated[several, Field(min_length=1), AfterValidator(different)])


@cache
def number_type(name: str) -> TypeAdapter[Any] | None:
    """The numbers that a trial key may be; None: it has none."""
    key = TRIAL_KEYS.get(name)
    kinds = typing.get_args(key.type) or (key.type,) if key else ()
    number = next((kind for kind in kinds if kind in (int, float)), None)
    about = "a range with both ends in it"
    limits: Any = key.limits if key else {}
    return _adapter(Annotated[number, Field(description=about, **limits)]) if number else None


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def value_schema(name: str) -> Schema:
    """The JSON schema of what a trial key may be, what it is, and its default."""
    key, schema = TRIAL_KEYS.get(name), schema_of(value_type(name))
    about = {"method": METHOD, "lora": LORA}.get(name) or (key.help if key else "")
    if key is None:  # of a method there is no default
        return {"description": about, **schema}
    default = True if name == "lora" else presets.OUTSIDE.get(name, key.default)
    return {"description": about, **schema, "default": default}


def _list_schema(name: str) -> Schema:
    items = value_schema(name)
    return {"type": "array", "items": items, "minItems": 2, "uniqueItems": True}


def _annotation(name: str) -> Any:
    if name == "method":
        return operator.getitem(Literal, tuple(presets.METHODS))
    if name == "lora":  # true: on, with its settings; false and null: off
        return Annotated[bool | None, AfterValidator(lambda on: on or None)]
    if name in ("dataset", "test_dataset"):
        known = operator.getitem(Literal, tuple(DATASETS))
        return operator.getitem(Union, (known, FOLDER, *(() if name == "dataset" else (None,))))
    if name in ("backbone", "generator"):
        return LINE
    if name in ("generation.template", "lora.caption"):
        return TEMPLATE
    key, limits = TRIAL_KEYS[name], dict[str, Any](TRIAL_KEYS[name].limits)
    return Annotated[key.type, Field(**limits)] if limits else key.type


def _value(name: str, value: Any) -> Any:
    return _known(name).validate_python(value)


def _values(name: str, value: Any) -> Any:
    _known(name)
    return list_type(name).validate_python(value)


def _known(name: str) -> TypeAdapter[Any]:
    if name not in TRIAL_NAMES:
        raise unknown_key()
    return value_type(name)


_BY_KEY = ByKey(_value, lambda: {name: value_schema(name) for name in TRIAL_NAMES})
Settings = Annotated[dict[str, Any], _BY_KEY]
SomeSettings = Annotated[dict[str, Any], Field(min_length=1), _BY_KEY]
Axes = Annotated[
    dict[str, Any],
    ByKey(_values, lambda: {name: _list_schema(name) for name in TRIAL_NAMES}),
]


# ---------------------------------------------------------------- what is searched

# A LoRA and its images are made from these. To search one would mean new images for every point:
# GPU-hours. A grid has them prepared once.
IMAGES_DEPEND_ON = (
    *("dataset", "backbone", "precision", "paradigm", "shots", "class_seed"),
    *("pool", "pool_size", "pool_ratio", "pool_missing", "leaky_pool"),
    *("initial_labels", "lora", "generator", "generation"),
)


def why_not_searched(name: str) -> str | None:
    """Why a trial key cannot be searched, with what to do instead; None: it can."""
    if name in ("seed", "split_seed"):
        return "a seed is not searched; allowed: its values under `seeds`"
    if name.partition(".")[0] in IMAGES_DEPEND_ON:
        return f"`{name}` changes the images: put its values under `grid`, or fix it"
    if name in ("method", "modality", "test_dataset"):
        return f"`{name}` names the cell: put its values under `grid`, or fix it"
    return None


# A value of each key, to see whether a comparison has a sense.
TYPICAL = {
    **{name: 1 if key.default is None else key.default for name, key in TRIAL_KEYS.items()},
    **presets.OUTSIDE,
}


def _condition(text: str) -> str:
    for name in names_of(text):
        if name not in TRIAL_KEYS:
            raise ValueError(f"unknown key {name!r}; {key_choices(name, TRIAL_NAMES)}")
    for name, constant in constants_of(text):
        problem = problem_with(value_type(name), constant)
        if problem:
            raise ValueError(f"{name}: {problem}")
    try:
        compile_when(text)(TYPICAL)
    except TypeError as error:
        raise ValueError(f"compares what has no order: {error}") from None
    return text


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Range:
    """Values, or a range with both ends in it."""

    values: tuple[Any, ...] | None = Field(default=None, description="one of these")
    min: Any = Field(default=None)  # an int where the key takes whole numbers
    max: Any = Field(default=None)
    log: Annotated[bool, Strict()] = Field(
        default=False, description="drawn evenly on a logarithmic scale"
    )
    when: Annotated[str, AfterValidator(_condition)] | None = Field(
        default=None, description="drawn only where this holds, such as `images_per_class > 0`"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Dimension(Range):
    """One searched key."""

    key: str


RANGE = TypeAdapter(Range)


def _dimension(name: str, body: Any) -> Dimension:
    _known(name)
    if reason := why_not_searched(name):
        raise ValueError(reason)
    found, number = RANGE.validate_python(body), number_type(name)
    if found.values is not None:
        if {"min", "max", "log"} & body.keys():
            raise ValueError("has values and a range; allowed: `values`, or `min`, `max`")
        with at("values"):
            values = list_type(name).validate_python(list(found.values))
        return Dimension(key=name, values=values, when=found.when)
    if number is None:
        raise ValueError(f"{name} is no number; allowed: `values: [...]`")
    if found.min is None or found.max is None:
        raise ValueError("allowed: `values`, or both `min` and `max`")
    with at("min"):
        low = number.validate_python(found.min)
        if found.log and low <= 0:
            raise ValueError(f"{low} has no logarithm; allowed with log: > 0")
    with at("max"):
        high = number.validate_python(found.max)
        if low >= high:
            raise ValueError(f"{high} is not above min; allowed: > {low}")
    return Dimension(key=name, min=low, max=high, log=found.log, when=found.when)


def _dimension_schemas() -> dict[str, Schema]:
    searched = [name for name in TRIAL_NAMES if why_not_searched(name) is None]
    return {name: _dimension_schema(name, schema_of(TypeAdapter(Range))) for name in searched}


def _dimension_schema(name: str, schema: Schema) -> Schema:
    number, properties = number_type(name), schema["properties"]
    properties["values"] = {"description": "one of these", **_list_schema(name)}
    schema["description"] = value_schema(name)["description"]
    if number is None:
        for end in ("min", "max", "log"):
            del properties[end]
        return {**schema, "required": ["values"]}
    properties["min"] = properties["max"] = schema_of(number)
    either = [{"required": ["values"]}, {"required": ["min", "max"]}]
    return {**schema, "oneOf": either}


_SPACE = Annotated[dict[str, Any], Field(min_length=1), ByKey(_dimension, _dimension_schemas)]


def _space(space: Any) -> Any:
    """Dimensions, each after those that its condition names."""
    if isinstance(space, tuple):
        return space
    rest = list(TypeAdapter(_SPACE).validate_python(space).values())
    ordered: list[Dimension] = []
    while rest:
        waiting = {dimension.key for dimension in rest}
        ready = [d for d in rest if not d.when or not waiting.intersection(names_of(d.when))]
        if not ready:
            with at(rest[0].key, "when"):
                raise ValueError("waits for itself; allowed: conditions without a ring")
        ordered.append(ready[0])
        rest.remove(ready[0])
    return tuple(ordered)


Space = Annotated[tuple[Dimension, ...], BeforeValidator(_space, json_schema_input_type=_SPACE)]
