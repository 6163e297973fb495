"""Published numbers with their protocol, from a file. Messages name file, line and column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.marked_yaml import Document, Keys, SpecError, choices, read
from orchestrator.marked_yaml import shown as said
from orchestrator.readers import LINE, NAME, leaf, mapping

PAPERS = Path(__file__).with_name("papers")


@dataclass(frozen=True, kw_only=True)
class PaperProtocol:
    """How a paper measured. None or empty: the file does not say, so nobody is held to it."""

    backbone: tuple[str, ...]  # names of one and the same model
    seeds: int
    splits: int = 1
    shots: int | None = None
    class_seed: int | None = None
    leaky_pool: tuple[str, ...] = ()  # datasets whose pool held test images
    test_images: Mapping[str, int] = field(default_factory=dict)


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


def read_paper(path: Path) -> Paper:
    document = read(path)
    if document.value is None:
        raise SpecError(f"{path}: empty; a file of published numbers starts with `version: 1`")
    found = mapping(document, (), _TOP, needed=("version", "name", "source", "protocol"))
    verified = found.get("verified", True)
    cells = tuple(_cells(document, verified)) if "accuracy" in found else ()
    gains = tuple(_gains(document, verified)) if "gains" in found else ()
    if not cells and not gains:
        raise document.error((), "no number: `accuracy` or `gains` is needed")
    return Paper(
        name=found["name"],
        title=found.get("title", found["name"]),
        source=found["source"],
        protocol=found["protocol"],
        cells=cells,
        gains=gains,
    )


_LINE = leaf(LINE)
_COUNT = leaf(int, (("ge", 1),))
_PARADIGM: Any = Literal["ul", "ssl", "trzsl"]


def _version(document: Document, keys: Keys) -> int:
    value = document.at(keys)
    if value != 1 or isinstance(value, bool):
        raise document.error(keys, f"{said(value)} is not allowed; allowed: 1")
    return 1


def _lines(document: Document, keys: Keys) -> tuple[str, ...]:
    if not isinstance(document.at(keys), list):
        return (_LINE(document, keys),)
    return tuple(_LINE(document, (*keys, i)) for i in range(len(document.items(keys))))


def _counts(document: Document, keys: Keys) -> dict[str, int]:
    return {name: _COUNT(document, (*keys, name)) for name in document.mapping(keys)}


def _protocol(document: Document, keys: Keys) -> PaperProtocol:
    readers = {
        "backbone": _lines,
        "seeds": _COUNT,
        "splits": _COUNT,
        "shots": _COUNT,
        "class_seed": leaf(int, (("ge", 0),)),
        "leaky_pool": _lines,
        "test_images": _counts,
    }
    return PaperProtocol(**mapping(document, keys, readers, needed=("backbone", "seeds")))


_TOP = {
    "version": _version,
    "name": leaf(NAME),
    "title": _LINE,
    "source": _LINE,
    "verified": leaf(bool),
    "protocol": _protocol,
    "accuracy": lambda document, keys: document.mapping(keys),
    "gains": lambda document, keys: document.items(keys),
}


def _percent(document: Document, keys: Keys) -> float:
    """A number in percent, as a fraction."""
    value = document.at(keys)
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not 0 <= value <= 100:
        raise document.error(keys, f"{said(value)} is not allowed; allowed: 0 to 100, in %")
    return float(value) / 100


def _cells(document: Document, verified: bool) -> Iterator[Published]:
    """accuracy: {modality: {paradigm: {method: {dataset: number, or value and what is known}}}}"""
    top: Keys = ("accuracy",)
    for modality in document.mapping(top):
        for paradigm in document.mapping((*top, modality)):
            at = (*top, modality, paradigm)
            if paradigm not in get_args(_PARADIGM):
                allowed = choices(paradigm, get_args(_PARADIGM))
                raise document.key_error(at, f"unknown paradigm; {allowed}")
            for method in document.mapping(at):
                for dataset in document.mapping((*at, method)):
                    here = (*at, method, dataset)
                    yield Published(
                        dataset=dataset,
                        paradigm=paradigm,
                        modality=modality,
                        method=method,
                        **({"verified": verified} | _number(document, here)),
                    )


def _number(document: Document, keys: Keys) -> dict[str, Any]:
    if not isinstance(document.at(keys), dict):
        return {"value": _percent(document, keys)}
    readers = {"value": _percent, "verified": leaf(bool), "note": _LINE}
    return mapping(document, keys, readers, needed=("value",))


def _gains(document: Document, verified: bool) -> Iterator[PublishedGain]:
    readers = {
        **dict.fromkeys(("method", "over", "modality"), _LINE),
        "paradigm": leaf(_PARADIGM),
        "datasets": _lines,
        "points": _points,
        "verified": leaf(bool),
        "note": _LINE,
    }
    needed = ("method", "over", "modality", "paradigm", "datasets", "points")
    for i in range(len(document.items(("gains",)))):
        found = mapping(document, ("gains", i), readers, needed)
        low, high = found.pop("points")
        yield PublishedGain(**({"verified": verified} | found), low=low, high=high)


def _points(document: Document, keys: Keys) -> tuple[float, float]:
    """One number of points, or [from, to]."""
    value = document.at(keys)
    ends = value if isinstance(value, list) else [value, value]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends)
    if len(ends) != 2 or not numbers or not -100 <= ends[0] <= ends[1] <= 100:
        raise document.error(keys, f"{said(value)} is not allowed; allowed: points, or [from, to]")
    return ends[0] / 100, ends[1] / 100
