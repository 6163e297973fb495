"""Load and check sweep files. An error names file, line, column, key and the allowed values.

The checks cover everything that does not depend on data or model weights: names of weights are not
resolved. This module is independent of Ray, Optuna and the store.
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

from air_core.methods import METHODS
from orchestrator.files import ROOT, SHIPPED
from orchestrator.redact import find_password
from orchestrator.spec._expressions import lookup, names_of
from orchestrator.spec._trial_values import (
    TRIAL_NAMES,
    Axes,
    Settings,
    value_type,
)
from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    allowed_choices,
    dotted_path,
    parse,
    read,
    short_value,
)
from orchestrator.spec.sweep import (
    THREE_SEEDS,
    Budget,
    Cell,
    Override,
    Resources,
    Search,
    SeedEntries,
    Seeds,
    SweepSpec,
    cells_of,
    combinations,
    has_fitting_cell,
    matching_overrides,
    needs_labels_message,
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

# ---------------------------------------------------------------- the format


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tracking:
    uri: LINE = setting(None, "address of MLflow: http(s)://..., sqlite:///...; none: no tracking")


Excluded = Annotated[Settings, Field(min_length=1, json_schema_extra={"minProperties": 1})]


def _seeds(seeds: Any) -> Any:
    """Expand the short forms: a list is `values`; a single number applies to every varied key."""
    expanded = {"values": seeds} if isinstance(seeds, list) else seeds
    if not isinstance(expanded, dict) or not isinstance(expanded.get("values"), list):
        return expanded
    vary = expanded.get("vary")
    width = len(vary) if isinstance(vary, list) else 1
    values = [entry if isinstance(entry, list) else [entry] * width for entry in expanded["values"]]
    return {**expanded, "values": values}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SweepFile:
    """A sweep: a grid of settings, a search in each cell, and seeds."""

    version: Version = Field(description="version of the file format")
    name: NAME = Field(description="name of the sweep in the store and in commands")
    grid: Axes = Field(
        default_factory=dict,
        description="lists of values; each combination is a cell; the first key varies slowest",
    )
    exclude: Annotated[tuple[Excluded, ...], Field(min_length=1)] = setting(
        (), "combinations of the grid to leave out, as keys with a value each"
    )
    fixed: Settings = Field(
        default_factory=dict,
        description="settings of every cell; they do not override keys that a method pins",
    )
    overrides: tuple[Override, ...] = setting(
        (), "settings of the cells in which a condition holds; of several, the last one counts"
    )
    search: Search = setting(
        None, "a hyperparameter search in each cell; without it, a cell is a single point"
    )
    seeds: Annotated[
        Seeds,
        BeforeValidator(_seeds, json_schema_input_type=SeedEntries | Seeds),
        Field(json_schema_extra={"title": "a list such as [1, 2, 3], or `values` and `vary`"}),
    ] = setting(THREE_SEEDS, "each point runs once per seed; default: [1, 2, 3]")
    budget: Budget = setting(
        Budget(), "limits of one run; it stops before the next step would exceed them"
    )
    resources: Resources = setting(
        Resources(), "resources on the cluster; they do not change results"
    )
    project: NAME = setting(
        None, "the MLflow experiment is air/<project>; default: $AIRSWEEP_PROJECT, else `default`"
    )
    tracking: Tracking = setting(Tracking(), "address of the MLflow tracker (docs/tracking.md)")
    data_root: LINE = setting(None, "folder that contains the datasets; it does not change results")


FILE = TypeAdapter(SweepFile)


def sweep_schema() -> Schema:
    """The JSON schema of a sweep file, for editors: draft 7, which most editors support.

    It covers keys, types, limits and choices. `airsweep validate` also finds settings that
    contradict each other, such as a pinned key or a repeated value.
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
        sets: options of the form `key=value`. A trial key is set under `fixed`; a path such as
            `search.points` replaces that part of the file.
        only: options of the form `key=value[,value]`: the values of this grid key to keep.

    Raises:
        SpecError: the first error in the file or the options.
    """
    return sweep_from_document(read(path), sets, only)


def sweep_from_document(
    document: Document, sets: Sequence[str] = (), only: Sequence[str] = ()
) -> SweepSpec:
    """Check a file that is already parsed; see `load_sweep`."""
    if document.value is None:
        raise SpecError(
            f"{document.source}: the file is empty; a sweep file starts with `version: 1`"
        )
    _refuse_passwords(document, sets)
    for option in sets:
        _apply_option(document, option)
    spec = _sweep_spec(document, validate(document, FILE))
    _check_consistency(document, spec)
    return _select(spec, only)


def find_sweep(name_or_path: str) -> Path:
    """The path of a sweep file.

    A bare name is looked up in ./sweeps and among the sweeps that ship with airsweep.

    Raises:
        SpecError: no sweep of this name exists.
    """
    path = Path(name_or_path)
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    folders = (Path("sweeps"), SHIPPED / "sweeps", ROOT / "sweeps")
    for folder in folders:
        file = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if os.path.isfile(file):
            return file
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise SpecError(f"{name_or_path}: no such file or sweep; {allowed_choices(path.stem, names)}")


def _refuse_passwords(document: Document, sets: Sequence[str]) -> None:
    # The store keeps the file with its comments and the options, and trackers show them.
    message = (
        "the address contains a password, which would be stored and shown with the results; remove "
        "user and password from the address and set environment variables instead: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_*"
    )
    index = find_password(document.text)
    if index is not None:
        before = document.text[:index]
        line, column = before.count("\n") + 1, index - before.rfind("\n")
        raise SpecError(f"{document.source}:{line}:{column}: {message}")
    for option in sets:
        if find_password(option) is not None:
            raise SpecError(f"--set {option.partition('=')[0]}: {message}")


# ---------------------------------------------------------------- options


def _apply_option(document: Document, option: str) -> None:
    source = f"--set {option}"
    name, _, text = option.partition("=")
    if not text:
        raise SpecError(f"{source}: the option has no value; allowed: KEY=VALUE")
    value = parse(text, source).value
    head, _, rest = name.partition(".")
    parts = SweepFile.__dataclass_fields__
    if name in TRIAL_NAMES:
        keys: Keys = ("fixed", name)
    elif head not in parts:
        raise SpecError(
            f"{source}: unknown key {name!r}; {key_choices(name, [*parts, *TRIAL_NAMES])}"
        )
    elif name.startswith("search.space."):
        keys = ("search", "space", name.removeprefix("search.space."))
    elif rest:
        keys = (head, rest) if head in ("grid", "fixed") else (head, *rest.split("."))
    else:
        keys = (head,)
    document.set_value(keys, value, source)


def only_values(spec: SweepSpec, only: Sequence[str]) -> dict[str, list[Any]]:
    """The grid values that `key=value[,value]` options select, by key.

    Raises:
        SpecError: an option names a key or a value that is not in the grid.
    """
    selected: dict[str, list[Any]] = {}
    for option in only:
        source = f"--only {option}"
        key, _, text = option.partition("=")
        if key not in spec.grid:
            raise SpecError(
                f"{source}: {key!r} is not a key of the grid; {allowed_choices(key, spec.grid)}"
            )
        for item in parse(f"[{text}]", source).value:
            value = validate(Document(source=source, value=item), value_type(key))
            if value not in spec.grid[key]:
                allowed = allowed_choices(value, spec.grid[key])
                raise SpecError(f"{source}: {short_value(value)} is not in grid.{key}; {allowed}")
            selected.setdefault(key, []).append(value)
        if not selected.get(key):
            raise SpecError(
                f"{source}: the option has no value; allowed: {key}=VALUE or {key}=VALUE,VALUE"
            )
    return selected


def _select(spec: SweepSpec, only: Sequence[str]) -> SweepSpec:
    selected = only_values(spec, only)
    grid = {
        key: tuple(value for value in values if value in selected.get(key, values))
        for key, values in spec.grid.items()
    }
    smaller = replace(spec, grid=grid, axes=spec.grid)
    if next(combinations(smaller), None) is None:
        raise SpecError(
            f"--only {' --only '.join(only)}: no cell is left, because `exclude` removes them all"
        )
    return smaller


def _sweep_spec(document: Document, file: SweepFile) -> SweepSpec:
    if "method" not in {**file.grid, **file.fixed}:
        raise document.error(
            (),
            f"`method` is missing; set it under grid or fixed; allowed: {', '.join(METHODS)}",
        )
    parts = {name: value for name, value in vars(file).items() if name != "tracking"}
    return SweepSpec(
        **parts,
        tracking_uri=file.tracking.uri,
        question=_question(document.text),
        source=document.source,
        text=document.text,
    )


MODELINE = re.compile(r"#\s*yaml-language-server:")  # for editors; not part of the question


def _question(text: str) -> str:
    lines = []
    for line in text.lstrip("\n").splitlines():
        if not line.startswith("#"):
            break
        if MODELINE.match(line):
            continue
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


# ---------------------------------------------------------------- consistency

MAX_CELLS = 10_000


def _check_consistency(document: Document, spec: SweepSpec) -> None:
    """Check for settings that are valid on their own but contradict each other.

    Raises:
        SpecError: the first contradiction, with its position in the document.
    """
    _check_exclude(document, spec)
    _check_repeated_keys(document, spec)
    for path, key in _settings(spec):
        if path[0] != "overrides":
            _check_pinned_key(document, path, key, spec.methods)
    size = math.prod(len(values) for values in spec.grid.values())
    if size > MAX_CELLS:
        raise document.key_error(
            ("grid",), f"the grid has {size:,} cells; allowed: up to {MAX_CELLS:,}"
        )
    if next(combinations(spec), None) is None:
        raise document.key_error(
            ("exclude",),
            "every combination of the grid is excluded; allowed: entries that leave a cell",
        )
    _check_overrides(document, spec)
    if not has_fitting_cell(spec):
        part = "grid" if "method" in spec.grid else "fixed"
        raise document.error((part, "method"), needs_labels_message(spec.methods))
    cells = cells_of(spec)
    for key in spec.grid:
        if not any(key in cell.chosen for cell in cells):
            raise document.key_error(
                ("grid", key),
                "the key has no effect, because lora is off in every cell; "
                "allowed: with lora on in at least one cell",
            )
    for cell in cells:
        _check_cell(document, spec, cell)
    if spec.search:
        _check_search(document, spec, spec.search, cells)


def _check_exclude(document: Document, spec: SweepSpec) -> None:
    for i, entry in enumerate(spec.exclude):
        for key, value in entry.items():
            if key not in spec.grid:
                raise document.key_error(
                    ("exclude", i, key),
                    f"{key} is not a key of the grid; {allowed_choices(key, spec.grid)}",
                )
            if value not in spec.grid[key]:
                allowed = allowed_choices(value, spec.grid[key])
                raise document.error(
                    ("exclude", i, key), f"{short_value(value)} is not in grid.{key}; {allowed}"
                )


def _settings(spec: SweepSpec) -> Iterable[tuple[Keys, str]]:
    """The path and the key of every setting."""
    # A message about a repeated key points at the later path. Options set keys under fixed.
    yield from ((("grid", key), key) for key in spec.grid)
    yield from ((("search", "space", d.key), d.key) for d in spec.space)
    for i, entry in enumerate(spec.overrides):
        yield from ((("overrides", i, "set", key), key) for key in entry.set)
    yield from ((("fixed", key), key) for key in spec.fixed)


def _check_repeated_keys(document: Document, spec: SweepSpec) -> None:
    first: dict[str, Keys] = {}
    for path, key in _settings(spec):
        if key in spec.seeds.vary:
            raise document.key_error(
                path,
                "`seeds` already varies this key; allowed: its values there, such as "
                "`seeds: [1, 2, 3]`",
            )
        # An entry replaces an earlier one and what the file has under fixed, but no option.
        is_option = document.key_positions.get(path, "").startswith("--set ")
        if key in first and (first[key][0] != "overrides" or is_option):
            other = dotted_path(first[key][:-1])
            raise document.key_error(
                path, f"the key is also set under {other}; allowed: one of the two"
            )
        first.setdefault(key, path)


def _check_pinned_key(document: Document, path: Keys, key: str, methods: Iterable[str]) -> None:
    """
    Args:
        methods: of the cells that the setting at `path` applies to.
    """
    pins = {name: METHODS[name].pins for name in methods}
    if all(key in pinned for pinned in pins.values()):
        values = ", ".join(f"{name}: {short_value(pinned[key])}" for name, pinned in pins.items())
        free = [name for name, method in METHODS.items() if key not in method.pins]
        where = "where the condition holds" if path[0] == "overrides" else "of this sweep"
        raise document.key_error(
            path,
            f"every method {where} pins this key ({values}); allowed: remove the key, or "
            f"add a method that does not pin it: {', '.join(free)}",
        )


def _check_overrides(document: Document, spec: SweepSpec) -> None:
    unknown = {dimension.key: "which `search.space` lists" for dimension in spec.space}
    unknown |= dict.fromkeys(spec.seeds.vary, "which differs between the runs of a point")
    methods: dict[int, dict[str, None]] = {i: {} for i in range(len(spec.overrides))}
    for combination in combinations(spec):
        for i in matching_overrides(spec, combination):
            methods[i][(spec.fixed | combination)["method"]] = None
    for i, entry in enumerate(spec.overrides):
        path: Keys = ("overrides", i)
        for name in names_of(entry.when):
            if name in unknown:
                raise document.error(
                    (*path, "when"),
                    f"the condition depends on {name}, {unknown[name]}; "
                    "allowed: keys with one value in a cell",
                )
        if not methods[i]:
            raise document.error(
                (*path, "when"),
                "the condition holds in no cell; allowed: values that the grid or fixed has",
            )
        for key in entry.set:
            _check_pinned_key(document, (*path, "set", key), key, methods[i])


def _check_cell(document: Document, spec: SweepSpec, cell: Cell) -> None:
    flat = cell.flat

    def error(key: str, message: str) -> SpecError:
        path = next(
            path
            for path, name in _settings(spec)
            if name == key and (path[0] != "overrides" or path[1] == cell.overridden.get(key))
        )
        return document.key_error(path, message)

    if flat["paradigm"] == "ul" and "labelled" in _values_in(cell, "supervision"):
        raise error(
            "supervision",
            f"supervision is labelled in {cell.id}, but paradigm ul has no labelled images; "
            "allowed: paradigm ssl or trzsl, or supervision pseudo",
        )
    other = flat["test_dataset"]
    if flat["paradigm"] == "trzsl" and other not in (None, flat["dataset"]):
        raise error(
            "test_dataset",
            f"paradigm trzsl in {cell.id} needs seen and unseen classes, which {other} does not "
            "have; allowed: paradigm ul or ssl",
        )
    source = flat["auxiliary.source"]
    if flat["auxiliary.kind"] != "lda" or not flat["fusion_weight"]:
        return
    if source == "real" and flat["paradigm"] == "ssl":  # the labelled images are used as well
        return
    for key in IMAGE_COUNTS[source]:
        if 1 in _values_in(cell, key):
            raise error(
                key,
                f"{key} is 1 in {cell.id}, but auxiliary.kind lda needs two or more images of each "
                "class; allowed: >= 2, or auxiliary.kind prototype, knn, cache or linear_probe",
            )


# The keys that limit the images per class, by source of the auxiliary classifier.
IMAGE_COUNTS = {
    "synthetic": ("images_per_class", "fidelity.keep"),
    "real": ("auxiliary.k",),
    "both": (),  # one image of each source makes two
}


def _values_in(cell: Cell, key: str) -> set[Any]:
    """The values of a key in a cell; of a range, its lower end."""
    searched = {v for d in cell.space if d.key == key for v in d.values or (d.min,)}
    return {cell.flat[key]} | searched


def _check_search(
    document: Document, spec: SweepSpec, search: Search, cells: tuple[Cell, ...]
) -> None:
    searched = {dimension.key for dimension in search.space}
    for dimension in search.space:
        path: Keys = ("search", "space", dimension.key)
        for name in names_of(dimension.when) if dimension.when else ():
            values = {lookup(cell.flat, name) for cell in cells}
            if name in spec.seeds.vary:
                raise document.error(
                    (*path, "when"),
                    f"the condition depends on {name}, which differs between the runs of a point; "
                    "allowed: keys that `seeds` does not vary",
                )
            if name not in searched and len(values) == 1:
                raise document.error(
                    (*path, "when"),
                    f"the condition has no effect: {name} is {short_value(values.pop())} in "
                    "every cell and is not searched; "
                    "allowed: keys of search.space and keys that differ between cells",
                )
        if not any(dimension in cell.space for cell in cells):
            raise document.key_error(
                path, "the key is never searched: `when` does not hold in any cell"
            )
        if search.sampler == "grid" and dimension.values is None:
            raise document.key_error(
                path,
                "sampler grid cannot enumerate a range; "
                "allowed: `values`, or sampler tpe or random",
            )
    if search.pruning:
        _check_pruning(document, search, cells)
    for cell in cells:
        if search.objective == "validation_accuracy" and cell.flat["pool"] != "train":
            raise document.error(
                ("search", "objective"),
                f"the pool of {cell.id} contains the validation images "
                f"(pool: {cell.flat['pool']}); "
                "allowed: mutual_information, or `pool: train` under fixed",
            )


def _check_pruning(document: Document, search: Search, cells: tuple[Cell, ...]) -> None:
    if any(dimension.key == "iterations" for dimension in search.space):
        raise document.key_error(
            ("search", "space", "iterations"),
            "pruning compares points with the same number of iterations, so `iterations` cannot be "
            "searched; allowed with search.pruning: `iterations` under grid or fixed",
        )
    if search.pruning and search.pruning.rule != "halving":
        pruning = ("search", "pruning")
        if "keep" in document.value_at(pruning):
            raise document.key_error(
                (*pruning, "keep"),
                f"rule {search.pruning.rule} does not use `keep`; allowed: rule halving",
            )
    longest = max((cell.flat["iterations"] for cell in cells if cell.space), default=0)
    for i, rung in enumerate(search.rungs):
        if rung >= longest:
            raise document.error(
                ("search", "pruning", "rungs", i),
                f"pruning after {rung} iterations has no effect, because no searched cell has more "
                f"than {longest} iterations; allowed: < {longest}",
            )
    if search.width == 1 and search.pruning and search.pruning.rule == "halving":
        raise document.key_error(
            ("search", "pruning"),
            "rule halving compares the points of a round, but `width` is 1; "
            "allowed: `width: 2` or more",
        )
