"""docs/spec_reference.md: the schema of a sweep file as a page. `make golden` writes it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator import presets
from orchestrator.sweep_file import sweep_schema
from orchestrator.trial_values import TRIAL_NAMES, why_not_searched
from orchestrator.validation import Schema, plain, words

HEAD = """\
# Sweep files: every key

*Written by `make golden` from the schema that `airsweep schema` prints; not edited by hand.*

A sweep file is one question in YAML; [tutorial.md](tutorial.md) shows how one grows. A mistake is a
message with line, column, what is allowed and what you probably meant. An editor that has
yaml-language-server says so while you type, with the schema in a file beside it:

```
airsweep schema > airsweep.schema.json
```

and its name in the first line of the sweep file:

```yaml
# yaml-language-server: $schema=airsweep.schema.json
```

The comment that the file opens with is the question: MLflow shows it above the table. Numbers are
read as people mean them (`1e-4` is a number). Keys with a dot stand as they are: `lora.rank: 4`.
"""

SEARCHED = """\
A dimension has `values`, or `min` and `max` where the key has numbers (`log: true`: evenly on a
logarithmic scale), and maybe `when`, a condition on other keys such as `images_per_class > 0`.
A search may use every setting below but seeds, names of the cell and what changes the images; these
stand under `grid`. Not searched:"""

TRIAL = """\
These stand under `grid` (a list), `fixed` (a value), `exclude` and `search.space`. Precedence:
default < world < method < `fixed` < `grid` < `search.space`. `airsweep plan SPEC --explain` prints
the value of each in every cell, and where it comes from."""

WORLDS = """\
Defaults above are those of Stable Diffusion 1.5 and CLIP ViT-B/32. With the embedded models and the
digits these hold instead:"""

METHODS = """\
What a method pins defines it and cannot be overridden; other settings are free."""

SEEDS = """\
`[1, 2, 3]` runs each point three times, with these values of `seed`. To vary more than one,
`{values: [[1, 301], [2, 302]], vary: [seed, split_seed]}`; a plain number there is for all. Every
`split_seed` is another pool, with a LoRA and images of its own."""


def reference() -> str:
    """The page, the same bytes for the same code."""
    schema = sweep_schema()
    settings = schema["properties"]["fixed"]["properties"]
    blocks = [HEAD.rstrip(), "## Parts of a file", _keys(_rows(schema, ""))]
    blocks += ["### `seeds`", SEEDS, "### `search.space`", SEARCHED, _not_searched()]
    blocks += ["## Settings of a trial", TRIAL]
    blocks += [_keys((name, found) for name, found in settings.items())]
    blocks += ["## Defaults of the small world", WORLDS, _worlds()]
    blocks += ["## Methods", METHODS, _methods()]
    return "\n\n".join(blocks) + "\n"


def _rows(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Each key of a file with its schema; those of trial keys stay closed."""
    for name, found in schema["properties"].items():
        inner = next((one for one in [found, *found.get("anyOf", [])] if "properties" in one), None)
        if inner is None or name in ("grid", "fixed", "space", "seeds"):
            yield f"{path}{name}", found
        else:
            yield from _rows(inner, f"{path}{name}.")


def _keys(rows: Iterable[tuple[str, Schema]]) -> str:
    lines = [
        [
            f"`{name}`",
            f"`{plain(found['default'])}`" if "default" in found else "",
            words(found),
            found["description"].replace("<", "\\<"),  # else a tag of HTML
        ]
        for name, found in rows
    ]
    return _table(("key", "default", "values", "what"), lines)


def _not_searched() -> str:
    names = dict.fromkeys(name.partition(".")[0] for name in TRIAL_NAMES if why_not_searched(name))
    return "\n".join(textwrap.wrap(", ".join(f"`{name}`" for name in names) + ".", 100))


def _worlds() -> str:
    lines = [
        [f"`{key}: {value}`", _several(settings)]
        for (key, value), settings in presets.WORLDS.items()
    ]
    lines += [
        [f"`{key}: {value}` and `method: {name}`", _several(settings)]
        for (key, value, name), settings in presets.METHOD_WORLDS.items()
    ]
    return _table(("where", "default"), lines)


def _methods() -> str:
    lines = [
        [
            f"`{name}`",
            _several(method.pins),
            _several(method.sets),
            f"`{method.host}`" if method.host else "",
            f"`{method.control}`" if method.control else "",
            ", ".join(method.paradigms),
        ]
        for name, method in presets.METHODS.items()
    ]
    header = ("method", "pins", "other defaults", "compared with", "control", "paradigms")
    return _table(header, lines)


def _several(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {plain(value)}`" for key, value in settings.items())


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    # A bar ends a cell, in code too.
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [list(header), ["---"] * len(header), *safe]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
