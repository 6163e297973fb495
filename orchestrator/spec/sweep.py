"""A sweep as plain data, and its cells. This module is independent of files and clusters.

Precedence of a trial key: default < world < preset < fixed < overrides < grid < space. A pinned key
of a method keeps its value: in cells of that method other values of the key are ignored, and cells
that become equal are merged into one.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticKnownError

from air_core.components import computed_from_registries
from air_core.methods import METHODS, named_refs
from air_core.specs import TrialSettings
from air_core.specs.flat import from_flat, trial_keys
from air_core.specs.normal import normalised
from orchestrator.components import SAMPLERS
from orchestrator.formatting import own_name
from orchestrator.keys import Process, digest
from orchestrator.plugins import Plugin
from orchestrator.spec import presets
from orchestrator.spec._trial_values import Condition, SettingsOfCells, Space, value_type
from orchestrator.spec._trial_values import Dimension as Dimension
from orchestrator.spec.marked_yaml import Document, Keys, SpecError
from orchestrator.spec.validation import (
    CONFIG,
    NameOf,
    Number,
    Whole,
    error_message,
    setting,
    validation_error,
)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Search:
    """The hyperparameter search of each cell."""

    sampler: Annotated[str, NameOf(SAMPLERS)] = setting("tpe", SAMPLERS.summary())
    seed: Whole = setting(0, "seed of the sampler", ge=0, le=2**32 - 1)
    objective: Literal["mutual_information", "validation_accuracy"] = setting(
        "mutual_information", "the maximized metric; mutual_information needs no labels"
    )
    points: Whole = Field(description="number of points per cell, over all runs of the sweep", ge=1)
    width: Whole = setting(4, "points per round", ge=1)
    space: Space = Field(description="the searched keys, each with values or a range")


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
    """Each point runs once per entry of `values`; an entry has one number per key of `vary`."""

    values: SeedEntries
    vary: Annotated[
        tuple[Literal["seed", "split_seed", "class_seed", "generation.seed"], ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    ] = setting(("seed",), "the varied keys; a list in `values` has one number for each of them")

    def __post_init__(self) -> None:
        if len(set(self.vary)) < len(self.vary):
            raise validation_error(f"{self.vary[0]} is listed twice; allowed: once", "vary")
        earlier: set[tuple[int, ...]] = set()
        for i, entry in enumerate(self.values):
            if len(entry) != len(self.vary):
                numbers = ", ".join(["a number"] * len(self.vary))
                raise validation_error(
                    f"{[*entry]} is not allowed; allowed: [{numbers}]", "values", i
                )
            for name, number in zip(self.vary, entry, strict=True):
                if problem := error_message(value_type(name), number):
                    raise validation_error(f"{name}: {problem}", "values", i)
            if self._run(entry) in earlier:
                raise validation_error(
                    "the same seeds are listed twice; allowed: once (generation.seed alone does "
                    "not make another run)",
                    "values",
                    i,
                )
            earlier.add(self._run(entry))

    def _run(self, entry: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers that tables distinguish runs by: seed, split_seed and class_seed."""
        named = zip(self.vary, entry, strict=True)
        return tuple(number for name, number in named if name != "generation.seed")

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
            "title": "a duration such as 90s, 30m or 12h, or a number of seconds > 0",
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?[smh]$"},
                {"type": "number", "exclusiveMinimum": 0},
            ],
        }
    ),
]


SMALLEST = 0.0001  # Ray's unit of an amount


def _amount(amount: float) -> float:
    if 0 < amount < SMALLEST:
        raise PydanticKnownError("greater_than_equal", {"ge": SMALLEST})
    return amount


def _gpus(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise PydanticKnownError("int_from_float")
    return _amount(gpus)


_PART: dict[str, Any] = {"type": "number", "minimum": SMALLEST}
_NONE: dict[str, Any] = {"const": 0}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 2}
# Amounts that Ray accepts: a process has a part of one GPU, or whole GPUs.
CPUS = Annotated[
    Number, Field(ge=0), AfterValidator(_amount), WithJsonSchema({"anyOf": [_NONE, _PART]})
]
GPUS = Annotated[
    Number,
    Field(ge=0),
    AfterValidator(_gpus),
    WithJsonSchema({"anyOf": [_NONE, {**_PART, "maximum": 1}, _WHOLE]}),
]


