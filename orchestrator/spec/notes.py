"""Sentences about allowed but surprising settings of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from air_core.methods import METHODS
from air_core.settings.flat import trial_keys
from orchestrator.spec import presets
from orchestrator.spec.cells import (
    ID_KEYS,
    Cell,
    cell_at,
    cells_of,
    combinations,
    computation_of,
    is_defined,
    matching_overrides,
)
from orchestrator.spec.sweep import SMOKE_ONLY, SweepSpec


def notes_of(spec: SweepSpec, cells: Sequence[Cell] | None = None) -> tuple[str, ...]:
    """Sentences about allowed but surprising settings, for `airsweep plan` and `run`.

    Args:
        cells: the result of `cells_of`, if the caller has it already.
    """
    return tuple(_notes(spec, cells_of(spec) if cells is None else cells))


def _notes(spec: SweepSpec, cells: Sequence[Cell]) -> Iterator[str]:
    yield from [spec.options] if spec.options else []
    every = list(combinations(spec))
    of_grid = [cell_at(spec, entry) for entry in every]
    skipped = [cell for cell in of_grid if not is_defined(cell)]
    if skipped:
        names = sorted({cell.method for cell in skipped})
        yield f"{', '.join(names)}: no cells with paradigm ul, which has no labelled images"
    if len(cells) < (total := len(every) - len(skipped)):
        yield f"{total} combinations of the grid are {len(cells)} different cells"
    if spec.is_smoke:
        yield SMOKE_ONLY
    if any(presets.tests_setup_only(cell.flat["backbone"], cell.flat["dataset"]) for cell in cells):
        yield presets.SETUP_ONLY
    has_fewer = any(spec.grid.get(key, values) != values for key, values in spec.axes.items())
    if has_fewer or spec.is_smoke:  # the cells and rounds that are left out may use a key
        return
    for key, value in spec.fixed.items():
        is_used = _is_used(cells, key, value)
        yield from _key_notes(f"fixed.{key}", key, spec.methods, is_used)
    chosen = {*ID_KEYS}.union(*(cell.chosen for cell in cells))
    for key, values in spec.grid.items():
        is_used = len(values) == 1 or key in chosen
        yield from _key_notes(f"grid.{key}", key, spec.methods, is_used)
    for i, override in enumerate(spec.overrides):
        if not any(i in matching_overrides(spec, entry) for entry in every):
            yield f"overrides[{i}] applies to no cell: its condition never holds"
        for key in override.set:
            methods = {cell.method: None for cell in of_grid if cell.overridden.get(key) == i}
            yield from _key_notes(f"overrides[{i}].set.{key}", key, list(methods), True)
    searched = {(cell.method, dimension.key) for cell in cells for dimension in cell.space}
    for key in (each.key for each in spec.space):
        names = [n for n in {c.method: None for c in cells} if (n, key) not in searched]
        if names:
            why = "pinned, without effect, or a bound"
            yield f"search.space.{key} is not searched with {', '.join(names)}: {why}"


def _key_notes(place: str, key: str, methods: Sequence[str], is_used: bool) -> Iterator[str]:
    """A note if methods pin a key to a value other than 0, or if every method pins it, or if no
    cell uses it."""
    pins = {name: METHODS[name].pins[key] for name in methods if key in METHODS[name].pins}
    surprising = list(pins) if len(pins) == len(methods) else [name for name in pins if pins[name]]
    if surprising:
        yield f"{place} does not apply to {', '.join(surprising)}: the method pins it"
    elif not is_used:
        remedy = "remove it, or use methods and settings with which it has an effect"
        yield f"{place}: no cell uses it; allowed: {remedy}"


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
