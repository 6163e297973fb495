"""The content of `bundle.json`, which can come from an untrusted source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
)

from air_core.bundle.checks import ClassifierName, File
from air_core.settings import ClipPrecision, FusionSpace
from air_core.settings.components import LEARNERS
from air_core.tools.printable import UNPRINTABLE, printable

SHOWN = 80  # characters of a wrong value in a message


def modalities() -> list[str]:
    """Learners that a bundle can have: of this package, since a bundle contains no code."""
    return [name for name, one in LEARNERS.items() if not one.source and "bundled" in one.facts]


def _if(holds: Callable[[Any], bool], message: str) -> AfterValidator:
    """Allows the values for which a condition holds."""

    def validated(value: Any) -> Any:
        if not holds(value):
            raise ValueError(message)
        return value

    return AfterValidator(validated)


Classname = Annotated[
    str,
    _if(
        lambda name: bool(name.strip()) and not UNPRINTABLE.search(name),
        "a class name is a text without control characters",
    ),
]
Classnames = Annotated[
    list[Classname],
    Field(min_length=1),
    _if(lambda names: len(set(names)) == len(names), "class names are different texts"),
]
Modality = Annotated[
    str, _if(lambda name: name in modalities(), "this version has no such learner")
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Values = dict[str, JsonValue]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class BackboneContent(_Strict):
    """The backbone of a bundle; paths in it are never used."""

    name: str | None  # of published weights
    files: dict[str, Sha256]  # by path in the common folder
    settings: Values
    open_clip: Values  # arguments
    precision: ClipPrecision
    digest: str = ""
    preprocess: Values = {}


class Content(_Strict):
    """The content of `bundle.json`."""

    format: Literal[1]
    made_by: str = ""
    classnames: Classnames
    template: str
    modality: Modality
    prompt: Values | None
    classifier: ClassifierName  # selected at the export
    space: FusionSpace
    temperatures: dict[str, PositiveFloat]  # by classifier
    unseen: list[NonNegativeInt] | None  # classes, in TRZSL
    bank_images: NonNegativeInt = 0  # images whose features the bundle contains
    backbone: BackboneContent
    metrics: dict[str, float]
    lineage: Values
    chosen: Values | None = None  # what selected the classifier
    cautions: dict[str, str] = {}  # why not to use a classifier
    licence: str = ""
    licences: dict[str, str] = {}
    files: dict[File, Sha256]
    seal: str


def checked(found: object) -> Content:
    """Values from JSON as the content of a bundle.

    Raises:
        ValueError: a value is missing, unknown or of another type; the message has the first.
    """
    try:
        return Content.model_validate(found)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        where = ".".join(str(part)[:SHOWN] for part in first["loc"]) or "content"
        shown = printable(f"its {where} is {repr(first['input'])[:SHOWN]}: {first['msg']}")
        raise ValueError(shown) from None
