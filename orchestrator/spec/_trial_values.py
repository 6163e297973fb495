"""Types of the trial keys in a sweep file: single values, lists, and dimensions of a search."""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
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

from air_core.captions import OF
from air_core.components import DATASETS, computed_from_registries
from air_core.datasets.dataset import is_template
from air_core.methods import EMBEDDED, METHODS
from air_core.specs import EvidenceScoring
from air_core.specs.flat import trial_keys
from orchestrator.spec.marked_yaml import Keys, short_value
from orchestrator.spec.validation import (
    LINE,
    Schema,
    schema_of,
    setting,
    text_schema,
    validation_error,
    validation_errors,
)


def trial_names() -> tuple[str, ...]:
    return ("method", *trial_keys())


METHOD = "name of the method; it pins the keys that define the method"
LORA = "false or null: no LoRA, the base model generates the images"

FOLDER = Annotated[
    str,
    StringConstraints(pattern=r"^folder:[^\p{C}\p{Zl}\p{Zp}]+$"),
    text_schema("folder:<path> of your own images", r"^folder:.+$"),
]


def _check_template(text: str) -> str:
    name, _, caption = text.partition(OF)
    is_of_one_class = bool(name and caption) and is_template(f"{text}{{}}")
    if not is_of_one_class and not is_template(text):
        raise PydanticKnownError("string_pattern_mismatch", {"pattern": "{}"})
    return text


def _check_caption(text: str) -> str:
    """A caption of the domain has no {}."""
    _check_template(text if "{}" in text else f"{text}{{}}")
    return text


TEMPLATE = Annotated[
    str,
    AfterValidator(_check_template),
    text_schema(
        "one line of text with {} once, for the class name, and no other brace, or `class = text`",
        r"^([^{}]*\{\}[^{}]*|[^{}]+ = [^{}]+)$",
    ),
]


CAPTION = Annotated[
    str,
    AfterValidator(_check_caption),
    text_schema(
        "one line of text with {} at most once, for the class name, and no other brace",
        r"^[^{}]*(\{\}[^{}]*)?$",
    ),
]


# One, or a list of them.
TEXTS = {"generation.template": TEMPLATE, "lora.caption": CAPTION, "evidence.template": TEMPLATE}


def _one_or_several(texts: Any) -> Any:
    if isinstance(texts, str):
        return texts
    return tuple(texts) if len(texts) > 1 else texts[0]


# ---------------------------------------------------------------- values of a key

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _value_annotation(name: str) -> Any:
    if name == "method":
        return operator.getitem(Literal, tuple(METHODS))
    if name == "lora":  # true: on, with the lora.* settings; false and null: off
        return Annotated[bool | None, AfterValidator(lambda on: on or None)]
    if name in ("dataset", "test_dataset"):
        registered = operator.getitem(Literal, tuple(DATASETS))
        return operator.getitem(
            Union, (registered, FOLDER, *(() if name == "dataset" else (None,)))
        )
    if name in ("backbone", "generator"):
        return LINE
    if name in TEXTS:
        many: Any = types.GenericAlias(list, (TEXTS[name],))
        several = Annotated[many, Field(min_length=1)]
        one_or_several = operator.getitem(Union, (TEXTS[name], several))
        return Annotated[one_or_several, AfterValidator(_one_or_several)]
    return _with_limits(trial_keys()[name].type, name)


def _with_limits(annotation: Any, name: str) -> Any:
    limits: Any = trial_keys()[name].limits
    return Annotated[annotation, Field(**limits)] if limits else annotation


def _description(name: str) -> str:
    return {"method": METHOD, "lora": LORA}.get(name) or trial_keys()[name].help


def _default(name: str) -> Any:
    if name in ("method", "lora"):
        return True if name == "lora" else None
    return EMBEDDED.get(name, trial_keys()[name].default)


def _list_type(name: str) -> Any:
    """The type of a list of distinct values of a trial key."""

    def distinct(values: list[Any]) -> tuple[Any, ...]:
        for i, value in enumerate(values):
            if value in values[:i]:
                raise validation_error(f"{short_value(value)} is listed twice; allowed: once", i)
        return tuple(values)

    values: Any = types.GenericAlias(list, (_value_annotation(name),))
    extra: Any = {"uniqueItems": True}
    return Annotated[values, Field(min_length=1, json_schema_extra=extra), AfterValidator(distinct)]


