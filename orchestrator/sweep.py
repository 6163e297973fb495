"""A sweep as plain data, and the cells that it spreads into. Knows neither files nor clusters.

Precedence of a trial key: default < world < preset < fixed < grid < space. What a method pins
stays pinned: the key does not apply in the cells of that method, and cells that become equal by
that are one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, Protocol

from air_core.flat import from_flat, trial_keys
from air_core.normal import normalised
from air_core.specs import knob
from orchestrator import presets
from orchestrator.expressions import compile_when, names_of
from orchestrator.keys import digest
from orchestrator.marked_yaml import SpecError


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched key: values, or a range with both ends in it."""

    key: str
    values: tuple[Any, ...] | None = None
    min: float | None = None  # an int where the key takes whole numbers
    max: float | None = None
    log: bool = False
    when: str | None = None  # drawn only where this holds (orchestrator.expressions)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Points of a round that stop early, since others of it promise more (`pruning.py`)."""

    rule: Literal["halving", "median"] = field(
        metadata={"help": "halving: the better part of a round; median: those above it so far"}
    )
    rungs: tuple[int, ...] = field(
        metadata={"help": "iterations after which points are compared, rising"}
    )
    keep: float = knob(0.5, "halving: share of a round's points that go on", gt=0, lt=1)


JOURNAL = "journal"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched in each cell, and how."""

    sampler: Literal["tpe", "random", "grid"] = knob(
        "tpe", "tpe: Optuna's; random; grid: every combination of values"
    )
    seed: int = knob(0, "of the sampler", ge=0)
    objective: Literal["mutual_information", "validation_accuracy"] = knob(
        "mutual_information", "what is maximised; mutual_information needs no label"
    )
    points: int = field(
        metadata={"help": "a total per cell, also after resumes", "limits": {"ge": 1}}
    )
    width: int = knob(4, "points asked per round", ge=1)
    patience: int | None = knob(None, "points without a better one that end a cell", ge=1)
    pruning: Pruning | None = knob(None, "points that stop early; null: none")
    storage: str = knob(
        JOURNAL,
        "of the studies: a file of the sweep, or postgresql://user@host/database (docs/team.md)",
    )
    # One whose `when` names another comes after it.
    space: tuple[Dimension, ...] = field(metadata={"help": "keys that are searched"})

    @property
    def rungs(self) -> tuple[int, ...]:
        return self.pruning.rungs if self.pruning else ()


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Each point runs once per entry of `values`; an entry has a number for each varied key."""

    values: tuple[tuple[int, ...], ...] = ((1,), (2,), (3,))
    vary: tuple[str, ...] = ("seed",)

    def assignments(self) -> tuple[dict[str, int], ...]:
        """The settings of each run of a point.

        >>> Seeds(values=((1, 1), (2, 2)), vary=("seed", "split_seed")).assignments()[1]
        {'seed': 2, 'split_seed': 2}
        """
        return tuple(dict(zip(self.vary, value, strict=True)) for value in self.values)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where a run stops, to go on another day."""

    gpu_hours: float | None = knob(None, "of all devices together, in one run", gt=0)
    wall: float | None = knob(None, "by the clock, in one run: 90s, 30m, 12h, or seconds", gt=0)


Custom = Mapping[str, float]  # what machines have beside cores and devices, by name
CUSTOM = "of each, beside them: what nodes were given by `ray start --resources`"


class Want(Protocol):
    """What one process asks of the machine that it runs on."""

    @property
    def cpu(self) -> float: ...

    @property
    def gpu(self) -> float: ...

    @property
    def custom(self) -> Custom: ...


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    cpu: float = knob(1.0, "cores of one trial", ge=0)
    gpu: float = knob(0.0, "devices of one trial, or a share of one", ge=0)
    custom: Custom = field(default_factory=dict, metadata={"help": CUSTOM})
    timeout: float | None = knob(None, "that one trial may take: 90s, 30m, 12h, or seconds", gt=0)


@dataclass(frozen=True, kw_only=True)
class GeneratorResources:
    cpu: float = knob(1.0, "cores of one actor that draws images", ge=0)
    gpu: float = knob(0.0, "devices of one actor", ge=0)
    custom: Custom = field(default_factory=dict, metadata={"help": CUSTOM})
    actors: int | None = knob(None, "null: as many as fit", ge=1)
    reserve: int | None = knob(
        None, "actors that draw for later cells while trials run; null: one of eight", ge=0
    )


ENCODER_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EncoderResources:
    """CLIP over a dataset, and first pseudo-labels. Asks for what a trial does, unless told."""

    cpu: float | None = knob(None, "cores of one encoder; null: as a trial", ge=0)
    gpu: float | None = knob(None, "devices, or a share of one; null: as a trial", ge=0)
    batch: int = knob(ENCODER_BATCH, "images at a time through CLIP", ge=1)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What runs ask of the cluster. Enters no key."""

    trial: TrialResources = TrialResources()
    generator: GeneratorResources = GeneratorResources()
    encoder: EncoderResources = EncoderResources()
    wait: float | None = knob(
        None, "for machines that an autoscaler brings: 90s, 30m, 12h, or seconds; null: none", gt=0
    )

    @property
    def encoding(self) -> TrialResources:
        """What an encoder asks for."""
        cpu, gpu = self.encoder.cpu, self.encoder.gpu
        return replace(
            self.trial,
            cpu=self.trial.cpu if cpu is None else cpu,
            gpu=self.trial.gpu if gpu is None else gpu,
        )

    def want(self, stage: str) -> Want:
        """What a process asks for that works on a stage."""
        match stage:
            case "trials":
                return self.trial
            case "lora" | "images":
                return self.generator
        return self.encoding


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep file, checked."""

    version: int = 1
    name: str
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the grid before --only
    exclude: tuple[dict[str, Any], ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    seeds: Seeds = Seeds()
    budget: Budget = Budget()
    resources: Resources = Resources()
    project: str | None = None
    tracking_uri: str | None = None
    data_root: str | None = None
    question: str = ""  # the comment on top of the file
    source: str = ""  # the file, as it was named
    text: str = ""

    @property
    def methods(self) -> tuple[str, ...]:
        return self.grid.get("method") or (self.fixed["method"],)

    @property
    def space(self) -> tuple[Dimension, ...]:
        return self.search.space if self.search else ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the grid. It has a study of its own."""

    id: str  # safe as a file name
    method: str
    flat: dict[str, Any]  # every setting of the default point, without the varied seeds
    chosen: dict[str, Any]  # what the grid chose, without what does not apply to the method
    space: tuple[Dimension, ...]  # what is left to search


