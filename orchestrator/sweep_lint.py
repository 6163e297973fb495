"""What a sweep file may say word by word and cannot mean: found before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from orchestrator import presets
from orchestrator.expressions import look_up, names_of
from orchestrator.marked_yaml import Document, Keys, SpecError, choices, shown
from orchestrator.sweep import (
    Cell,
    Search,
    SweepSpec,
    cells_of,
    combinations,
    fits,
    unlabelled,
)

MAX_CELLS = 10_000


def lint(document: Document, spec: SweepSpec) -> None:
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
