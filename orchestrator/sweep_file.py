"""A question as a YAML file: the way in. Messages name file, line, column, key and what is allowed.

All that can be wrong without looking at data or weights is found here. Names of weights are not
resolved, and nothing is known of Ray, Optuna or a store.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from orchestrator import presets
from orchestrator.expressions import compile_when, constants_of, names_of
from orchestrator.marked_yaml import Document, Keys, SpecError, choices, parse, read, shown
from orchestrator.readers import (
    LINE,
    NAME,
    TRIAL_KEYS,
    Reader,
    allowed_keys,
    leaf,
    mapping,
    section,
    trial_keys_at,
    trial_number,
    trial_value,
)
from orchestrator.redact import password_at
from orchestrator.sweep import (
    JOURNAL,
    Budget,
    Cell,
    Dimension,
    EncoderResources,
    GeneratorResources,
    Pruning,
    Resources,
    Search,
    Seeds,
    SweepSpec,
    TrialResources,
    cells_of,
    combinations,
    notes_of,
)
from orchestrator.sweep_lint import lint

__all__ = [
    "Budget",
    "Cell",
    "Dimension",
    "GeneratorResources",
    "Resources",
    "Search",
    "Seeds",
    "SpecError",
    "SweepSpec",
    "TrialResources",
    "cells_of",
    "find_sweep",
    "load_sweep",
    "notes_of",
]

POSTGRES = "postgresql://"

# A LoRA and its images are made from these. To search one would mean new images for every point:
# GPU-hours. A grid has them prepared once.
IMAGES_DEPEND_ON = (
    *("dataset", "backbone", "precision", "paradigm", "shots", "class_seed"),
    *("pool", "pool_size", "pool_ratio", "pool_missing", "leaky_pool"),
    *("initial_labels", "lora", "generator", "generation"),
)


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
    document.mapping(())
    for option in sets:
        _set(document, option)
    spec = _spec(document)
    lint(document, spec)
    return _only(spec, only)


def find_sweep(name_or_path: str) -> Path:
    """A path, as it is; a bare name, from ./sweeps or from the sweeps that come with airsweep."""
    path = Path(name_or_path)
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    here = Path(__file__).parent
    folders = (Path("sweeps"), here / "sweeps", here.parent / "sweeps")
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
    if name == "method" or name in TRIAL_KEYS:
        keys: Keys = ("fixed", name)
    elif head not in TOP:
        raise SpecError(f"{place}: unknown key {name!r}; {allowed_keys(name, TOP)}")
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
            value = trial_value(key)(Document(source=place, value=wanted), ())
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


# ---------------------------------------------------------------- the file, part by part


def _spec(document: Document) -> SweepSpec:
    found = mapping(document, (), TOP, needed=("version", "name"))
    for key in ("grid", "fixed"):
        found.setdefault(key, {})
    if "method" not in {**found["grid"], **found["fixed"]}:
        raise document.error(
            (), f"`method` is needed, under grid or fixed; allowed: {', '.join(presets.METHODS)}"
        )
    found["tracking_uri"] = found.pop("tracking", {}).get("uri")
    return SweepSpec(
        **found, question=_header(document.text), source=document.source, text=document.text
    )


def _version(document: Document, keys: Keys) -> int:
    value = document.at(keys)
    if value != 1 or isinstance(value, bool):
        raise document.error(keys, f"{shown(value)} is not allowed; allowed: 1")
    return 1


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


def _grid(document: Document, keys: Keys) -> dict[str, tuple[Any, ...]]:
    names = trial_keys_at(document, keys)
    return {name: _axis(document, (*keys, name), name) for name in names}


def _fixed(document: Document, keys: Keys) -> dict[str, Any]:
    names = trial_keys_at(document, keys)
    return {name: trial_value(name)(document, (*keys, name)) for name in names}


def _axis(document: Document, keys: Keys, name: str) -> tuple[Any, ...]:
    """Two or more different values of a trial key."""
    values: dict[Any, None] = {}
    for i in range(len(document.items(keys))):
        value = trial_value(name)(document, (*keys, i))
        if value in values:
            raise document.error((*keys, i), f"{shown(value)} stands here twice; allowed: once")
        values[value] = None
    if len(values) == 1:
        raise document.error(
            keys, f"one value is no axis; allowed: two or more, or `{name}` under fixed"
        )
    return tuple(values)


def _exclude(document: Document, keys: Keys) -> tuple[dict[str, Any], ...]:
    grid = _grid(document, ("grid",)) if "grid" in document.value else {}
    entries = []
    for i in range(len(document.items(keys))):
        here = (*keys, i)
        readers = {name: trial_value(name) for name in grid}
        entry = mapping(document, here, readers)
        for name, value in entry.items():
            if value not in grid[name]:
                allowed = choices(value, grid[name])
                raise document.error((*here, name), f"{shown(value)} is not in the grid; {allowed}")
        if not entry:
            raise document.error(
                here, "excludes everything; allowed: a key of the grid and a value"
            )
        entries.append(entry)
    return tuple(entries)


def _space(document: Document, keys: Keys) -> tuple[Dimension, ...]:
    names = trial_keys_at(document, keys)
    if not names:
        raise document.error(keys, "nothing is searched; allowed: a trial key or more")
    rest = [_dimension(document, (*keys, name), name) for name in names]
    ordered: list[Dimension] = []
    while rest:
        waiting = {dimension.key for dimension in rest}
        ready = [d for d in rest if not d.when or not waiting.intersection(names_of(d.when))]
        if not ready:
            raise document.error(
                (*keys, rest[0].key, "when"), "waits for itself; allowed: conditions without a ring"
            )
        ordered.append(ready[0])
        rest.remove(ready[0])
    return tuple(ordered)


def _pruning(document: Document, keys: Keys) -> Pruning | None:
    if document.at(keys) is None:
        return None
    found: Pruning = section(Pruning, rungs=_rungs)(document, keys)
    if found.rule != "halving" and "keep" in document.mapping(keys):
        raise document.key_error(
            (*keys, "keep"), f"unused: {found.rule} asks for no share; allowed: with rule: halving"
        )
    return found


def _storage(document: Document, keys: Keys) -> str:
    where: str = leaf(LINE)(document, keys)
    if where == JOURNAL:
        return where
    if not where.startswith(POSTGRES):
        raise document.error(
            keys, f"no storage of studies; allowed: {JOURNAL}, {POSTGRES}user@host/database"
        )
    _no_password(document, keys, where, "set PGPASSWORD, or write ~/.pgpass")
    return where


def _tracking_uri(document: Document, keys: Keys) -> str:
    uri: str = leaf(LINE)(document, keys)
    remedy = "set MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials"
    _no_password(document, keys, uri, remedy)
    return uri


def _no_password(document: Document, keys: Keys, uri: str, remedy: str) -> None:
    """Refuse a URI with a password, without repeating it."""
    try:
        parts = urlsplit(uri)
        secret = parts.password is not None or "password" in parse_qs(parts.query)
    except ValueError:
        raise document.error(keys, "no address; allowed: scheme://user@host/...") from None
    if secret:
        raise document.error(
            keys, f"has a password, and a sweep file is kept and shown; allowed: none: {remedy}"
        )


def _rungs(document: Document, keys: Keys) -> tuple[int, ...]:
    whole = leaf(int, (("ge", 1),))
    rungs = tuple(whole(document, (*keys, i)) for i in range(len(document.items(keys))))
    if not rungs:
        raise document.error(keys, "nothing is compared; allowed: an iteration or more")
    for i, (before, rung) in enumerate(itertools.pairwise(rungs), 1):
        if rung <= before:
            raise document.error((*keys, i), f"{rung} does not come after {before}; allowed: more")
    return rungs


def _dimension(document: Document, keys: Keys, name: str) -> Dimension:
    _may_be_searched(document, keys, name)
    bound = trial_number(name) or _no_range
    found = mapping(
        document,
        keys,
        {
            "values": lambda document, keys: _axis(document, keys, name),
            **{"min": bound, "max": bound, "log": leaf(bool), "when": _when},
        },
    )
    low, high = found.get("min"), found.get("max")
    if "values" in found and {"min", "max", "log"} & found.keys():
        raise document.key_error(keys, "has values and a range; allowed: `values`, or `min`, `max`")
    if "values" not in found:
        if low is None or high is None:
            raise document.key_error(keys, "allowed: `values`, or both `min` and `max`")
        if low >= high:
            raise document.error((*keys, "max"), f"{high} is not above min; allowed: > {low}")
        if found.get("log") and low <= 0:
            raise document.error((*keys, "min"), f"{low} has no logarithm; allowed with log: > 0")
    return Dimension(key=name, **found)


def _may_be_searched(document: Document, keys: Keys, name: str) -> None:
    problem = may_be_searched(name)
    if problem is not None:
        raise document.key_error(keys, problem)


def may_be_searched(name: str) -> str | None:
    """Why a trial key cannot be searched, with what to do instead; None: it can."""
    if name in ("seed", "split_seed"):
        return "a seed is not searched; allowed: its values under `seeds`"
    if name.partition(".")[0] in IMAGES_DEPEND_ON:
        return f"`{name}` changes the images: put its values under `grid`, or fix it"
    if name in ("method", "modality", "test_dataset"):
        return f"`{name}` names the cell: put its values under `grid`, or fix it"
    return None


def _no_range(document: Document, keys: Keys) -> Any:
    raise document.key_error(keys, f"{keys[-2]} is no number; allowed: `values: [...]`")


# A value of each key, to see whether a comparison has a sense.
TYPICAL = {
    **{name: 1 if key.default is None else key.default for name, key in TRIAL_KEYS.items()},
    **presets.OUTSIDE,
}


def _when(document: Document, keys: Keys) -> str:
    text = leaf(str)(document, keys)
    try:
        names = names_of(text)
        for name in names:
            if name not in TRIAL_KEYS:
                raise ValueError(f"unknown key {name!r}; {allowed_keys(name)}")
        for name, constant in constants_of(text):
            trial_value(name)(Document(source=name, value=constant), ())
        compile_when(text)(TYPICAL)
    except TypeError as error:
        raise document.error(keys, f"compares what has no order: {error}") from None
    except ValueError as error:
        raise document.error(keys, str(error)) from None
    return str(text)


def _seeds(document: Document, keys: Keys) -> Seeds:
    if isinstance(document.at(keys), list):
        return Seeds(values=_seed_values(document, keys, 1))
    if not isinstance(document.at(keys), dict):
        said = f"{shown(document.at(keys))} is not allowed; allowed: a list such as [1, 2, 3]"
        raise document.error(keys, f"{said}, or vary and values")
    found = mapping(document, keys, {"vary": _vary, "values": lambda *_: None}, needed=("values",))
    vary = found.get("vary", Seeds.vary)
    return Seeds(values=_seed_values(document, (*keys, "values"), len(vary)), vary=vary)


def _vary(document: Document, keys: Keys) -> tuple[str, ...]:
    allowed: Any = Literal["seed", "split_seed"]
    vary = [leaf(allowed)(document, (*keys, i)) for i in range(len(document.items(keys)))]
    if len(set(vary)) < len(vary):
        raise document.error(keys, f"{vary[0]} stands here twice; allowed: once")
    return tuple(vary)


def _seed_values(document: Document, keys: Keys, width: int) -> tuple[tuple[int, ...], ...]:
    whole = leaf(int, (("ge", 0),))
    numbers = ", ".join(["a number"] * width)
    values: dict[tuple[int, ...], None] = {}
    for i, item in enumerate(document.items(keys)):
        here = (*keys, i)
        if isinstance(item, list) and len(item) != width:
            raise document.error(here, f"{shown(item)} is not allowed; allowed: [{numbers}]")
        if isinstance(item, list):
            value = tuple(whole(document, (*here, j)) for j in range(width))
        else:
            value = (whole(document, here),) * width
        if value in values:
            raise document.error(here, f"{shown(item)} stands here twice; allowed: once")
        values[value] = None
    return tuple(values)


def _seconds(document: Document, keys: Keys) -> float | None:
    value = document.at(keys)
    units = {"s": 1, "m": 60, "h": 3600}
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", value)
        if not match or float(match[1]) == 0:
            raise document.error(
                keys, f"{shown(value)} is not allowed; allowed: 90s, 30m, 12h, or seconds > 0"
            )
        return float(match[1]) * units[match[2]]
    seconds: float | None = leaf(float | None, (("gt", 0),))(document, keys)
    return seconds


def _custom(document: Document, keys: Keys) -> dict[str, float]:
    """Resources that machines have beside cores and devices, by name."""
    for name in document.mapping(keys):
        if name in ("CPU", "GPU", "cpu", "gpu", "memory", "object_store_memory"):
            raise document.key_error(
                (*keys, name), f"{name} is no custom resource; allowed: `cpu` and `gpu` beside it"
            )
    amount = leaf(float, (("gt", 0),))
    return {name: amount(document, (*keys, name)) for name in document.mapping(keys)}


TOP: dict[str, Reader] = {
    "version": _version,
    "name": leaf(NAME),
    "grid": _grid,
    "exclude": _exclude,
    "fixed": _fixed,
    "search": section(Search, space=_space, pruning=_pruning, storage=_storage),
    "seeds": _seeds,
    "budget": section(Budget, wall=_seconds),
    "resources": section(
        Resources,
        trial=section(TrialResources, timeout=_seconds, custom=_custom),
        generator=section(GeneratorResources, custom=_custom),
        encoder=section(EncoderResources),
        wait=_seconds,
    ),
    "project": leaf(NAME),
    "tracking": lambda document, keys: mapping(document, keys, {"uri": _tracking_uri}),
    "data_root": leaf(LINE),
}
