"""The content of `bundle.json`, which can come from an untrusted source."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar, get_args

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

from air_core.bundle.checks import FUSED, PROMPT, TEXT, ClassifierName
from air_core.datasets.dataset import is_template
from air_core.settings import ClipPrecision, FusionSpace
from air_core.settings.components import LEARNERS
from air_core.tools.printable import UNPRINTABLE, printable

ONNX: Final = "model.onnx"  # optional; see `onnx`
SHOWN = 80  # characters of a wrong value in a message


def _checked_classname(name: str) -> str:
    if not name.strip() or UNPRINTABLE.search(name):
        raise ValueError("a class name is a text without control characters")
    return name


def _checked_classnames(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("class names are different texts")
    return names


def _checked_template(template: str) -> str:
    if not is_template(template):
        raise ValueError("a template is a text with {} once, for the class name")
    return template


def modalities() -> list[str]:
    """Learners that a bundle can have: those of this package, since a bundle contains no code,
    whose prompt is in the class vectors or is read beside image tokens."""
    computed = {"context", "tokens"}
    return [name for name, one in LEARNERS.items() if not one.source and one.facts & computed]


def _checked_modality(name: str) -> str:
    if name not in modalities():
        raise ValueError(f"allowed are {', '.join(modalities())}")
    return name


Classname = Annotated[str, AfterValidator(_checked_classname)]
Classnames = Annotated[list[Classname], Field(min_length=1), AfterValidator(_checked_classnames)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
File = Literal["text_features.safetensors", "prompt.safetensors", "fused.safetensors", "model.onnx"]
Values = dict[str, JsonValue]
Side = Annotated[int, Field(gt=0, le=4096)]
Model = TypeVar("Model", bound=BaseModel)

assert get_args(File) == (TEXT, PROMPT, FUSED, ONNX)


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
    template: Annotated[str, AfterValidator(_checked_template)]
    modality: Annotated[str, AfterValidator(_checked_modality)]
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


class Preprocessing(_Strict):
    """How an ONNX file wants its images; a changed file could name any values."""

    size: Annotated[list[Side], Field(min_length=2, max_length=2)]  # height, width
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: Annotated[int, Field(ge=0, le=255)]


def checked(model: type[Model], found: object) -> Model:
    """Values from JSON as a model.

    Raises:
        ValueError: a value is missing, unknown or of another type; the message has the first.
    """
    try:
        return model.model_validate(found)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        where = ".".join(str(part)[:SHOWN] for part in first["loc"]) or "content"
        shown = printable(f"its {where} is {repr(first['input'])[:SHOWN]}: {first['msg']}")
        raise ValueError(shown) from None


def checked_content(found: object) -> Content:
    """The content of a `bundle.json`.

    Raises:
        ValueError: a value is not allowed.
    """
    content = checked(Content, found)
    if content.unseen is not None:
        distinct, classes = {*content.unseen}, {*range(len(content.classnames))}
        if not (distinct < classes and 0 < len(distinct) == len(content.unseen)):
            raise ValueError("its unseen is neither null nor a list of some of its classes")
    return content
