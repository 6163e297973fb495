"""Trial keys in a sweep file: what each may be, lists of it, and the dimensions of a search."""

from __future__ import annotations

import operator
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)
from pydantic_core import PydanticKnownError, core_schema

from air_core.datasets import DATASETS
from air_core.datasets.dataset import is_template
from air_core.flat import trial_keys
from orchestrator.spec import presets
from orchestrator.spec._expressions import compile_when, constants_of, names_of
from orchestrator.spec.marked_yaml import shown
from orchestrator.spec.validation import (
    LINE,
    Schema,
    key_choices,
    problem_with,
    schema_of,
    setting,
    text_schema,
    wrong,
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

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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
    return _limited(TRIAL_KEYS[name].type, name)


def _limited(annotation: Any, name: str) -> Any:
    limits: Any = TRIAL_KEYS[name].limits
    return Annotated[annotation, Field(**limits)] if limits else annotation


def _about(name: str) -> str:
    return {"method": METHOD, "lora": LORA}.get(name) or TRIAL_KEYS[name].help


def _default(name: str) -> Any:
    if name in ("method", "lora"):
        return True if name == "lora" else None
    return presets.OUTSIDE.get(name, TRIAL_KEYS[name].default)


def _list_of(name: str) -> Any:
    """Two or more different values of a trial key."""

    def different(values: list[Any]) -> tuple[Any, ...]:
        if len(values) == 1:
            raise ValueError(f"one value is no axis; allowed: two or more, or `{name}` under fixed")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise wrong(f"{shown(value)} is listed twice; allowed: once", i)
        return tuple(values)

    values: Any = types.GenericAlias(list, (_annotation(name),))
    extra: Any = {"minItems": 2, "uniqueItems": True}
    return Annotated[
        values, Field(min_length=1, json_schema_extra=extra), AfterValidator(different)
    ]


@dataclass(frozen=True)
class _SchemaOf:
    """Validates as another type, one that is made at run time."""

    type: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(self.type)


def _mapping(name: str, fields: dict[str, Any], **schema: Any) -> Any:
    """The type of a mapping with some of these keys: a dict in the order of the file."""
    config = ConfigDict(**STRICT, json_schema_extra=schema)

    def given(value: Any, check: ValidatorFunctionWrapHandler) -> dict[str, Any]:
        found = vars(check(value))
        return {key: found[key] for key in value}

    return Annotated[create_model(name, __config__=config, **fields), WrapValidator(given)]


@cache
def value_type(name: str) -> TypeAdapter[Any]:
    """What a trial key may be."""
    return TypeAdapter(_annotation(name), config=STRICT)


Settings = Annotated[
    dict[str, Any],
    _SchemaOf(
        _mapping(
            "Settings",
            {
                name: (_annotation(name), setting(_default(name), _about(name)))
                for name in TRIAL_NAMES
            },
        )
    ),
]
Axes = Annotated[
    dict[str, Any],
    _SchemaOf(
        _mapping(
            "Axes", {name: (_list_of(name), setting(None, _about(name))) for name in TRIAL_NAMES}
        )
    ),
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
        raise ValueError(f"compares values that have no order: {error}") from None
    return text


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched key: values, or a range with both ends in it."""

    key: str
    values: tuple[Any, ...] | None = None
    min: float | None = None  # an int where the key takes whole numbers
    max: float | None = None
    log: bool = False
    when: str | None = None  # drawn only where this holds (orchestrator.spec._expressions)


def _dimension(name: str) -> Any:
    """The type of one entry of `search.space`."""
    kinds = typing.get_args(TRIAL_KEYS[name].type) or (TRIAL_KEYS[name].type,)
    number = next((kind for kind in kinds if kind in (int, float)), None)
    fields: dict[str, Any] = {"values": (_list_of(name), setting(None, "one of these"))}
    if number:
        end = _limited(number, name)
        fields["min"] = (end, setting(None, "the lower end of a range, itself in it"))
        fields["max"] = (end, setting(None, "the upper end of a range, itself in it"))
        fields["log"] = (bool, setting(False, "drawn evenly on a logarithmic scale"))
    about = "drawn only where this holds, such as `images_per_class > 0`"
    fields["when"] = (Annotated[str, AfterValidator(_condition)], setting(None, about))

    def dimension(found: dict[str, Any]) -> Dimension:
        ends = {"min", "max"} & found.keys()
        if "values" in found and (ends or "log" in found):
            raise ValueError("has values and a range; allowed: `values`, or `min`, `max`")
        if "values" not in found and len(ends) < 2:
            raise ValueError("allowed: `values`, or both `min` and `max`")
        if ends and found["min"] >= found["max"]:
            raise wrong(f"{found['max']} is not above min; allowed: > {found['min']}", "max")
        if found.get("log") and found["min"] <= 0:
            raise wrong(f"{found['min']} has no logarithm; allowed with log: > 0", "min")
        return Dimension(key=name, **found)

    either = [{"required": ["values"]}, {"required": ["min", "max"]}]
    return Annotated[_mapping(name, fields, oneOf=either), AfterValidator(dimension)]


@cache
def space_type() -> TypeAdapter[dict[str, Dimension]]:
    """What may stand under `search.space`. Made late: it costs more than reading a file."""
    searched = [name for name in TRIAL_NAMES if why_not_searched(name) is None]
    fields = {name: (_dimension(name), setting(None, _about(name))) for name in searched}
    return TypeAdapter(_mapping("Space", fields, minProperties=1))


class _Space:
    """Dimensions, each after those that its condition names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self.ordered, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return schema_of(space_type())

    def ordered(self, space: Any) -> Any:
        if isinstance(space, tuple):
            return space
        for name in space if isinstance(space, dict) else ():
            if reason := why_not_searched(name):
                raise wrong(reason, name)
        rest = list(space_type().validate_python(space).values())
        if not rest:
            raise ValueError("nothing is searched; allowed: a trial key or more")
        ordered: list[Dimension] = []
        while rest:
            waiting = {dimension.key for dimension in rest}
            ready = [d for d in rest if not d.when or not waiting.intersection(names_of(d.when))]
            if not ready:
                message = "depends on itself; allowed: conditions that form no circle"
                raise wrong(message, rest[0].key, "when")
            ordered.append(ready[0])
            rest.remove(ready[0])
        return tuple(ordered)


Space = Annotated[tuple[Dimension, ...], _Space()]
