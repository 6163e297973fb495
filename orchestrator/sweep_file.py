"""A question as a YAML file: the way in. Messages name file, line, column, key and what is allowed.

All that can be wrong without looking at data or weights is found here. Names of weights are not
resolved, and nothing is known of Ray, Optuna or a store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from orchestrator import presets
from orchestrator.marked_yaml import Document, Keys, SpecError, choices, parse, read, shown
from orchestrator.redact import password_at
from orchestrator.sweep import (
    THREE_SEEDS,
    Budget,
    Resources,
    Search,
    SeedEntries,
    Seeds,
    SweepSpec,
    combinations,
    without_password,
)
from orchestrator.sweep_lint import lint
from orchestrator.trial_values import (
    TRIAL_NAMES,
    Axes,
    Settings,
    value_type,
)
from orchestrator.validation import (
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
    uri: Annotated[
        LINE, without_password("set MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials")
    ] = setting(None, "http(s)://..., sqlite:///..., none")


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

    It knows keys, types, limits and words. What a file cannot mean (`sweep_lint`, pinned keys,
    twice the same value) only `airsweep validate` finds.
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
