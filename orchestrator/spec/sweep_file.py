"""A question as a YAML file: the way in. Messages name file, line, column, key and what is allowed.

All that can be wrong without looking at data or weights is found here. Names of weights are not
resolved, and nothing is known of Ray, Optuna or a store.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from orchestrator.files import ROOT, SHIPPED
from orchestrator.redact import password_at
from orchestrator.spec import presets
from orchestrator.spec._expressions import look_up, names_of
from orchestrator.spec._trial_values import (
    TRIAL_NAMES,
    Axes,
    Settings,
    value_type,
)
from orchestrator.spec.marked_yaml import Document, Keys, SpecError, choices, parse, read, shown
from orchestrator.spec.sweep import (
    THREE_SEEDS,
    Budget,
    Cell,
    Resources,
    Search,
    SeedEntries,
    Seeds,
    SweepSpec,
    cells_of,
    combinations,
    fits,
    unlabelled,
)
from orchestrator.spec.validation import (
    CONFIG,
    LINE,
    NAME,
    Schema,
    Version,
    key_choices,
    schema_of,
    setting,
    validate,
)

# ---------------------------------------------------------------- the file


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tracking:
    uri: LINE = setting(None, "http(s)://..., sqlite:///..., none")


Excluded = Annotated[Settings, Field(min_length=1, json_schema_extra={"minProperties": 1})]


def _seeds(seeds: Any) -> Any:
    """A list is `values`; a plain number there is for each of the varied keys."""
    found = {"values": seeds} if isinstance(seeds, list) else seeds
    if not isinstance(found, dict) or not isinstance(found.get("values"), list):
        return found
    vary = found.get("vary")
    width = len(vary) if isinstance(vary, list) else 1
    values = [one if isinstance(one, list) else [one] * width for one in found["values"]]
    return {**found, "values": values}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SweepFile:
    """One question: a grid of settings, a search in each cell, seeds."""

    version: Version = Field(description="of this form of file")
    name: NAME = Field(description="of the sweep, in the store and in every command")
    grid: Axes = Field(
        default_factory=dict,
        description="every combination is a cell; the first key varies slowest",
    )
    exclude: Annotated[tuple[Excluded, ...], Field(min_length=1)] = setting(
        (), "combinations of the grid that are left out: keys with a value each"
    )
    fixed: Settings = Field(
        default_factory=dict,
        description="the same for every cell; a method's pinned keys stay as they are",
    )
    search: Search = setting(None, "an Optuna study in each cell; without it a cell is one point")
    seeds: Annotated[
        Seeds,
        BeforeValidator(_seeds, json_schema_input_type=SeedEntries | Seeds),
        Field(json_schema_extra={"title": "a list such as [1, 2, 3], or vary and values"}),
    ] = setting(THREE_SEEDS, "each point runs once for each; the default is [1, 2, 3]")
    budget: Budget = setting(
        Budget(), "a run stops before what comes next would cost more; the next run goes on"
    )
    resources: Resources = setting(Resources(), "what runs ask of the machines; changes no result")
    project: NAME = setting(
        None, "the experiment is air/<project>; default: AIRSWEEP_PROJECT, else default"
    )
    tracking: Tracking = setting(Tracking(), "where MLflow's runs go (docs/tracking.md)")
    data_root: LINE = setting(None, "folder of real datasets; changes no result")


FILE = TypeAdapter(SweepFile)


def sweep_schema() -> Schema:
    """The JSON schema of a sweep file, for editors: draft 7, which they know best.

    It knows keys, types, limits and words. What a file cannot mean (pinned keys, twice the same
    value) only `airsweep validate` finds.
    """
    with_method = [
        {"required": [part], "properties": {part: {"required": ["method"]}}}
        for part in ("grid", "fixed")
    ]
    head: Schema = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return {**head, **schema_of(FILE), "title": "airsweep sweep file", "anyOf": with_method}


def load_sweep(path: Path, *, sets: Sequence[str] = (), only: Sequence[str] = ()) -> SweepSpec:
    """Read and check a sweep file.

    Args:
        path: the file.
        sets: `key=value` each. A trial key goes under `fixed`; a path such as `search.points`
            replaces that part of the file.
        only: `key=value[,value]` each: of the values of this grid key, keep these.

    Raises:
        SpecError: the first thing that is wrong.
    """
    return checked(read(path), sets, only)


def checked(document: Document, sets: Sequence[str] = (), only: Sequence[str] = ()) -> SweepSpec:
    """The same of a file that was read already."""
    if document.value is None:
        raise SpecError(f"{document.source}: empty; a sweep file starts with `version: 1`")
    _holds_no_password(document, sets)
    for option in sets:
        _set(document, option)
    spec = _spec(document, validate(document, FILE))
    _check_sense(document, spec)
    return _only(spec, only)


def find_sweep(name_or_path: str) -> Path:
    """A path, as it is; a bare name, from ./sweeps or from the sweeps that come with airsweep."""
    path = Path(name_or_path)
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    folders = (Path("sweeps"), SHIPPED / "sweeps", ROOT / "sweeps")
    for folder in folders:
        file = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if os.path.isfile(file):
            return file
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise SpecError(f"{name_or_path}: no such file or sweep; {choices(path.stem, known)}")


def _holds_no_password(document: Document, sets: Sequence[str]) -> None:
    """A file and its options are kept beside the results and shown by trackers, comments too."""
    why = (
        "an address with a password in it, which would be kept and shown with the results; leave "
        "both out, and give them by the environment: MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_*"
    )
    at = password_at(document.text)
    if at is not None:
        before = document.text[:at]
        line, column = before.count("\n") + 1, at - before.rfind("\n")
        raise SpecError(f"{document.source}:{line}:{column}: {why}")
    for option in sets:
        if password_at(option) is not None:
            raise SpecError(f"--set {option.partition('=')[0]}: {why}")


# ---------------------------------------------------------------- options


def _set(document: Document, option: str) -> None:
    place = f"--set {option}"
    name, _, text = option.partition("=")
    if not text:
        raise SpecError(f"{place}: allowed: KEY=VALUE")
    value = parse(text, place).value
    head, _, rest = name.partition(".")
    parts = SweepFile.__dataclass_fields__
    if name in TRIAL_NAMES:
        keys: Keys = ("fixed", name)
    elif head not in parts:
        raise SpecError(
            f"{place}: unknown key {name!r}; {key_choices(name, [*parts, *TRIAL_NAMES])}"
        )
    elif name.startswith("search.space."):
        keys = ("search", "space", name.removeprefix("search.space."))
    elif rest:
        keys = (head, rest) if head in ("grid", "fixed") else (head, *rest.split("."))
    else:
        keys = (head,)
    document.put(keys, value, place)


def only_values(spec: SweepSpec, only: Sequence[str]) -> dict[str, list[Any]]:
    """Which values of the grid `key=value[,value]` options keep, by key.

    Raises:
        SpecError: no key of the grid, or none of its values.
    """
    kept: dict[str, list[Any]] = {}
    for option in only:
        place = f"--only {option}"
        key, _, text = option.partition("=")
        if key not in spec.grid:
            raise SpecError(f"{place}: {key!r} is no key of the grid; {choices(key, spec.grid)}")
        for wanted in parse(f"[{text}]", place).value:
            value = validate(Document(source=place, value=wanted), value_type(key))
            if value not in spec.grid[key]:
                allowed = choices(value, spec.grid[key])
                raise SpecError(f"{place}: {shown(value)} is not in grid.{key}; {allowed}")
            kept.setdefault(key, []).append(value)
        if not kept.get(key):
            raise SpecError(f"{place}: allowed: {key}=VALUE, or several with commas")
    return kept


def _only(spec: SweepSpec, only: Sequence[str]) -> SweepSpec:
    kept = only_values(spec, only)
    grid = {
        key: tuple(value for value in values if value in kept.get(key, values))
        for key, values in spec.grid.items()
    }
    smaller = replace(spec, grid=grid, axes=spec.grid)
    if next(combinations(smaller), None) is None:
        raise SpecError(f"--only {' --only '.join(only)}: no cell is left, the rest is excluded")
    return smaller


def _spec(document: Document, file: SweepFile) -> SweepSpec:
    if "method" not in {**file.grid, **file.fixed}:
        raise document.error(
            (), f"`method` is needed, under grid or fixed; allowed: {', '.join(presets.METHODS)}"
        )
    parts = {name: value for name, value in vars(file).items() if name != "tracking"}
    return SweepSpec(
        **parts,
        tracking_uri=file.tracking.uri,
        question=_header(document.text),
        source=document.source,
        text=document.text,
    )


MODELINE = re.compile(r"#\s*yaml-language-server:")  # for editors, no part of the question


def _header(text: str) -> str:
    lines = []
    for line in text.lstrip("\n").splitlines():
        if not line.startswith("#"):
            break
        if MODELINE.match(line):
            continue
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


# ---------------------------------------------------------------- what a file cannot mean

MAX_CELLS = 10_000


def _check_sense(document: Document, spec: SweepSpec) -> None:
    """Check a sweep whose values are all allowed by themselves.

    Raises:
        SpecError: the first thing that makes no sense, at its place in the document.
    """
    _exclude_names_cells(document, spec)
    _each_key_has_one_place(document, spec)
    _each_key_is_free_somewhere(document, spec)
    size = math.prod(len(values) for values in spec.grid.values())
    if size > MAX_CELLS:
        raise document.key_error(("grid",), f"makes {size:,} cells; allowed: up to {MAX_CELLS:,}")
    if next(combinations(spec), None) is None:
        raise document.key_error(("exclude",), "leaves no cell of the grid")
    if not fits(spec):
        where = "grid" if "method" in spec.grid else "fixed"
        raise document.error((where, "method"), unlabelled(spec.methods))
    cells = cells_of(spec)
    for key in spec.grid:
        if not any(key in cell.chosen for cell in cells):
            raise document.key_error(("grid", key), "changes nothing: lora is off in every cell")
    for cell in cells:
        _settings_fit_together(document, spec, cell)
    if spec.search:
        _search_makes_sense(document, spec, spec.search, cells)


def _exclude_names_cells(document: Document, spec: SweepSpec) -> None:
    for i, entry in enumerate(spec.exclude):
        for key, value in entry.items():
            if key not in spec.grid:
                raise document.key_error(
                    ("exclude", i, key), f"is not in the grid; {choices(key, spec.grid)}"
                )
            if value not in spec.grid[key]:
                allowed = choices(value, spec.grid[key])
                raise document.error(
                    ("exclude", i, key), f"{shown(value)} is not in the grid; {allowed}"
                )


def _places(spec: SweepSpec) -> Iterable[tuple[Keys, str]]:
    # The order decides which of two places a message points at: the last. An option of the
    # command line stands under fixed.
    yield from ((("grid", key), key) for key in spec.grid)
    yield from ((("search", "space", d.key), d.key) for d in spec.space)
    yield from ((("fixed", key), key) for key in spec.fixed)


def _each_key_has_one_place(document: Document, spec: SweepSpec) -> None:
    first: dict[str, Keys] = {}
    for place, key in _places(spec):
        if key in spec.seeds.vary:
            raise document.key_error(
                place, "`seeds` varies it; allowed: its values there, such as `seeds: [1, 2, 3]`"
            )
        if key in first:
            other = ".".join(map(str, first[key][:-1]))
            raise document.key_error(place, f"is under {other} too; allowed: one of the two")
        first[key] = place


def _each_key_is_free_somewhere(document: Document, spec: SweepSpec) -> None:
    for place, key in _places(spec):
        pins = {name: presets.METHODS[name].pins for name in spec.methods}
        if all(key in pinned for pinned in pins.values()):
            found = ", ".join(f"{name}: {shown(pinned[key])}" for name, pinned in pins.items())
            free = [name for name, method in presets.METHODS.items() if key not in method.pins]
            raise document.key_error(
                place,
                f"pinned by every method of this sweep ({found}); "
                f"allowed: without it, or with a method that leaves it free: {', '.join(free)}",
            )


def _met(cell: Cell, key: str) -> set[Any]:
    """The values that a key takes in a cell, or the least of them."""
    searched = {v for d in cell.space if d.key == key for v in d.values or (d.min,)}
    return {cell.flat[key]} | searched


def _written(spec: SweepSpec, key: str) -> Keys:
    return next(place for place, name in _places(spec) if name == key)


SPREAD = {  # what of a class each source of the auxiliary classifier sees
    "synthetic": ("images_per_class", "fidelity.keep"),
    "real": ("auxiliary.k",),
    "both": (),  # one of each are two
}


def _settings_fit_together(document: Document, spec: SweepSpec, cell: Cell) -> None:
    flat = cell.flat

    def refuse(key: str, message: str) -> SpecError:
        return document.key_error(_written(spec, key), message)

    if flat["paradigm"] == "ul" and "labelled" in _met(cell, "supervision"):
        raise refuse(
            "supervision",
            f"labelled in {cell.id}: ul has no labelled image; "
            "allowed: paradigm ssl or trzsl, or supervision pseudo",
        )
    other = flat["test_dataset"]
    if flat["paradigm"] == "trzsl" and other not in (None, flat["dataset"]):
        raise refuse(
            "test_dataset",
            f"{other} in {cell.id} has no seen and unseen classes; "
            "allowed with paradigm ul and ssl",
        )
    source = flat["auxiliary.source"]
    if flat["auxiliary.kind"] != "lda" or not flat["fusion_weight"]:
        return
    if source == "real" and flat["paradigm"] == "ssl":  # the labelled images join them
        return
    for key in SPREAD[source]:
        if 1 in _met(cell, key):
            raise refuse(
                key,
                f"1 in {cell.id}: auxiliary.kind lda has to see how images of a class differ; "
                "allowed: from 2 on, or prototype, knn, cache, linear_probe as auxiliary.kind",
            )


def _search_makes_sense(
    document: Document, spec: SweepSpec, search: Search, cells: tuple[Cell, ...]
) -> None:
    searched = {dimension.key for dimension in search.space}
    for dimension in search.space:
        place: Keys = ("search", "space", dimension.key)
        for name in names_of(dimension.when) if dimension.when else ():
            values = {look_up(cell.flat, name) for cell in cells}
            if name in spec.seeds.vary:
                raise document.error(
                    (*place, "when"), f"{name} differs between the runs of one point"
                )
            if name not in searched and len(values) == 1:
                raise document.error(
                    (*place, "when"),
                    f"unused: {name} is {shown(values.pop())} in every cell and is not searched; "
                    "allowed: keys of search.space, and keys that differ between cells",
                )
        if not any(dimension in cell.space for cell in cells):
            raise document.key_error(place, "never searched: `when` holds in no cell")
        if search.sampler == "grid" and dimension.values is None:
            raise document.key_error(
                place, "sampler: grid cannot list a range; allowed: `values`, or tpe or random"
            )
    if search.pruning:
        _pruning_makes_sense(document, search, cells)
    for cell in cells:
        if search.objective == "validation_accuracy" and cell.flat["pool"] != "train":
            raise document.error(
                ("search", "objective"),
                f"the validation images of {cell.id} are in its pool (pool: {cell.flat['pool']}); "
                "allowed: mutual_information, or `pool: train` under fixed",
            )


def _pruning_makes_sense(document: Document, search: Search, cells: tuple[Cell, ...]) -> None:
    if any(dimension.key == "iterations" for dimension in search.space):
        raise document.key_error(
            ("search", "space", "iterations"),
            "points that are pruned are compared at the same iteration of equally many; "
            "allowed with search.pruning: `iterations` under grid, or fixed",
        )
    if search.pruning and search.pruning.rule != "halving":
        pruning = ("search", "pruning")
        if "keep" in document.at(pruning):
            raise document.key_error((*pruning, "keep"), "unused; allowed: with rule: halving")
    longest = max((cell.flat["iterations"] for cell in cells if cell.space), default=0)
    for i, rung in enumerate(search.rungs):
        if rung >= longest:
            raise document.error(
                ("search", "pruning", "rungs", i),
                f"{rung} is never reached before the end: no searched cell has more than "
                f"{longest} iterations; allowed: less than that",
            )
    if search.width == 1 and search.pruning and search.pruning.rule == "halving":
        raise document.key_error(
            ("search", "pruning"),
            "a round of one point has nothing to compare it with; allowed: `width: 2` or more",
        )
