"""Checks of settings that are valid on their own but contradict each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from air_core.methods import METHODS
from air_core.settings.flat import trial_keys
from orchestrator.spec._trial_values import trial_names, value_schema
from orchestrator.spec.cells import MAX_POINTS, Cell, cells_of, combinations, needs_labels_message
from orchestrator.spec.marked_yaml import (
    Document,
    Keys,
    SpecError,
    allowed_choices,
    dotted_path,
    short_value,
)
from orchestrator.spec.schema import error_message
from orchestrator.spec.sweep import Search, Seeds, SweepSpec

MAX_CELLS = 10_000


def conflicting_keys(document: Document) -> Iterator[SpecError]:
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


def contradictions(spec: SweepSpec) -> Iterator[SpecError]:
    """Settings that are valid on their own but contradict each other."""
    document = spec.document
    seeds = [*_seed_errors(document, spec.seeds)]
    yield from seeds
    if seeds:
        return
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
    try:
        cells = cells_of(spec)
    except SpecError:
        part = "grid" if "method" in spec.grid else "fixed"
        yield document.error((part, "method"), needs_labels_message(spec.methods))
        return
    for cell in cells:
        yield from _cell_errors(document, cell)
    if spec.search:
        yield from _search_errors(spec, spec.search, cells)


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
    for i, entry in enumerate(spec.overrides):
        for name in unknown.keys() & entry.when.keys():
            yield spec.document.key_error(
                ("overrides", i, "when", name),
                f"the condition depends on {name}, {unknown[name]}; "
                "allowed: keys with one value in a cell",
            )


def _seed_errors(document: Document, seeds: Seeds) -> Iterator[SpecError]:
    path: Keys = ("seeds", "values") if document.section(("seeds",)) else ("seeds",)
    earlier: set[tuple[int, ...]] = set()
    for i, entry in enumerate(seeds.values):
        if len(entry) != len(seeds.vary):
            numbers = ", ".join(["a number"] * len(seeds.vary))
            yield document.error((*path, i), f"{[*entry]} is not allowed; allowed: [{numbers}]")
            continue
        named = dict(zip(seeds.vary, entry, strict=True))
        for name, number in named.items():
            if problem := error_message(value_schema(name), number):
                yield document.error((*path, i), f"{name}: {problem}")
        # Tables distinguish runs by the other seeds.
        run = tuple(number for name, number in named.items() if name != "generation.seed")
        if run in earlier:
            yield document.error(
                (*path, i),
                "the same seeds are listed twice; allowed: once (generation.seed alone does not "
                "make another run)",
            )
        earlier.add(run)


def _cell_errors(document: Document, cell: Cell) -> Iterator[SpecError]:
    flat = cell.flat

    def error(key: str, message: str) -> SpecError:
        path = next(
            path
            for path, name in _settings(document)
            if name == key and (path[0] != "overrides" or path[1] == cell.overridden.get(key))
        )
        return document.key_error(path, message)

    if flat["paradigm"] == "ul" and flat["supervision"] == "labelled":
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


def _search_errors(spec: SweepSpec, search: Search, cells: tuple[Cell, ...]) -> Iterator[SpecError]:
    document = spec.document
    for dimension in search.space:
        path: Keys = ("search", "space", dimension.key)
        if dimension.min is not None and dimension.max is not None:
            if dimension.min >= dimension.max:
                message = f"{dimension.max} is not greater than min; allowed: > {dimension.min}"
                yield document.error((*path, "max"), message)
            elif dimension.log and dimension.min <= 0:
                message = f"{dimension.min} has no logarithm; allowed with `log: true`: > 0"
                yield document.error((*path, "min"), message)
        if search.sampler == "grid" and dimension.values is None:
            yield document.key_error(
                path,
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