def _custom(resources: Mapping[str, float]) -> Mapping[str, float]:
    for name in resources:
        if name in ("CPU", "GPU", "cpu", "gpu", "memory", "object_store_memory"):
            raise validation_error(
                f"{name} is not a custom resource; allowed: other names; set `cpu` and `gpu` "
                "outside `custom`",
                name,
            )
        if not name or not name.isprintable():
            raise validation_error("the name is empty or invisible; allowed: visible text", name)
    return resources


# Amounts of Ray's custom resources, by name.
Custom = Annotated[dict[str, Annotated[Number, Field(ge=SMALLEST)]], AfterValidator(_custom)]
CUSTOM = "amounts of custom resources, named as in `ray start --resources`"


def _size(value: Any) -> Any:
    match = isinstance(value, str) and re.fullmatch(r"([0-9]{1,9})([MG])iB", value)
    return int(match[1]) << (20 if match[2] == "M" else 30) if match else value


Bytes = Annotated[
    Whole,
    Field(ge=0),
    BeforeValidator(_size),
    WithJsonSchema(
        {
            "title": "a size such as 500MiB or 12GiB, or a number of bytes",
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]{1,9}[MG]iB$"},
                {"type": "integer", "minimum": 0},
            ],
        }
    ),
]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrialResources:
    """Resources of one trial."""

    cpu: CPUS = setting(1.0, "CPU cores of one trial")
    gpu: GPUS = setting(0.0, "GPUs of one trial, or a share of one GPU")
    memory: Bytes | None = setting(
        None,
        "memory of the machine for the seeds of a point; 0: none is reserved; null: computed from "
        "pool and classes, none for small ones",
    )
    custom: Custom = Field(default_factory=dict, description=CUSTOM)
    timeout: Seconds | None = setting(None, "time limit of one trial; null: none")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GeneratorResources:
    """Resources of a process that trains a LoRA or generates images, and their number."""

    cpu: CPUS = setting(1.0, "CPU cores of a process that trains a LoRA or generates images")
    gpu: GPUS = setting(0.0, "GPUs of that process, or a share of one GPU")
    custom: Custom = Field(default_factory=dict, description=CUSTOM)
    actors: Whole | None = setting(None, "such processes at most; null: as many as fit", ge=1)
    reserve: Whole | None = setting(
        None,
        "those that generate images of later cells while trials run; null: one in eight",
        ge=0,
    )