@dataclass(frozen=True)
class _SchemaOf:
    """Validates as a type that is created when the schema is built, again for each set of
    plugins."""

    create: Callable[[], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(self.create())


def _mapping_type(name: str, fields: dict[str, Any], **schema: Any) -> Any:
    """The type of a mapping with a subset of these keys: a dict in the order of the file."""
    config = ConfigDict(**STRICT, json_schema_extra=schema)

    def without_defaults(value: Any, validate: ValidatorFunctionWrapHandler) -> dict[str, Any]:
        fields = vars(validate(value))
        return {key: fields[key] for key in value}

    return Annotated[
        create_model(name, __config__=config, **fields), WrapValidator(without_defaults)
    ]


@computed_from_registries
@cache
def value_type(name: str) -> TypeAdapter[Any]:
    """The type of a trial key's value."""
    return TypeAdapter(_value_annotation(name), config=STRICT)


def _settings_type(names: Iterable[str]) -> Any:
    fields = {
        name: (_value_annotation(name), setting(_default(name), _description(name)))
        for name in names
    }
    return _mapping_type("Settings", fields)


def _axes_type() -> Any:
    names = trial_names()
    fields = {name: (_list_type(name), setting(None, _description(name))) for name in names}
    return _mapping_type("Axes", fields)


def _condition_type() -> Any:
    """The type of `when`: for each key the values with which it holds, one or a list of them."""
    fields = {}
    for name in trial_names():
        listed: Any = _list_type(name)
        either = operator.getitem(Union, (_value_annotation(name), listed))
        values = Annotated[listed, BeforeValidator(_as_list, json_schema_input_type=either)]
        fields[name] = (values, setting(None, _description(name)))
    condition = _mapping_type("Condition", fields, minProperties=1)
    return Annotated[condition, AfterValidator(_not_empty)]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value]


def _not_empty(condition: dict[str, Any]) -> dict[str, Any]:
    if not condition:
        raise ValueError("the condition is empty; allowed: one setting or more")
    return condition


Settings = Annotated[dict[str, Any], _SchemaOf(lambda: _settings_type(trial_names()))]
# Without the method
SettingsOfCells = Annotated[dict[str, Any], _SchemaOf(lambda: _settings_type(trial_keys()))]
Axes = Annotated[dict[str, Any], _SchemaOf(_axes_type)]
Condition = Annotated[dict[str, Any], _SchemaOf(_condition_type)]


# ---------------------------------------------------------------- search space

# LoRA training and image generation depend on these keys. A search over one of them would need new
# images for each point, which costs GPU-hours; a grid prepares each value once.
IMAGES_DEPEND_ON = (
    *("dataset", "backbone", "precision", "paradigm", "shots", "class_seed"),
    *("pool", "pool_size", "pool_ratio", "pool_missing", "labelled_size", "leaky_pool"),
    *("initial_labels", "lora", "generator", "generation"),
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
        return (
            f"`{name}` changes the {made}, so it cannot be searched; "
            "allowed: values under `grid`, or one value under `fixed`"
        )
    if name in ("method", "modality", "test_dataset"):
        return (
            f"`{name}` is part of a cell's name, so it cannot be searched; "
            "allowed: values under `grid`, or one value under `fixed`"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A searched key: a list of values or a range that includes both ends."""

    key: str
    values: tuple[Any, ...] | None = None
    min: float | None = None  # int if the key takes whole numbers
    max: float | None = None
    log: bool = False


def _dimension_type(name: str) -> Any:
    """The type of one entry of `search.space`."""
    kinds = typing.get_args(trial_keys()[name].type) or (trial_keys()[name].type,)
    number = next((kind for kind in kinds if kind in (int, float)), None)
    fields: dict[str, Any] = {
        "values": (_list_type(name), setting(None, "the values to choose from"))
    }
    if number:
        end = _with_limits(number, name)
        fields["min"] = (end, setting(None, "lower end of the range, inclusive"))
        fields["max"] = (end, setting(None, "upper end of the range, inclusive"))
        fields["log"] = (bool, setting(False, "sample uniformly on a logarithmic scale"))

    def dimension(given: dict[str, Any]) -> Dimension:
        ends = {"min", "max"} & given.keys()
        if "values" in given and (ends or "log" in given):
            raise ValueError(
                "the dimension has both values and a range; allowed: `values`, or `min` and `max`"
            )
        if "values" not in given and len(ends) < 2:
            raise ValueError(
                "the dimension is incomplete; allowed: `values`, or both `min` and `max`"
            )
        if ends and given["min"] >= given["max"]:
            raise validation_error(
                f"{given['max']} is not greater than min; allowed: > {given['min']}", "max"
            )
        if given.get("log") and given["min"] <= 0:
            raise validation_error(
                f"{given['min']} has no logarithm; allowed with `log: true`: > 0", "min"
            )
        return Dimension(key=name, **given)

    either = [{"required": ["values"]}, {"required": ["min", "max"]}]
    return Annotated[_mapping_type(name, fields, oneOf=either), AfterValidator(dimension)]


@computed_from_registries
@cache
def space_type() -> TypeAdapter[dict[str, Dimension]]:
    """The type of `search.space`. Built on first use, because building it is slow."""
    searchable = [name for name in trial_names() if reason_not_searchable(name) is None]
    fields = {
        name: (_dimension_type(name), setting(None, _description(name))) for name in searchable
    }
    return TypeAdapter(_mapping_type("Space", fields, minProperties=1))


class _Space:
    """Reads the dimensions, in the order of the file."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self.dimensions, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return schema_of(space_type())

    def dimensions(self, space: Any) -> Any:
        if isinstance(space, tuple):
            return space
        names = space if isinstance(space, dict) else ()
        reasons: dict[Keys, str] = {
            (name,): why for name in names if (why := reason_not_searchable(name))
        }
        if reasons:
            raise validation_errors(reasons)
        dimensions = tuple(space_type().validate_python(space).values())
        if not dimensions:
            raise ValueError("the search space is empty; allowed: one trial key or more")
        return dimensions


Space = Annotated[tuple[Dimension, ...], _Space()]
