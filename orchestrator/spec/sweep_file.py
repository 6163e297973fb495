"""Load and check sweep files. An error names file, line, column, key and the allowed values.

The checks cover everything that does not depend on data or model weights: names of weights are not
resolved. This module is independent of Ray, Optuna and the store.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass, rebuild_dataclass

from air_core.components import REGISTRIES, computed_from_registries, when_plugins_change
from air_core.methods import EMBEDDED, METHODS
from air_core.specs.flat import trial_keys
from orchestrator.files import ROOT, SHIPPED
from orchestrator.plugins import Plugin, components_of, read_plugin, use_plugins
from orchestrator.redact import find_password
from orchestrator.spec._trial_values import (
    TEXTS,
    Axes,
    Settings,
    trial_names,
    value_type,
)
from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    allowed_choices,
    dotted_path,
    line_column,
    parse,
    read,
    short_value,
)
from orchestrator.spec.space import point_count
from orchestrator.spec.sweep import (
    MAX_POINTS,
    THREE_SEEDS,
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
    options_text,
    split_name,
    with_every_method,
)
from orchestrator.spec.validation import (
    CONFIG,
    LINE,
    NAME,
    Schema,
    Version,
    joined,
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
    resources: Resources = setting(
        Resources(), "resources on the cluster; they do not change results"
    )
    project: NAME = setting(
        None, "the MLflow experiment is air/<project>; default: $AIRSWEEP_PROJECT, else `default`"
    )
    tracking: Tracking = setting(Tracking(), "address of the MLflow tracker (docs/tracking.md)")
    data_root: LINE = setting(None, "folder that contains the datasets; it does not change results")
    plugins: tuple[LINE, ...] = setting(
        (), "code with components of your own: .py files beside this file, or installed modules"
    )


def _rebuild_types() -> None:
    for part in (Override, Search, SweepFile):  # pydantic keeps the schema of a class
        rebuild_dataclass(part, force=True)  # type: ignore[arg-type]


when_plugins_change(_rebuild_types)


@computed_from_registries
@cache
def file_type() -> TypeAdapter[SweepFile]:
    """The type of a sweep file, with the components of the plugins in use."""
    return TypeAdapter(SweepFile)


def sweep_schema() -> Schema:
    """The JSON schema of a sweep file, for editors: draft 7, which most editors support.

    It covers keys, types, limits and choices. `airsweep plan` also finds settings that
    contradict each other, such as a pinned key or a repeated value.
    """
    with_method = [
        {"required": [part], "properties": {part: {"required": ["method"]}}}
        for part in ("grid", "fixed")
    ]
    head: Schema = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return {**head, **schema_of(file_type()), "title": "airsweep sweep file", "anyOf": with_method}


def load_sweep(
    path: Path,
    *,
    sets: Sequence[str] = (),
    only: Sequence[str] = (),
    plugins: Sequence[Plugin] | None = None,
) -> SweepSpec:
    """Read and check a sweep file. Runs the code of its plugins.

    Args:
        path: the file.
        sets: options of the form `key=value`. A trial key is set under `fixed`; a path such as
            `search.points` replaces that part of the file.
        only: options of the form `key=value[,value]`: the values of this grid key to keep.
        plugins: those that a run recorded, in place of the files.

    Raises:
        SpecError: the errors in the file and in `sets`, or the first error in `only`.
    """
    return sweep_from_document(read(path), sets, only, plugins)


def sweep_from_document(
    document: Document,
    sets: Sequence[str] = (),
    only: Sequence[str] = (),
    plugins: Sequence[Plugin] | None = None,
) -> SweepSpec:
    """Check a file that is already parsed; see `load_sweep`."""
    if document.value is None:
        raise SpecError(
            f"{document.source}:1:1: the file is empty; a sweep file starts with `version: 1`"
        )
    _refuse_passwords(document, sets)
    if plugins is None:
        plugins = _plugins_of(document)
    use_plugins(plugins)
    relative = frozenset(_relative_names(document.value))
    conflicts: list[SpecError] = []
    for option in sets:
        try:
            relative -= frozenset(_relative_names(_apply_option(document, option)))
        except SpecError as error:
            conflicts.append(SpecError(str(error), ("--set", option)))
    conflicts += _conflicting_keys(document)
    file = validate(document, file_type(), also=conflicts)
    if "method" not in {**file.grid, **file.fixed}:
        allowed = f"allowed: {', '.join(METHODS)}"
        missing = document.error((), f"`method` is missing; set it under grid or fixed; {allowed}")
        raise joined([missing, *conflicts])
    spec = replace(_sweep_spec(document, file), relative_names=relative, plugins=tuple(plugins))
    spec = replace(spec, options=options_text(sets, only))
    if errors := [*conflicts, *_contradictions(spec)]:
        raise joined(errors)
    return _select(spec, only)


def _plugins_of(document: Document) -> list[Plugin]:
    """Read the plugins that a file names; other mistakes in `plugins` are found later."""
    value = document.value
    names = value.get("plugins") if isinstance(value, dict) else None
    plugins = []
    for position, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str):
            try:
                plugins.append(read_plugin(name, Path(document.source).parent))
                components_of(plugins[-1])
            except (ValueError, OSError) as problem:
                raise document.error(("plugins", position), str(problem)) from None
    return plugins


def find_sweep(name_or_path: str) -> Path:
    """The path of a sweep file.

    A bare name is looked up in ./sweeps and its folders, in the working directory and among the
    sweeps that ship with airsweep.

    Raises:
        SpecError: no sweep has this name, or several have.
    """
    path = Path(name_or_path)
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    name = f"{path.name.removesuffix('.yaml')}.yaml"
    known: list[str] = []
    for files in (
        [*Path("sweeps").glob("*.yaml")],
        [*Path("sweeps").rglob("*.yaml")],
        [*Path().glob("*.yaml")],
        [*(SHIPPED / "sweeps").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")],
    ):
        found = sorted(str(file) for file in files if file.name == name and file.is_file())
        if len(found) > 1:
            raise SpecError(
                f"{name_or_path}: {len(found)} sweep files have this name; give the path of one: "
                f"{', '.join(found)}"
            )
        if found:
            return Path(found[0])
        known += [file.stem for file in files]
    close = difflib.get_close_matches(path.stem, sorted(set(known)), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "give the path of a sweep file"
    raise SpecError(f"{name_or_path}: no such file or sweep; {hint}")


def _refuse_passwords(document: Document, sets: Sequence[str]) -> None:
    # The store keeps the file with its comments and the options, and trackers show them.
    message = (
        "the address contains a password, which would be stored and shown with the results; remove "
        "user and password from the address and set environment variables instead: "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_*"
    )
    index = find_password(document.text)
    if index is not None:
        line, column = line_column(document.text[:index])
        raise SpecError(f"{document.source}:{line}:{column}: {message}")
    for option in sets:
        if find_password(option) is not None:
            raise SpecError(f"--set {option.partition('=')[0]}: {message}")


# ---------------------------------------------------------------- options


def _apply_option(document: Document, option: str) -> dict[str, Any]:
    """Change the document; returns the value of the option, by its last key."""
    source = f"--set {option}"
    name, _, text = option.partition("=")
    if not text:
        raise SpecError(f"{source}: the option has no value; allowed: KEY=VALUE")
    value = parse(text, source).value
    head, _, rest = name.partition(".")
    parts = SweepFile.__dataclass_fields__
    if name in trial_names():
        keys: Keys = ("fixed", name)
        if isinstance(value, list) and name not in TEXTS:
            raise SpecError(
                f"{source}: --set {name} gives one value under fixed; to vary it, give "
                f"--set grid.{name}={text}; --only {name}=VALUE,VALUE keeps values of a grid"
            )
    elif head not in parts:
        raise SpecError(
            f"{source}: unknown key {name!r}; {key_choices(name, [*parts, *trial_names()])}"
        )
    elif name.startswith("search.space."):
        keys = ("search", "space", name.removeprefix("search.space."))
    elif rest:
        keys = (head, rest) if head in ("grid", "fixed") else (head, *rest.split("."))
    else:
        keys = (head,)
    document.set_value(keys, value, source)
    return {name.rpartition(".")[2]: value}


def _relative_names(value: Any, key: str = "") -> Iterator[str]:
    """Every `folder:<path>` and every name of a model in plain data that is no absolute path."""
    if isinstance(value, str):
        before, path = split_name(value)
        is_model = key in ("backbone", "generator") and value not in (
            EMBEDDED[key],
            *REGISTRIES[key],
        )
        if (is_model or before == "folder:") and not path.startswith(("/", "~")):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _relative_names(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _relative_names(item, name)


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
                f"{_only_hint(spec, key, text)}"
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


def _only_hint(spec: SweepSpec, key: str, text: str) -> str:
    """The end of the message for a key that is not in the grid."""
    of_value = [name for name, values in spec.grid.items() if key in map(str, values)]
    if of_value and not text:
        return f"; did you mean --only {of_value[0]}={key}?"
    if text and key in (*trial_names(), *SweepFile.__dataclass_fields__):
        return f"; --only keeps values of the grid, --set {key}={text} changes a setting"
    return ""


def _select(spec: SweepSpec, only: Sequence[str]) -> SweepSpec:
    selected = only_values(spec, only)
    grid = {
        key: tuple(value for value in values if value in selected.get(key, values))
        for key, values in spec.grid.items()
    }
    question = "" if only else spec.question  # which is about all cells
    smaller = replace(spec, grid=grid, axes=spec.grid, question=question)
    if next(combinations(smaller), None) is None:
        raise SpecError(
            f"--only {' --only '.join(only)}: no cell is left, because `exclude` removes them all"
        )
    return smaller


def _sweep_spec(document: Document, file: SweepFile) -> SweepSpec:
    parts = {name: value for name, value in vars(file).items() if name != "tracking"}
    return SweepSpec(
        **parts,
        tracking_uri=file.tracking.uri,
        question=_question(document.text),
        source=document.source,
        text=document.text,
        document=document,
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
MAX_TRIALS = 100_000


def _conflicting_keys(document: Document) -> Iterator[SpecError]:
    """Keys that another part of the file or the method under fixed sets.

    These conflicts depend on no other setting, so they are reported with wrong values as well.
    """
    fixed, vary = document.section(("fixed",)), document.section(("seeds",)).get("vary")
    method = None if document.section(("grid",)).get("method") else fixed.get("method")
    pins = METHODS[method].pins if isinstance(method, str) and method in METHODS else {}
    varied = vary if isinstance(vary, list) else Seeds.vary
    first: dict[str, Keys] = {}
    for path, key in _settings(document):
        if key in varied:
            yield document.key_error(
                path,
                "`seeds` already varies this key; allowed: its values there, such as "
                "`seeds: [1, 2, 3]`",
            )
        # An entry replaces an earlier one and what the file has under fixed, but no option.
        is_option = document.key_positions.get(path, "").startswith("--set ")
        if key in first and (first[key][0] != "overrides" or is_option):
            other = dotted_path(first[key][:-1])
            hint = ""
            if is_option and other == "grid":
                value = document.value_at(path)
                hint = f"; to run one value of the grid, give --only {key}={value}"
            yield document.key_error(
                path, f"the key is also set under {other}; allowed: one of the two{hint}"
            )
        first.setdefault(key, path)
        if key in pins:  # of methods in the grid there is a note
            free = [name for name, other in METHODS.items() if key not in other.pins]
            yield document.key_error(
                path,
                f"{method} pins this key ({short_value(pins[key])}); allowed: remove the key, or "
                f"use a method that does not pin it: {', '.join(free)}",
            )


def _settings(document: Document) -> Iterator[tuple[Keys, str]]:
    """The path and the key of every setting."""
    # A message about a repeated key points at the later path. Options set keys under fixed.
    overrides = document.section(()).get("overrides")
    entries = overrides if isinstance(overrides, list) else []
    paths: list[Keys] = [("grid",), ("search", "space")]
    paths += [*(("overrides", i, "set") for i in range(len(entries))), ("fixed",)]
    for path in paths:
        allowed = trial_names() if len(path) == 1 else trial_keys()  # these have no method
        yield from (((*path, key), key) for key in document.section(path) if key in allowed)


def _contradictions(spec: SweepSpec) -> Iterator[SpecError]:
    """Settings that are valid on their own but contradict each other."""
    document = spec.document
    yield from _exclude_errors(spec)
    size = math.prod(len(values) for values in spec.grid.values())
    if size > MAX_CELLS:
        yield document.key_error(
            ("grid",), f"the grid has {size:,} cells; allowed: up to {MAX_CELLS:,}"
        )
        return
    if next(combinations(spec), None) is None:
        yield document.key_error(
            ("exclude",),
            "every combination of the grid is excluded; allowed: entries that leave a cell",
        )
        return
    yield from _override_errors(spec)
    if not has_fitting_cell(spec):
        part = "grid" if "method" in spec.grid else "fixed"
        yield document.error((part, "method"), needs_labels_message(spec.methods))
        return
    cells = cells_of(spec)
    for key in spec.grid:
        if key.startswith("lora.") and all(cell.flat.get("lora", True) is None for cell in cells):
            yield document.key_error(
                ("grid", key),
                "the key has no effect, because lora is off in every cell; "
                "allowed: with lora on in at least one cell",
            )
    for cell in cells:
        yield from _cell_errors(document, cell)
    in_search = [*_search_errors(spec, spec.search, cells)] if spec.search else []
    yield from in_search
    if in_search:
        return
    enumerated = spec.search if spec.search and spec.search.sampler == "grid" else None
    points = sum(point_count(cell, enumerated) for cell in cells)
    if (trials := points * len(spec.seeds.values)) > MAX_TRIALS:
        yield document.key_error(
            ("seeds",), f"the sweep has {trials:,} trials; allowed: up to {MAX_TRIALS:,}"
        )


def _exclude_errors(spec: SweepSpec) -> Iterator[SpecError]:
    document = spec.document
    for i, entry in enumerate(spec.exclude):
        for key, value in entry.items():
            if key not in spec.grid:
                yield document.key_error(
                    ("exclude", i, key),
                    f"{key} is not a key of the grid; {allowed_choices(key, spec.grid)}",
                )
            elif value not in spec.grid[key] and key != "method":
                allowed = allowed_choices(value, spec.grid[key])
                yield document.error(
                    ("exclude", i, key), f"{short_value(value)} is not in grid.{key}; {allowed}"
                )


def _override_errors(spec: SweepSpec) -> Iterator[SpecError]:
    unknown = {dimension.key: "which `search.space` lists" for dimension in spec.space}
    unknown |= dict.fromkeys(spec.seeds.vary, "which differs between the runs of a point")
    unmatched = set(range(len(spec.overrides)))
    for every in (spec, with_every_method(spec)):  # the second is large
        entries = combinations(every) if unmatched else ()
        unmatched -= {i for entry in entries for i in matching_overrides(spec, entry)}
    for i, entry in enumerate(spec.overrides):
        when: Keys = ("overrides", i, "when")
        for name in entry.when:
            if name in unknown:
                yield spec.document.key_error(
                    (*when, name),
                    f"the condition depends on {name}, {unknown[name]}; "
                    "allowed: keys with one value in a cell",
                )
        if i in unmatched and unknown.keys().isdisjoint(entry.when):
            yield spec.document.key_error(
                when,
                "the condition holds in no cell; allowed: values that the grid or fixed has",
            )


def _cell_errors(document: Document, cell: Cell) -> Iterator[SpecError]:
    flat = cell.flat

    def error(key: str, message: str) -> SpecError:
        path = next(
            path
            for path, name in _settings(document)
            if name == key and (path[0] != "overrides" or path[1] == cell.overridden.get(key))
        )
        return document.key_error(path, message)

    if flat["paradigm"] == "ul" and "labelled" in _values_in(cell, "supervision"):
        yield error(
            "supervision",
            f"supervision is labelled in {cell.id}, but paradigm ul has no labelled images; "
            "allowed: paradigm ssl or trzsl, or supervision pseudo",
        )
    other = flat["test_dataset"]
    if flat["paradigm"] == "trzsl" and other not in (None, flat["dataset"]):
        yield error(
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
            yield error(
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


def _search_errors(spec: SweepSpec, search: Search, cells: tuple[Cell, ...]) -> Iterator[SpecError]:
    document = spec.document
    for dimension in search.space:
        if search.sampler == "grid" and dimension.values is None:
            yield document.key_error(
                ("search", "space", dimension.key),
                "sampler grid cannot enumerate a range; "
                "allowed: `values`, or sampler tpe or random",
            )
    if search.sampler == "grid":
        sizes = (math.prod(len(d.values or ()) for d in cell.space) for cell in cells)
        if (size := max(sizes)) > MAX_POINTS:
            yield document.key_error(
                ("search", "space"),
                f"sampler grid enumerates {size:,} combinations of values; allowed: up to "
                f"{MAX_POINTS:,} in a cell, or sampler tpe or random",
            )
    for cell in cells:
        if search.objective == "validation_accuracy" and cell.flat["pool"] != "train":
            yield document.error(
                ("search", "objective"),
                f"the pool of {cell.id} contains the validation images "
                f"(pool: {cell.flat['pool']}); "
                "allowed: mutual_information, or `pool: train` under fixed",
            )