def cells_of(spec: SweepSpec) -> tuple[Cell, ...]:
    """The cells in the order of the grid: its first key varies slowest.

    Raises:
        SpecError: every combination is excluded.
    """
    table = {_frozen(combination): combination for combination in combinations(spec)}
    cells = {key: _cell(spec, combination) for key, combination in table.items()}
    if not cells:
        raise SpecError(f"{spec.source}: the grid is empty: every combination is excluded")
    cells = {key: cell for key, cell in cells.items() if _fits(cell)}
    if not cells:
        raise SpecError(f"{spec.source}: {unlabelled(spec.methods)}")
    computed = {key: (cell.method, _computation(cell)) for key, cell in cells.items()}
    first = {computed[key]: key for key in reversed(cells)}  # of equal cells the first stays
    kept = [key for key in cells if first[computed[key]] == key]
    return tuple(_distinct_ids(_named(spec, cells[key], table[key], computed) for key in kept))


def unlabelled(methods: Sequence[str]) -> str:
    """What is wrong where no method fits any paradigm of the sweep."""
    return f"{_listed(list(methods))}: ul has no labels to learn from; allowed: ssl, trzsl"


def fits(spec: SweepSpec) -> bool:
    """Is there a cell whose method is defined in its paradigm?"""
    return any(_fits(_cell(spec, combination)) for combination in combinations(spec))


def _fits(cell: Cell) -> bool:
    """CoOp and VPT are not defined without labels."""
    return cell.flat["paradigm"] in presets.METHODS[cell.method].paradigms


