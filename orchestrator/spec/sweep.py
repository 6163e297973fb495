"""The parts of a sweep file as dataclasses, from which its schema is made."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from air_core.settings.flat import trial_keys
from orchestrator.components import SAMPLERS
from orchestrator.plugins import Plugin
from orchestrator.spec import presets
from orchestrator.spec._trial_values import (
    Dimension,
    axes_schema,
    condition_schema,
    read_settings,
    read_space,
    read_values,
    settings_schema,
    space_schema,
)
from orchestrator.spec.marked_yaml import Document, Keys, SpecError
from orchestrator.spec.resources import Resources
from orchestrator.spec.schema import (
    LINE,
    NAME,
    Schema,
    list_schema,
    object_schema,
    schema_of,
    setting,
)

# ---------------------------------------------------------------- parts of a sweep file


@dataclass(frozen=True, kw_only=True)
class Search:
    """The hyperparameter search of each cell."""

    sampler: str = setting(
        "tpe", SAMPLERS.summary(), lambda: {"enum": [*SAMPLERS], "type": "string"}
    )
    seed: int = setting(0, "seed of the sampler", minimum=0, maximum=2**32 - 1)
    objective: Literal["mutual_information", "validation_accuracy"] = setting(
        "mutual_information", "the maximized metric; mutual_information needs no labels"
    )
    points: int = setting(MISSING, "points per cell, over all runs of the sweep", minimum=1)
    width: int = setting(4, "points per round", minimum=1)
    space: tuple[Dimension, ...] = setting(
        MISSING, "the searched keys, each with values or a range", space_schema, read_space
    )


SEED: Schema = {"type": "integer", "minimum": 0}
SEED_ENTRIES = list_schema({"anyOf": [SEED, list_schema(SEED)]}, uniqueItems=True)
VARIED = list_schema(
    schema_of(Literal["seed", "split_seed", "class_seed", "generation.seed"]), uniqueItems=True
)


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Each point runs once per entry of `values`; an entry has one number per key of `vary`."""

    values: tuple[tuple[int, ...], ...] = setting(MISSING, "the seeds of each run", SEED_ENTRIES)
    vary: tuple[str, ...] = setting(
        ("seed",), "the varied keys; a list in `values` has one number for each of them", VARIED
    )

    def assignments(self) -> tuple[dict[str, int], ...]:
        """The settings of each run of a point.

        >>> Seeds(values=((1, 1), (2, 2)), vary=("seed", "split_seed")).assignments()[1]
        {'seed': 2, 'split_seed': 2}
        """
        return tuple(dict(zip(self.vary, value, strict=False)) for value in self.values)


THREE_SEEDS = Seeds(values=((1,), (2,), (3,)))


def _read_seeds(given: Any) -> Seeds:
    """Expand the short forms: a list is `values`; a single number applies to every varied key."""
    parts = {"values": given} if isinstance(given, list) else given
    vary = tuple(parts.get("vary", Seeds.vary))
    entries = [each if isinstance(each, list) else [each] * len(vary) for each in parts["values"]]
    return Seeds(values=tuple(map(tuple, entries)), vary=vary)


def _seeds_schema() -> Schema:
    title = "a list such as [1, 2, 3], or `values` and `vary`"
    return {"anyOf": [SEED_ENTRIES, object_schema(Seeds)], "title": title}


@dataclass(frozen=True, kw_only=True)
class Override:
    """Settings of the cells in which a condition holds."""

    when: dict[str, tuple[Any, ...]] = setting(
        MISSING,
        "settings that a cell has without overrides, such as `{dataset: dtd}`; of a list such as "
        "`{dataset: [dtd, cub]}` one value",
        condition_schema,
        read_values,
    )
    set: dict[str, Any] = setting(
        MISSING,
        "settings of these cells; they do not override keys that a method pins",
        lambda: settings_schema(trial_keys()),
        read_settings,
    )


