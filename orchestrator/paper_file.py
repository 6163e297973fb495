"""Published numbers with their protocol, from a file. Messages name file, line and column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from orchestrator.marked_yaml import SpecError, choices, read
from orchestrator.validation import CONFIG, LINE, NAME, Number, Version, Whole, validate

PAPERS = Path(__file__).with_name("papers")


def _list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _fraction(percent: float) -> float:
    return percent / 100


Count = Annotated[Whole, Field(ge=1)]
Lines = Annotated[tuple[LINE, ...], Field(min_length=1), BeforeValidator(_list)]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class PaperProtocol:
    """How a paper measured. None or empty: the file does not say, so nobody is held to it."""

    backbone: Lines  # names of one and the same model
    seeds: Count
    splits: Count = 1
    shots: Count | None = None
    class_seed: Annotated[Whole, Field(ge=0)] | None = None
    leaky_pool: Lines = ()  # datasets whose pool held test images
    test_images: dict[str, Count] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One number of a paper; a fraction."""

    dataset: str
    paradigm: str
    modality: str
    method: str
    value: float
    verified: bool  # read in a source; others never gate
    note: str = ""

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.dataset, self.paradigm, self.modality, self.method


@dataclass(frozen=True, kw_only=True)
class PublishedGain:
    """A mean over datasets of one method minus another; fractions."""

    method: str
    over: str
    modality: str
    paradigm: str
    datasets: tuple[str, ...]
    low: float  # equal to `high` where one number is published
    high: float
    verified: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Paper:
    name: str
    title: str
    source: str
    protocol: PaperProtocol
    cells: tuple[Published, ...]
    gains: tuple[PublishedGain, ...]


def find_paper(name_or_path: str) -> Paper:
    """A paper that comes with airsweep by its name, or a file.

    Raises:
        SpecError: there is none, or its file is wrong: file, line, column and what is allowed.
    """
    path = Path(name_or_path)
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        path = PAPERS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in PAPERS.glob("*.yaml"))
            raise SpecError(
                f"--paper {name_or_path}: no such paper; {choices(name_or_path, known)}, or a file"
            )
    return read_paper(path)


# ---------------------------------------------------------------- the file

PERCENT = "0 to 100, in %"
Percent = Annotated[
    Number, Field(ge=0, le=100, json_schema_extra={"title": PERCENT}), AfterValidator(_fraction)
]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class _Accuracy:
    value: Percent
    verified: StrictBool | None = None
    note: LINE = ""


def _accuracy(value: Any) -> Any:
    return value if isinstance(value, dict) else {"value": value}


Paradigm = Literal["ul", "ssl", "trzsl"]
Accuracies = dict[
    str,
    Annotated[_Accuracy, BeforeValidator(_accuracy, json_schema_input_type=Percent | _Accuracy)],
]


def _ends(value: Any) -> Any:
    return value if isinstance(value, list) else [value, value]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("not from low to high; allowed: points, or [from, to]")
    return ends


Points = Annotated[Number, Field(ge=-100, le=100), AfterValidator(_fraction)]


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class _Gain:
    method: LINE
    over: LINE
    modality: LINE
    paradigm: Paradigm
    datasets: Lines
    points: Annotated[tuple[Points, Points], BeforeValidator(_ends), AfterValidator(_rising)]
    verified: StrictBool | None = None
    note: LINE = ""


@checked_dataclass(frozen=True, kw_only=True, config=CONFIG)
class _PaperFile:
    version: Version
    name: NAME
    title: LINE | None = None
    source: LINE
    verified: StrictBool = True
    protocol: PaperProtocol
    accuracy: dict[str, dict[Paradigm, dict[str, Accuracies]]] = Field(default_factory=dict)
    gains: Annotated[tuple[_Gain, ...], Field(min_length=1)] = ()


_FILE = TypeAdapter(_PaperFile)


def read_paper(path: Path) -> Paper:
    document = read(path)
    if document.value is None:
        raise SpecError(f"{path}: empty; a file of published numbers starts with `version: 1`")
    file = validate(document, _FILE)
    if not file.accuracy and not file.gains:
        raise document.error((), "no number: `accuracy` or `gains` is needed")
    return Paper(
        name=file.name,
        title=file.title or file.name,
        source=file.source,
        protocol=file.protocol,
        cells=tuple(_cells(file)),
        gains=tuple(_gains(file)),
    )


def _cells(file: _PaperFile) -> Iterator[Published]:
    for modality, paradigms in file.accuracy.items():
        for paradigm, methods in paradigms.items():
            for method, datasets in methods.items():
                for dataset, found in datasets.items():
                    yield Published(
                        dataset=dataset,
                        paradigm=paradigm,
                        modality=modality,
                        method=method,
                        value=found.value,
                        verified=file.verified if found.verified is None else found.verified,
                        note=found.note,
                    )


def _gains(file: _PaperFile) -> Iterator[PublishedGain]:
    for gain in file.gains:
        found = {name: value for name, value in vars(gain).items() if name != "points"}
        if gain.verified is None:
            found["verified"] = file.verified
        low, high = gain.points
        yield PublishedGain(**found, low=low, high=high)
