"""A sweep as plain data, and the cells that it spreads into. Knows neither files nor clusters.

Precedence of a trial key: default < world < preset < fixed < grid < space. What a method pins
stays pinned: the key does not apply in the cells of that method, and cells that become equal by
that are one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from air_core.flat import from_flat, trial_keys
from air_core.normal import normalised
from orchestrator.keys import digest
from orchestrator.spec import presets
from orchestrator.spec._expressions import compile_when, names_of
from orchestrator.spec._trial_values import Dimension as Dimension
from orchestrator.spec._trial_values import Space
from orchestrator.spec.marked_yaml import SpecError
from orchestrator.spec.validation import CONFIG, LINE, Number, Whole, setting, wrong

JOURNAL = "journal"
POSTGRES = "postgresql://"


def _storage(where: str) -> str:
    if where != JOURNAL and not where.startswith(POSTGRES):
        raise ValueError(
            f"is not a storage of studies; allowed: {JOURNAL}, {POSTGRES}user@host/database"
        )
    if re.search(r"[?&]password=", where):
        raise ValueError("has a password; set PGPASSWORD, or write ~/.pgpass")
    return where


def _rising(rungs: tuple[int, ...]) -> tuple[int, ...]:
    for i, (before, rung) in enumerate(itertools.pairwise(rungs), 1):
        if rung <= before:
            raise wrong(f"{rung} does not come after {before}; allowed: more", i)
    return rungs


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Pruning:
    """Points of a round that stop early, since others of it promise more (`pruning.py`)."""

    rule: Literal["halving", "median"] = Field(
        description="halving: the better part of a round; median: those above it so far"
    )
    rungs: Annotated[
        tuple[Annotated[Whole, Field(ge=1)], ...], Field(min_length=1), AfterValidator(_rising)
    ] = Field(description="iterations after which points are compared, rising")
    keep: Number = setting(0.5, "halving: share of a round's points that go on", gt=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Search:
    """What is searched in each cell, and how."""

    sampler: Literal["tpe", "random", "grid"] = setting(
        "tpe", "tpe: Optuna's; random; grid: every combination of values"
    )
    seed: Whole = setting(0, "of the sampler", ge=0)
    objective: Literal["mutual_information", "validation_accuracy"] = setting(
        "mutual_information", "what is maximised; mutual_information needs no label"
    )
    points: Whole = Field(description="a total per cell, also after resumes", ge=1)
    width: Whole = setting(4, "points asked per round", ge=1)
    patience: Whole | None = setting(None, "points without a better one that end a cell", ge=1)
    pruning: Pruning | None = setting(None, "points that stop early; null: none")
    storage: Annotated[
        LINE,
        AfterValidator(_storage),
        WithJsonSchema({"type": "string", "pattern": f"^({JOURNAL}|{POSTGRES}.+)$"}),
    ] = setting(
        JOURNAL,
        "of the studies: a file of the sweep, or postgresql://user@host/database (docs/tracking.md)",
    )
    # One whose `when` names another comes after it.
    space: Space = Field(description="keys that are searched")

    @property
    def rungs(self) -> tuple[int, ...]:
        return self.pruning.rungs if self.pruning else ()


def _entry(entry: Any) -> Any:
    return entry if isinstance(entry, list | tuple) else [entry]


SeedNumber = Annotated[Whole, Field(ge=0)]
SeedEntry = Annotated[
    tuple[SeedNumber, ...],
    BeforeValidator(_entry, json_schema_input_type=SeedNumber | list[SeedNumber]),
]
SeedEntries = Annotated[
    tuple[SeedEntry, ...], Field(min_length=1, json_schema_extra={"uniqueItems": True})
]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Seeds:
    """Each point runs once per entry of `values`; an entry has a number for each varied key."""

    values: SeedEntries
    vary: Annotated[
        tuple[Literal["seed", "split_seed"], ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    ] = setting(("seed",), "what a number of `values` is for: a list there gives each its own")

    def __post_init__(self) -> None:
        if len(set(self.vary)) < len(self.vary):
            raise wrong(f"{self.vary[0]} is listed twice; allowed: once", "vary")
        for i, entry in enumerate(self.values):
            if len(entry) != len(self.vary):
                numbers = ", ".join(["a number"] * len(self.vary))
                raise wrong(f"{[*entry]} is not allowed; allowed: [{numbers}]", "values", i)
            if entry in self.values[:i]:
                raise wrong("the same seeds are listed twice; allowed: once", "values", i)

    def assignments(self) -> tuple[dict[str, int], ...]:
        """The settings of each run of a point.

        >>> Seeds(values=((1, 1), (2, 2)), vary=("seed", "split_seed")).assignments()[1]
        {'seed': 2, 'split_seed': 2}
        """
        return tuple(dict(zip(self.vary, value, strict=True)) for value in self.values)


THREE_SEEDS = Seeds(values=((1,), (2,), (3,)))


def _seconds(value: Any) -> Any:
    units = {"s": 1, "m": 60, "h": 3600}
    match = isinstance(value, str) and re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", value)
    return float(match[1]) * units[match[2]] if match else value


Seconds = Annotated[
    Number,
    Field(gt=0),
    BeforeValidator(_seconds),
    WithJsonSchema(
        {
            "title": "90s, 30m, 12h, or seconds > 0",
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?[smh]$"},
                {"type": "number", "exclusiveMinimum": 0},
            ],
        }
    ),
]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Budget:
    """Where a run stops, to go on another day."""

    gpu_hours: Number | None = setting(None, "of all devices together, in one run", gt=0)
    wall: Seconds | None = setting(None, "by the clock, in one run")


def _custom(found: Mapping[str, float]) -> Mapping[str, float]:
    for name in found:
        if name in ("CPU", "GPU", "cpu", "gpu", "memory", "object_store_memory"):
            raise wrong("is not a custom resource; allowed: `cpu` and `gpu` beside it", name)
    return found


# What machines have beside cores and devices, by name.
Custom = Annotated[dict[str, Annotated[Number, Field(gt=0)]], AfterValidator(_custom)]
CUSTOM = "of each, beside them: what nodes were given by `ray start --resources`"


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrialResources:
    """What one trial asks for."""

    cpu: Number = setting(1.0, "cores of one trial", ge=0)
    gpu: Number = setting(0.0, "devices of one trial, or a share of one", ge=0)
    custom: Custom = Field(default_factory=dict, description=CUSTOM)
    timeout: Seconds | None = setting(None, "that one trial may take")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GeneratorResources:
    """What one actor asks for that trains a LoRA or draws images, and how many there are."""

    cpu: Number = setting(1.0, "cores of one actor that draws images", ge=0)
    gpu: Number = setting(0.0, "devices of one actor", ge=0)
    custom: Custom = Field(default_factory=dict, description=CUSTOM)
    actors: Whole | None = setting(None, "null: as many as fit", ge=1)
    reserve: Whole | None = setting(
        None, "actors that draw for later cells while trials run; null: one of eight", ge=0
    )


ProcessResources = TrialResources | GeneratorResources  # what one process asks of its machine
ENCODER_BATCH = 256


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EncoderResources:
    """CLIP over a dataset, and first pseudo-labels. Asks for what a trial does, unless told."""

    cpu: Number | None = setting(None, "cores of one encoder; null: as a trial", ge=0)
    gpu: Number | None = setting(None, "devices, or a share of one; null: as a trial", ge=0)
    batch: Whole = setting(ENCODER_BATCH, "images at a time through CLIP", ge=1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Resources:
    """What runs ask of the cluster. Enters no key."""

    trial: TrialResources = TrialResources()
    generator: GeneratorResources = GeneratorResources()
    encoder: EncoderResources = EncoderResources()
    wait: Seconds | None = setting(None, "for machines that an autoscaler brings; null: none")

    @property
    def encoding(self) -> TrialResources:
        """What an encoder asks for."""
        cpu, gpu = self.encoder.cpu, self.encoder.gpu
        return replace(
            self.trial,
            cpu=self.trial.cpu if cpu is None else cpu,
            gpu=self.trial.gpu if gpu is None else gpu,
        )

    def want(self, stage: str) -> ProcessResources:
        """What a process asks for that works on a stage."""
        match stage:
            case "trials":
                return self.trial
            case "lora" | "images":
                return self.generator
        return self.encoding


@plain_dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep file, checked."""

    version: int = 1
    name: str
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the grid before --only
    exclude: tuple[dict[str, Any], ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    seeds: Seeds = THREE_SEEDS
    budget: Budget = field(default_factory=Budget)
    resources: Resources = field(default_factory=Resources)
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


@plain_dataclass(frozen=True, kw_only=True)
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