ProcessResources = TrialResources | GeneratorResources  # of one worker process
ENCODER_BATCH = 256


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EncoderResources:
    """Resources of an encoder: it computes CLIP features and the initial pseudo-labels."""

    cpu: CPUS | None = setting(
        None, "CPU cores of one encoder, and threads that open its images; null: as for a trial"
    )
    gpu: GPUS | None = setting(None, "GPUs, or a share of one GPU; null: as for a trial")
    batch: Whole = setting(ENCODER_BATCH, "images per CLIP batch", ge=1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Resources:
    """Resources of a run on the cluster. They are not part of any artifact key."""

    trial: TrialResources = TrialResources()
    generator: GeneratorResources = GeneratorResources()
    encoder: EncoderResources = EncoderResources()
    wait: Seconds | None = setting(
        None, "time to wait for an autoscaler to add nodes; null: do not wait"
    )

    @property
    def encoder_resources(self) -> TrialResources:
        """Resources of an encoder."""
        cpu, gpu = self.encoder.cpu, self.encoder.gpu
        return replace(
            self.trial,
            cpu=self.trial.cpu if cpu is None else cpu,
            gpu=self.trial.gpu if gpu is None else gpu,
            memory=None,
        )

    def process_resources(self, process: Process) -> ProcessResources:
        """Resources of a process that works on a stage."""
        if process == "generator":
            return self.generator
        return self.trial if process == "trial" else self.encoder_resources


# GPUs of a process that runs a real model: in the file of `airsweep init` and in messages.
USUAL_GPUS = {"trial": 0.25, "generator": 1}


def gpu_lines(processes: Sequence[str] = tuple(USUAL_GPUS)) -> str:
    """The lines of a sweep file that give GPUs to processes.

    >>> gpu_lines()
    'resources: {trial: {gpu: 0.25}, generator: {gpu: 1}}'
    """
    parts = (f"{process}: {{gpu: {USUAL_GPUS[process]:g}}}" for process in processes)
    return f"resources: {{{', '.join(parts)}}}"


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Override:
    """Settings of the cells in which a condition holds."""

    when: Condition = Field(
        description="settings that a cell has without overrides, such as `{dataset: dtd}`; of a "
        "list such as `{dataset: [dtd, cub]}` one value"
    )
    set: SettingsOfCells = Field(
        description="settings of these cells; they do not override keys that a method pins"
    )


def split_name(name: str) -> tuple[str, str]:
    """What is before the path in the name of a dataset or model, and the path.

    >>> split_name("folder:photos"), split_name("ViT-B-32@clip.pt"), split_name("models/clip")
    (('folder:', 'photos'), ('ViT-B-32@', 'clip.pt'), ('', 'models/clip'))
    >>> split_name("ViT-L-14/openai@clip.pt")
    ('ViT-L-14/openai@', 'clip.pt')
    """
    match = re.match(r"folder:|[^/@.~][^/@]*(/[^/@]+)?@", name)
    before = match[0] if match else ""
    return before, name.removeprefix(before)


@plain_dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """The content of a validated sweep file."""

    version: int = 1
    name: str
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the grid before --only
    exclude: tuple[dict[str, Any], ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    search: Search | None = None
    seeds: Seeds = THREE_SEEDS
    resources: Resources = field(default_factory=Resources)
    project: str | None = None
    tracking_uri: str | None = None
    data_root: str | None = None
    question: str = ""  # the comment at the top of the file
    options: str = ""  # from `options_text`
    source: str = ""  # the path of the file, as given
    text: str = ""
    plugins: tuple[Plugin, ...] = ()
    worlds: presets.Worlds = field(default_factory=lambda: presets.WORLDS, repr=False)
    relative_names: frozenset[str] = frozenset()  # of data and models; relative to the file
    document: Document = field(
        default_factory=partial(Document, source=""), repr=False, compare=False
    )

    @property
    def folders(self) -> dict[str, str]:
        """Names with a relative path, and the same names with the path from the working directory.

        Empty if the file is in the working directory. Paths in options are relative to that. A
        model such as `a/b` is a path if the folder exists, else a name of open_clip or the hub.
        """
        located: dict[str, str] = {}
        at = os.path.dirname(self.source)
        for name in self.relative_names if at else ():
            before, path = split_name(name)
            there = os.path.normpath(os.path.join(at, path))
            if before or path.startswith(".") or path.count("/") > 1 or os.path.isdir(there):
                located[name] = before + there
        return located

    @property
    def is_smoke(self) -> bool:
        """Whether this is a `smoke_variant`."""
        return SMOKE.items() <= self.fixed.items()

    @property
    def methods(self) -> tuple[str, ...]:
        return self.grid.get("method") or (self.fixed["method"],)

    @property
    def space(self) -> tuple[Dimension, ...]:
        return self.search.space if self.search else ()

    def sets_gpu(self, process: str) -> bool:
        """Whether the file or an option sets the GPUs of a process, if only to 0."""
        given = self.document.section(("resources", process))
        return "gpu" in given or bool(getattr(self.resources, process).gpu)

    def error(self, key: str, value: Any, message: str) -> SpecError:
        """An error about a trial key that has this value in a cell, at its position in the file."""
        values = (self.axes or self.grid).get(key, ())
        places: list[Keys] = [("grid", key, i) for i, v in enumerate(values) if v == value]
        places += [
            ("overrides", i, "set", key)
            for i, entry in enumerate(self.overrides)
            if key in entry.set and entry.set[key] == value
        ]
        places += [("search", "space", key), ("fixed", key)]
        keys = next((keys for keys in places if keys in self.document.positions), ())
        return self.document.error(keys, message)


@plain_dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the grid. Each cell has its own study."""

    id: str  # a valid file name
    method: str
    flat: dict[str, Any]  # every setting of the default point, without the varied seeds
    chosen: dict[str, Any]  # values from the grid, without keys that do not apply to the method
    space: tuple[Dimension, ...]  # the searched dimensions that apply
    overridden: dict[str, int] = field(default_factory=dict)  # keys, with the entry that sets each


def cells_of(spec: SweepSpec) -> tuple[Cell, ...]:
    """The cells in the order of the grid: the first key varies slowest.

    Raises:
        SpecError: no cell is left, because no method fits its paradigm.
    """
    table = {_hashable(combination): combination for combination in combinations(spec)}
    cells = {key: _cell(spec, combination) for key, combination in table.items()}
    cells = {key: cell for key, cell in cells.items() if _is_defined(cell)}
    if not cells:
        raise SpecError(f"{spec.source}: {needs_labels_message(spec.methods)}")
    computed = {key: (cell.method, _computation(cell)) for key, cell in cells.items()}
    first = {computed[key]: key for key in reversed(cells)}  # keep the first of equal cells
    distinct = [key for key in cells if first[computed[key]] == key]
    return tuple(
        _distinct_ids(_with_id(spec, cells[key], table[key], computed) for key in distinct)
    )


def needs_labels_message(methods: Sequence[str]) -> str:
    """The message for a sweep in which no method fits any paradigm."""
    return (
        f"paradigm ul has no labelled images, and {_list_text(list(methods))} cannot be trained "
        "without them; allowed: paradigm ssl or trzsl"
    )


def has_fitting_cell(spec: SweepSpec) -> bool:
    """Whether the method of at least one cell is defined for its paradigm."""
    return any(_is_defined(_cell(spec, combination)) for combination in combinations(spec))


def _is_defined(cell: Cell) -> bool:
    """Whether the method is defined for the paradigm; CoOp and VPT are not for ul."""
    return cell.flat["paradigm"] in METHODS[cell.method].paradigms


def _hashable(combination: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    # In a dict True equals 1; the type separates the two in an axis [true, 1].
    return frozenset((key, (type(value).__name__, value)) for key, value in combination.items())


def combinations(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """Every combination of the grid's values except those that `exclude` lists."""
    for values in itertools.product(*spec.grid.values()):
        combination = dict(zip(spec.grid, values, strict=True))
        if not any(entry.items() <= combination.items() for entry in spec.exclude):
            yield combination


def with_every_method(spec: SweepSpec) -> SweepSpec:
    """The sweep with all methods in the grid; the sweep itself if `fixed` names one method.

    A setting without effect is an error only if it has none in this sweep either, so that a file
    stays valid when methods are removed from its grid.
    """
    every = {"method": tuple(METHODS)} if "method" in spec.grid else {}
    return replace(spec, grid=spec.grid | every)


def matching_overrides(spec: SweepSpec, combination: dict[str, Any]) -> list[int]:
    """The entries of `overrides` whose condition holds for a combination of the grid."""
    if not spec.overrides:
        return []
    given = {**spec.fixed, **combination}
    values = {"lora": True, **_flat(spec, given), "method": given["method"]}
    return [
        i
        for i, entry in enumerate(spec.overrides)
        if all(values.get(key) in wanted for key, wanted in entry.when.items())
    ]


_DEFAULTS = {name: key.default for name, key in trial_keys().items() if name != "lora"}


def _flat(spec: SweepSpec, given: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a cell, without the varied seeds, from the settings of the file."""
    method = given["method"]
    flat = {**_DEFAULTS, **presets.defaults(method, given, spec.worlds)}
    left_out = {"method", *METHODS[method].pins}
    flat |= {key: value for key, value in given.items() if key not in left_out}
    if flat["paradigm"] == "trzsl" and "labelled_size" not in given:
        flat["labelled_size"] = flat["pool_size"]  # a small pool has few labelled images too
    if flat.pop("lora", True) is None:  # LoRA is off: the lora.* settings do not apply
        flat = {key: value for key, value in flat.items() if not key.startswith("lora.")}
        flat["lora"] = None
    for key in spec.seeds.vary:
        del flat[key]
    return flat


def _cell(spec: SweepSpec, combination: dict[str, Any]) -> Cell:
    overridden = {
        key: i for i in matching_overrides(spec, combination) for key in spec.overrides[i].set
    }
    overrides = {key: spec.overrides[i].set[key] for key, i in overridden.items()}
    given = {**spec.fixed, **overrides, **combination}
    method = given["method"]
    flat = _flat(spec, given)
    applies = {"method", "lora", *flat}.difference(METHODS[method].pins)
    chosen = {key: value for key, value in combination.items() if key in applies}
    searched = () if METHODS[method].is_bound else spec.space
    free = tuple(each for each in searched if each.key not in METHODS[method].pins)
    return Cell(
        id="",
        method=method,
        flat=flat,
        chosen=chosen,
        space=_searched(free, frozenset(flat.items())) if free else (),
        overridden=overridden,
    )


def _with_id(
    spec: SweepSpec, cell: Cell, combination: dict[str, Any], computed: dict[Any, Any]
) -> Cell:
    """The cell with its id and without the grid keys that do not change its computation."""

    def computation(other: dict[str, Any]) -> Any:
        key = _hashable(other)
        if key not in computed:  # excluded from the sweep
            outside = _cell(spec, other)
            computed[key] = (outside.method, _computation(outside))
        return computed[key]

    own = computation(combination)
    chosen = {
        key: value
        for key, value in cell.chosen.items()
        if key in _ID_KEYS
        or any(
            computation({**combination, key: other}) != own
            for other in (spec.axes or spec.grid)[key]
        )
    }
    named = replace(cell, chosen=chosen)
    return replace(named, id=_id(named))


def _computation(cell: Cell) -> Any:
    """A value that is equal for cells that differ only in settings without effect."""
    if cell.space:  # a setting without effect in the default point can matter in another point
        return frozenset(cell.flat.items())
    return computation_of(cell.flat)


def computation_of(settings: dict[str, Any]) -> TrialSettings:
    """A spec that is equal for settings whose trials compute the same."""
    return normalised(from_flat(settings, named_refs(settings)))


MAX_POINTS = 10_000  # of a space that is enumerated; a larger one keeps all of its dimensions


@computed_from_registries
@lru_cache(maxsize=4096)
def _searched(
    space: tuple[Dimension, ...], flat: frozenset[tuple[str, Any]]
) -> tuple[Dimension, ...]:
    """The dimensions that change what some point computes; of others, points would be equal."""
    cell = {each.key: trial_keys()[each.key].default for each in space} | dict(flat)
    values = {each.key: {cell[each.key], *_ends(each)} for each in space}
    if math.prod(map(len, values.values())) > MAX_POINTS:
        return space

    def has_effect(key: str) -> bool:
        others = ([(name, v) for v in values[name]] for name in values if name != key)
        points = ({**cell, **dict(point)} for point in itertools.product(*others))
        found = ({computation_of({**point, key: v}) for v in values[key]} for point in points)
        return any(len(computations) > 1 for computations in found)

    return tuple(each for each in space if has_effect(each.key))


def _ends(dimension: Dimension) -> Sequence[Any]:
    """Least and largest number of a dimension; all its values if they are not numbers."""
    values: Sequence[Any] = dimension.values or (dimension.min, dimension.max)
    is_numeric = all(isinstance(value, int | float) for value in values)
    return (min(values), max(values)) if is_numeric else values


_ID_KEYS = ("dataset", "paradigm", "modality", "method")


def _id(cell: Cell) -> str:
    words = [own_name({**cell.flat, "method": cell.method}[key]) for key in _ID_KEYS]
    words += [
        f"{key.rpartition('.')[2]}={_id_word(value)}"
        for key, value in cell.chosen.items()
        if key not in _ID_KEYS
    ]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(words))
    return name if len(name) <= 100 else f"{name[:90]}-{_short_digest(cell)}"


def _id_word(value: Any) -> str:
    words = {None: "off", True: "on", False: "off"}
    return words[value] if value is None or isinstance(value, bool) else own_name(str(value))


def _short_digest(cell: Cell) -> str:
    return digest({"method": cell.method, **cell.chosen})[:8]


def _distinct_ids(cells: Iterable[Cell]) -> Iterator[Cell]:
    # Two values can give the same file name (a/b, a-b). Some file systems ignore case.
    seen: set[str] = set()
    for cell in cells:
        named = (
            replace(cell, id=f"{cell.id}-{_short_digest(cell)}")
            if cell.id.lower() in seen
            else cell
        )
        seen.add(named.id.lower())
        yield named


def option_words(sets: Iterable[str], only: Iterable[str], smoke: bool) -> list[str]:
    """The options of a sweep request, as words of a command line.

    >>> option_words(["seeds=[1]"], ["method=air"], smoke=True)
    ['--set', 'seeds=[1]', '--only', 'method=air', '--smoke']
    """
    pairs = [("--set", each) for each in sets] + [("--only", each) for each in only]
    return [word for pair in pairs for word in pair] + (["--smoke"] if smoke else [])


def options_text(sets: Sequence[str], only: Sequence[str]) -> str:
    """How options changed a sweep file; empty without options.

    >>> options_text(["seeds=[1]"], [])
    "the sweep file with --set 'seeds=[1]'"
    """
    words = shlex.join(option_words(sets, only, smoke=False))
    left_out = "; its other cells are left out" if only else ""
    return f"the sweep file with {words}{left_out}" if words else ""


def notes_of(spec: SweepSpec) -> tuple[str, ...]:
    """Sentences about allowed but surprising settings, for `airsweep plan` and `run`."""
    return tuple(_notes(spec))


def _notes(spec: SweepSpec) -> Iterator[str]:
    yield from [spec.options] if spec.options else []
    is_whole = not _is_reduced(spec)
    parts = {"fixed": spec.fixed, "grid": spec.grid}
    for part, keys in parts.items() if is_whole else ():
        for key in keys:
            yield from _pinned_notes(f"{part}.{key}", key, spec.methods)
    every = list(combinations(spec))
    of_grid = [_cell(spec, entry) for entry in every]
    for i, override in enumerate(spec.overrides if is_whole else ()):
        for key in override.set:
            methods = {cell.method: None for cell in of_grid if cell.overridden.get(key) == i}
            yield from _pinned_notes(f"overrides[{i}].set.{key}", key, list(methods))
        if not any(i in matching_overrides(spec, entry) for entry in every):
            yield f"overrides[{i}] applies to no cell: its condition never holds"
    skipped = [cell for cell in of_grid if not _is_defined(cell)]
    if skipped:
        names = sorted({cell.method for cell in skipped})
        yield f"{_list_text(names)}: no cells with paradigm ul, which has no labelled images"
    cells, total = cells_of(spec), len(every) - len(skipped)
    if len(cells) < total:
        yield f"{total} combinations of the grid are {len(cells)} different cells"
    if spec.is_smoke:
        yield SMOKE_ONLY
    if any(presets.tests_setup_only(cell.flat["backbone"], cell.flat["dataset"]) for cell in cells):
        yield presets.SETUP_ONLY
    unused = {("grid", key): spec.grid[key] for key in _unused_axes(spec, cells)}
    for key, value in spec.fixed.items() if is_whole else ():
        if not _is_used(cells, key, value):
            unused["fixed", key] = (value,)
    for (part, key), values in unused.items():
        if not all(key in METHODS[name].pins for name in spec.methods):  # else there is a note
            yield f"{part}.{key}: no cell uses it; {_users_text(spec, key, values)}"
    searched = {(cell.method, dimension.key) for cell in cells for dimension in cell.space}
    for key in (each.key for each in (spec.space if is_whole else ())):
        names = [n for n in {c.method: None for c in cells} if (n, key) not in searched]
        if names:
            why = "pinned, without effect, or a bound"
            yield f"search.space.{key} is not searched with {_list_text(names)}: {why}"


def _is_reduced(spec: SweepSpec) -> bool:
    """Whether --only or --smoke leaves out cells or rounds, which may use a key."""
    has_fewer = any(spec.grid.get(key, values) != values for key, values in spec.axes.items())
    return has_fewer or SMOKE.items() <= spec.fixed.items()


def refuse_unused_grid(spec: SweepSpec) -> None:
    """Refuse a grid of which no key changes what a cell computes.

    Raises:
        SpecError: all combinations of the grid are one cell.
    """
    axes = [key for key, values in spec.grid.items() if len(values) > 1]
    if any(key in _ID_KEYS for key in axes):  # listing the cells takes time
        return
    unused = _unused_axes(spec, cells_of(spec))
    if unused and unused == axes:
        [key, *_] = unused
        text = f"no cell uses this key; {_users_text(spec, key, spec.grid[key])}"
        raise spec.document.key_error(("grid", key), text)


def _unused_axes(spec: SweepSpec, cells: Sequence[Cell]) -> list[str]:
    """Keys of the grid with several values that all give the same trials."""
    if _is_reduced(spec):
        return []
    used = {*_ID_KEYS}.union(*(cell.chosen for cell in cells))
    return [key for key, values in spec.grid.items() if len(values) > 1 and key not in used]


def _is_used(cells: Sequence[Cell], key: str, value: Any) -> bool:
    """Whether a setting changes what a cell computes, or is its default or null, as of `lora`."""
    known = trial_keys().get(key)
    if known is None or value in (known.default, None):
        return True
    return any(
        cell.space or computation_of({**cell.flat, key: known.default}) != computation_of(cell.flat)
        for cell in cells
        if key in cell.flat
    )


def _users_text(spec: SweepSpec, key: str, values: Sequence[Any]) -> str:
    """The end of a message: the methods with which some of the values give different trials."""
    several = [*values, trial_keys()[key].default]
    users = []
    for name, method in METHODS.items():
        if key in method.pins:
            continue
        given = {**spec.fixed, "method": name}
        found = {computation_of(_flat(spec, {**given, key: value})) for value in several}
        users += [name] if len(found) > 1 else []
    methods = f", or use a method that does: {', '.join(users)}" if users else ""
    return f"allowed: remove it{methods}"


def _pinned_notes(setting: str, key: str, methods: Sequence[str]) -> Iterator[str]:
    """A note if methods pin a key to a value other than 0, or if every method pins it."""
    pins = {name: METHODS[name].pins[key] for name in methods if key in METHODS[name].pins}
    surprising = list(pins) if len(pins) == len(methods) else [name for name in pins if pins[name]]
    if surprising:
        yield f"{setting} does not apply to {_list_text(surprising)}: the method pins it"


def _list_text(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


SMOKE: dict[str, Any] = {
    "iterations": 1,
    "images_per_class": 8,
    "evidence.images": 32,  # the errors of a whole pool may take hours
    "evidence.block": 32,  # whole blocks are scored
    "lora.steps": 2,
    "lora.passes": None,
    "train.steps": 10,  # a step of a few milliseconds is measured only over several
}
SMOKE_ONLY = "a smoke run tests the set-up only: its numbers mean nothing"


def smoke_variant(spec: SweepSpec) -> SweepSpec:
    """A quick variant of a sweep: two points of a search, one seed, one iteration, 8 images per
    class, evidence of 32 pool images."""
    grid = {key: values for key, values in spec.grid.items() if key not in SMOKE}
    space = tuple(dimension for dimension in spec.space if dimension.key not in SMOKE)
    search = spec.search and replace(spec.search, points=min(2, spec.search.points), space=space)
    seeds = replace(spec.seeds, values=spec.seeds.values[:1])
    exclude = tuple(entry for entry in spec.exclude if not entry.keys() & SMOKE.keys())
    overrides = tuple(
        replace(entry, set={key: value for key, value in entry.set.items() if key not in SMOKE})
        for entry in spec.overrides
        if entry.set.keys() - SMOKE.keys()
    )
    return replace(
        spec,
        grid=grid,
        exclude=exclude,
        overrides=overrides,
        fixed={**spec.fixed, **SMOKE},
        search=search,
        seeds=seeds,
    )
