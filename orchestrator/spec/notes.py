"""Sentences about allowed but surprising settings of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from air_core.methods import METHODS
from air_core.specs.flat import trial_keys
from orchestrator.spec import presets
from orchestrator.spec.cells import (
    ID_KEYS,
    Cell,
    cell_at,
    cells_of,
    combinations,
    computation_of,
    flat_settings,
    is_defined,
    matching_overrides,
)
from orchestrator.spec.sweep import SMOKE, SMOKE_ONLY, SweepSpec


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
    of_grid = [cell_at(spec, entry) for entry in every]
    for i, override in enumerate(spec.overrides if is_whole else ()):
        for key in override.set:
            methods = {cell.method: None for cell in of_grid if cell.overridden.get(key) == i}
            yield from _pinned_notes(f"overrides[{i}].set.{key}", key, list(methods))
        if not any(i in matching_overrides(spec, entry) for entry in every):
            yield f"overrides[{i}] applies to no cell: its condition never holds"
    skipped = [cell for cell in of_grid if not is_defined(cell)]
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
    if any(key in ID_KEYS for key in axes):  # listing the cells takes time
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
    used = {*ID_KEYS}.union(*(cell.chosen for cell in cells))
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
        found = {computation_of(flat_settings(spec, {**given, key: value})) for value in several}
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