def split_name(name: str) -> tuple[str, str]:
    """What is before the path in the name of a dataset or model, and the path.

    >>> split_name("folder:photos"), split_name("ViT-B-32@clip.pt"), split_name("models/clip")
    (('folder:', 'photos'), ('ViT-B-32@', 'clip.pt'), ('', 'models/clip'))
    >>> split_name("ViT-L-14/openai@clip.pt")
    ('ViT-L-14/openai@', 'clip.pt')
    """
    match = re.match(r"folder:|[^/@.~][^/@]*(/[^/@]+)?@", name)
    before = match[0] if match else ""
    return before, name.removeprefix(before)


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep: a grid of settings, a search in each cell, and seeds.

    The keys of a sweep file, then what is known of the file and the options.
    """

    name: str = setting(MISSING, "name of the sweep in the store and in commands", NAME)
    grid: dict[str, tuple[Any, ...]] = setting(
        dict,
        "lists of values; each combination is a cell; the first key varies slowest",
        axes_schema,
        read_values,
    )
    exclude: tuple[dict[str, Any], ...] = setting(
        (),
        "combinations of the grid to leave out, as keys with a value each",
        lambda: list_schema(settings_schema(minProperties=1)),
        lambda entries: tuple(map(read_settings, entries)),
    )
    fixed: dict[str, Any] = setting(
        dict,
        "settings of every cell; they do not override keys that a method pins",
        settings_schema,
        read_settings,
    )
    overrides: tuple[Override, ...] = setting(
        (), "settings of the cells in which a condition holds; of several, the last one counts"
    )
    search: Search | None = setting(
        None,
        "a hyperparameter search in each cell; without it, a cell is a single point",
        lambda: object_schema(Search),
    )
    seeds: Seeds = setting(
        THREE_SEEDS,
        "each point runs once per seed; default: [1, 2, 3]",
        _seeds_schema,
        _read_seeds,
    )
    resources: Resources = setting(
        Resources(), "resources on the cluster; they do not change results"
    )
    project: str | None = setting(
        None,
        "the MLflow experiment is air/<project>; default: $AIRSWEEP_PROJECT, else `default`",
        NAME,
    )
    plugins: tuple[Plugin, ...] = setting(
        (),
        "code with components of your own: .py files beside this file",
        {"type": "array", "items": LINE},
        lambda names: (),  # `load_sweep` reads their code
    )
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the grid before --only
    question: str = ""  # the comment at the top of the file
    options: str = ""  # from `options_text`
    source: str = ""  # the path of the file, as given
    text: str = ""
    worlds: presets.Worlds = field(default_factory=lambda: presets.WORLDS, repr=False)
    relative_names: frozenset[str] = frozenset()  # of data and models; relative to the file
    document: Document = field(
        default_factory=partial(Document, source=""), repr=False, compare=False
    )

    @property
    def folders(self) -> dict[str, str]:
        """Names with a relative path, and the same names with the path from the working directory.

        Empty if the file is in the working directory. Paths in options are relative to that. A
        model such as `a/b` is a path if the folder exists, else a name of open_clip or the hub.
        """
        located: dict[str, str] = {}
        at = os.path.dirname(self.source)
        for name in self.relative_names if at else ():
            before, path = split_name(name)
            there = os.path.normpath(os.path.join(at, path))
            if before or path.startswith(".") or path.count("/") > 1 or os.path.isdir(there):
                located[name] = before + there
        return located

    @property
    def is_smoke(self) -> bool:
        """Whether this is a `smoke_variant`."""
        return SMOKE.items() <= self.fixed.items()

    @property
    def methods(self) -> tuple[str, ...]:
        return self.grid.get("method") or (self.fixed["method"],)

    @property
    def space(self) -> tuple[Dimension, ...]:
        return self.search.space if self.search else ()

    def sets_gpu(self, process: str) -> bool:
        """Whether the file or an option sets the GPUs of a process, if only to 0."""
        given = self.document.section(("resources", process))
        return "gpu" in given or bool(getattr(self.resources, process).gpu)

    def error(self, key: str, value: Any, message: str) -> SpecError:
        """An error about a trial key that has this value in a cell, at its position in the file."""
        values = (self.axes or self.grid).get(key, ())
        places: list[Keys] = [("grid", key, i) for i, v in enumerate(values) if v == value]
        places += [
            ("overrides", i, "set", key)
            for i, entry in enumerate(self.overrides)
            if key in entry.set and entry.set[key] == value
        ]
        places += [("search", "space", key), ("fixed", key)]
        keys = next((keys for keys in places if keys in self.document.positions), ())
        return self.document.error(keys, message)


def option_words(sets: Iterable[str], only: Iterable[str], smoke: bool) -> list[str]:
    """The options of a sweep request, as words of a command line.

    >>> option_words(["seeds=[1]"], ["method=air"], smoke=True)
    ['--set', 'seeds=[1]', '--only', 'method=air', '--smoke']
    """
    pairs = [("--set", each) for each in sets] + [("--only", each) for each in only]
    return [word for pair in pairs for word in pair] + (["--smoke"] if smoke else [])


def options_text(sets: Sequence[str], only: Sequence[str]) -> str:
    """How options changed a sweep file; empty without options.

    >>> options_text(["seeds=[1]"], [])
    "the sweep file with --set 'seeds=[1]'"
    """
    words = shlex.join(option_words(sets, only, smoke=False))
    left_out = "; its other cells are left out" if only else ""
    return f"the sweep file with {words}{left_out}" if words else ""


SMOKE: dict[str, Any] = {
    "iterations": 1,
    "images_per_class": 8,
    "evidence.images": 32,  # the errors of a whole pool may take hours
    "evidence.block": 32,  # whole blocks are scored
    "lora.steps": 2,
    "lora.passes": None,
    "train.steps": 10,  # a step of a few milliseconds is measured only over several
}
SMOKE_ONLY = "a smoke run tests the set-up only: its numbers mean nothing"


def smoke_variant(spec: SweepSpec) -> SweepSpec:
    """A quick variant of a sweep: two points of a search, one seed, one iteration, 8 images per
    class, evidence of 32 pool images."""
    grid = {key: values for key, values in spec.grid.items() if key not in SMOKE}
    space = tuple(dimension for dimension in spec.space if dimension.key not in SMOKE)
    search = spec.search and replace(spec.search, points=min(2, spec.search.points), space=space)
    seeds = replace(spec.seeds, values=spec.seeds.values[:1])
    exclude = tuple(entry for entry in spec.exclude if not entry.keys() & SMOKE.keys())
    overrides = tuple(
        replace(entry, set={key: value for key, value in entry.set.items() if key not in SMOKE})
        for entry in spec.overrides
        if entry.set.keys() - SMOKE.keys()
    )
    return replace(
        spec,
        grid=grid,
        exclude=exclude,
        overrides=overrides,
        fixed={**spec.fixed, **SMOKE},
        search=search,
        seeds=seeds,
    )
