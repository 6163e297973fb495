"""The cells of a sweep: combinations of its grid, each with every setting.

Combinations that compute the same are one cell.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from air_core.methods import METHODS, named_refs
from air_core.settings import TrialSettings
from air_core.settings.components import computed_from_registries
from air_core.settings.flat import from_flat, trial_keys
from air_core.settings.normal import normalised
from orchestrator.formatting import own_name
from orchestrator.keys import digest
from orchestrator.spec import presets
from orchestrator.spec._trial_values import Dimension
from orchestrator.spec.marked_yaml import SpecError
from orchestrator.spec.sweep import SweepSpec


@dataclass(frozen=True, kw_only=True)
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

    Each has its id, and of equal ones the first is kept, without the keys of the grid that do not
    change its computation.

    Raises:
        SpecError: no cell is left, because no method fits its paradigm.
    """
    known: dict[Any, tuple[Cell, Any]] = {}

    def at(combination: dict[str, Any]) -> tuple[Cell, Any]:
        """The cell of a combination of the grid, also an excluded one, and what it computes."""
        key = _hashable(combination)
        if key not in known:
            cell = cell_at(spec, combination)
            known[key] = cell, (cell.method, _computation(cell))
        return known[key]

    def matters(combination: dict[str, Any], key: str) -> bool:
        others = ({**combination, key: other} for other in (spec.axes or spec.grid)[key])
        return key in ID_KEYS or any(at(other)[1] != at(combination)[1] for other in others)

    distinct: dict[Any, tuple[Cell, dict[str, Any]]] = {}
    for combination in combinations(spec):
        cell, computed = at(combination)
        if is_defined(cell):
            distinct.setdefault(computed, (cell, combination))
    if not distinct:
        raise SpecError(f"{spec.source}: {needs_labels_message(spec.methods)}")
    cells: dict[str, Cell] = {}
    for cell, combination in distinct.values():
        chosen = {key: v for key, v in cell.chosen.items() if matters(combination, key)}
        named = replace(cell, chosen=chosen, id=_id(cell, chosen))
        # Two values can give the same file name (a/b, a-b). Some file systems ignore case.
        if named.id.lower() in cells:
            named = replace(named, id=f"{named.id}-{_short_digest(cell.method, chosen)}")
        cells[named.id.lower()] = named
    return tuple(cells.values())


def needs_labels_message(methods: Sequence[str]) -> str:
    """The message for a sweep in which no method fits any paradigm."""
    names = ", ".join(methods)
    return (
        f"paradigm ul has no labelled images, and {names} cannot be trained "
        "without them; allowed: paradigm ssl or trzsl"
    )


def is_defined(cell: Cell) -> bool:
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


def matching_overrides(spec: SweepSpec, combination: dict[str, Any]) -> list[int]:
    """The entries of `overrides` whose condition holds for a combination of the grid."""
    if not spec.overrides:
        return []
    given = {**spec.fixed, **combination}
    values = {"lora": True, **flat_settings(spec, given), "method": given["method"]}
    return [
        i
        for i, entry in enumerate(spec.overrides)
        if all(values.get(key) in wanted for key, wanted in entry.when.items())
    ]


_DEFAULTS = {name: key.default for name, key in trial_keys().items() if name != "lora"}


def flat_settings(spec: SweepSpec, given: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a cell, without the varied seeds, from the settings of the file."""
    method = given["method"]
    flat = {**_DEFAULTS, **presets.defaults(method, given, spec.worlds)}
    left_out = {"method", *METHODS[method].pins}
    flat |= {key: value for key, value in given.items() if key not in left_out}
    if flat.pop("lora", True) is None:  # LoRA is off: the lora.* settings do not apply
        flat = {key: value for key, value in flat.items() if not key.startswith("lora.")}
        flat["lora"] = None
    for key in spec.seeds.vary:
        del flat[key]
    return flat


def cell_at(spec: SweepSpec, combination: dict[str, Any]) -> Cell:
    """The cell of a combination of the grid, without an id."""
    overridden = {
        key: i for i in matching_overrides(spec, combination) for key in spec.overrides[i].set
    }
    overrides = {key: spec.overrides[i].set[key] for key, i in overridden.items()}
    given = {**spec.fixed, **overrides, **combination}
    method = given["method"]
    flat = flat_settings(spec, given)
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


ID_KEYS = ("dataset", "paradigm", "modality", "method")


def _id(cell: Cell, chosen: dict[str, Any]) -> str:
    words = [own_name({**cell.flat, "method": cell.method}[key]) for key in ID_KEYS]
    words += [
        f"{key.rpartition('.')[2]}={_id_word(value)}"
        for key, value in chosen.items()
        if key not in ID_KEYS
    ]
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", "-".join(words))
    return name if len(name) <= 100 else f"{name[:90]}-{_short_digest(cell.method, chosen)}"


def _id_word(value: Any) -> str:
    words = {None: "off", True: "on", False: "off"}
    return words[value] if value is None or isinstance(value, bool) else own_name(str(value))


def _short_digest(method: str, chosen: dict[str, Any]) -> str:
    return digest({"method": method, **chosen})[:8]