def _frozen(combination: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    # True is 1 to a dict; the type keeps an axis [true, 1] apart.
    return frozenset((key, (type(value).__name__, value)) for key, value in combination.items())


def combinations(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """What the grid says, word by word, without what `exclude` names."""
    for values in itertools.product(*spec.grid.values()):
        combination = dict(zip(spec.grid, values, strict=True))
        if not any(entry.items() <= combination.items() for entry in spec.exclude):
            yield combination


def _cell(spec: SweepSpec, combination: dict[str, Any]) -> Cell:
    asked = {**spec.fixed, **combination}
    method = asked.pop("method")
    pins = presets.METHODS[method].pins
    flat = {**_trial_defaults(), **presets.defaults(method, asked)}
    flat |= {key: value for key, value in asked.items() if key not in pins}
    if flat.pop("lora", True) is None:  # off: its settings do not apply
        flat = {key: value for key, value in flat.items() if not key.startswith("lora.")}
        flat["lora"] = None
    for key in spec.seeds.vary:
        del flat[key]
    applies = {"method", "lora", *flat}.difference(pins)
    chosen = {key: value for key, value in combination.items() if key in applies}
    return Cell(id="", method=method, flat=flat, chosen=chosen, space=_free(spec, method, flat))


def _named(
    spec: SweepSpec, cell: Cell, combination: dict[str, Any], computed: dict[Any, Any]
) -> Cell:
    """A cell with what the grid chose that makes a difference to it, and with its name."""

    def computes(other: dict[str, Any]) -> Any:
        key = _frozen(other)
        if key not in computed:  # excluded from the sweep
            outside = _cell(spec, other)
            computed[key] = (outside.method, _computation(outside))
        return computed[key]

    own = computes(combination)
    chosen = {
        key: value
        for key, value in cell.chosen.items()
        if key in _NAMED_FIRST
        or any(computes({**combination, key: one}) != own for one in (spec.axes or spec.grid)[key])
    }
    named = replace(cell, chosen=chosen)
    return replace(named, id=_id(named))


def _computation(cell: Cell) -> Any:
    """The same for cells that compute the same, whatever their irrelevant settings are."""
    if cell.space:  # the search may give weight to what its first point ignores
        return frozenset(cell.flat.items())
    return normalised(from_flat(cell.flat, presets.named_refs(cell.flat), ()))


@cache
def _trial_defaults() -> dict[str, Any]:
    return {key.name: key.default for key in trial_keys().values() if key.name != "lora"}


def _free(spec: SweepSpec, method: str, flat: dict[str, Any]) -> tuple[Dimension, ...]:
    """The dimensions that a cell searches; a condition on nothing but its settings is settled."""
    free: list[Dimension] = []
    for dimension in spec.space:
        if dimension.key in presets.METHODS[method].pins:
            continue
        if dimension.when:
            open_questions = {other.key for other in free}.intersection(names_of(dimension.when))
            if not open_questions and not compile_when(dimension.when)(flat):
                continue
        free.append(dimension)
    return tuple(free)


_NAMED_FIRST = ("dataset", "paradigm", "modality", "method")


def _id(cell: Cell) -> str:
    words = [{**cell.flat, "method": cell.method}[key] for key in _NAMED_FIRST]
    words += [
        f"{key.rpartition('.')[2]}={_word(value)}"
        for key, value in cell.chosen.items()
        if key not in _NAMED_FIRST
    ]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(words))
    return name if len(name) <= 100 else f"{name[:90]}-{_mark(cell)}"


def _word(value: Any) -> str:
    words = {None: "off", True: "on", False: "off"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _mark(cell: Cell) -> str:
    return digest({"method": cell.method, **cell.chosen})[:8]


def _distinct_ids(cells: Iterable[Cell]) -> Iterator[Cell]:
    # Two values may look alike as file names (a/b, a-b). Some file systems do not tell A from a.
    seen: set[str] = set()
    for cell in cells:
        named = replace(cell, id=f"{cell.id}-{_mark(cell)}") if cell.id.lower() in seen else cell
        seen.add(named.id.lower())
        yield named


def option_words(sets: Iterable[str], only: Iterable[str], smoke: bool) -> list[str]:
    """How a sweep was asked for, as words of a command.

    >>> option_words(["seeds=[1]"], ["method=air"], smoke=True)
    ['--set', 'seeds=[1]', '--only', 'method=air', '--smoke']
    """
    pairs = [("--set", each) for each in sets] + [("--only", each) for each in only]
    return [word for pair in pairs for word in pair] + (["--smoke"] if smoke else [])


def notes_of(spec: SweepSpec) -> tuple[str, ...]:
    """What is allowed but may surprise: said by `plan`, one sentence each."""
    return tuple(_notes(spec))


def _notes(spec: SweepSpec) -> Iterator[str]:
    said = {"fixed": spec.fixed, "grid": spec.grid, "search.space": [d.key for d in spec.space]}
    for where, keys in said.items():
        for key in keys:
            pinning = [name for name in spec.methods if key in presets.METHODS[name].pins]
            if pinning:
                yield f"{where}.{key} does not apply to {_listed(pinning)}: the method pins it"
    every = list(combinations(spec))
    left_out = [cell for cell in (_cell(spec, one) for one in every) if not _fits(cell)]
    if left_out:
        names = sorted({cell.method for cell in left_out})
        yield f"{_listed(names)}: left out of ul, which has no labels to learn from"
    cells, total = cells_of(spec), len(every) - len(left_out)
    if len(cells) < total:
        yield f"{total} combinations of the grid are {len(cells)} different cells"
    settled = [cell.id for cell in cells if not cell.space]
    if spec.search and settled:
        yield f"one point only, since nothing is left to search: {_listed(settled)}"


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


SMOKE: dict[str, Any] = {
    "iterations": 1,
    "images_per_class": 8,
    "initial_labels.images_per_class": 8,
    "lora.steps": 2,
    "train.steps": 2,
}


def smoke(spec: SweepSpec) -> SweepSpec:
    """The same cells at next to no cost: one point, one seed, one iteration, 8 images a class."""
    grid = {key: values for key, values in spec.grid.items() if key not in SMOKE}
    search = spec.search and replace(spec.search, points=1, pruning=None, space=())
    seeds = replace(spec.seeds, values=spec.seeds.values[:1])
    exclude = tuple(entry for entry in spec.exclude if not entry.keys() & SMOKE.keys())
    return replace(
        spec,
        grid=grid,
        exclude=exclude,
        fixed={**spec.fixed, **SMOKE},
        search=search,
        seeds=seeds,
    )
