"""Convert between nested trial specs and flat dotted keys, such as `lora.rank`.

Sweep files, Optuna and MLflow use the flat keys. Imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from air_core.settings import Ref, TrialSettings
from air_core.settings.components import REGISTRIES, Registry, computed_from_registries


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a trial, such as `lora.rank`."""

    name: str
    type: Any  # annotation, for validation
    default: Any
    limits: dict[str, float]
    help: str
    registry: Registry | None = None  # whose components are the values


OWN = "own"  # field of a group with the settings of plugins


@computed_from_registries
@cache
def trial_keys() -> dict[str, Key]:
    """Every trial key by its dotted name: inputs, then the order of TrialSettings, then plugins.

    >>> trial_keys()["lora.rank"].default
    4
    """
    every = [*_keys(TrialSettings, ""), *_plugin_keys()]
    every.sort(key=lambda key: key.name not in REFS)
    return {key.name: key for key in every}


def from_flat(flat: Mapping[str, Any], refs: Mapping[str, Ref]) -> TrialSettings:
    """The settings of dotted keys; missing keys keep their defaults.

    Args:
        flat: dotted key -> validated value; `lora: None` turns LoRA off.
        refs: dataset, backbone and generator, resolved to content.
    """
    return TrialSettings(**{**fields_of(flat), **refs})


def fields_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of TrialSettings that dotted keys set."""
    nested: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if "." in rest:
            own = nested.setdefault(head, {}).setdefault(OWN, ())
            nested[head][OWN] = (*own, (rest, value))
        elif rest:
            nested.setdefault(head, {})[rest] = value
        else:
            plain[head] = value
    groups = {head: settings_groups()[head](**values) for head, values in nested.items()}
    return groups | plain


def to_flat(spec: TrialSettings) -> dict[str, Any]:
    """Dotted keys of a trial; Refs by name.

    >>> digits = Ref(name="digits", digest="d")
    >>> to_flat(TrialSettings(dataset=digits, backbone=digits, generator=digits))["lora.rank"]
    4
    """
    return dict(_flat(spec, TrialSettings, ""))


def _plugin_keys() -> Iterator[Key]:
    for registry in REGISTRIES.values():
        for component in registry.values():
            if component.settings is not None:
                prefix = f"{registry.group}.{component.name}."
                yield from _keys(component.settings, prefix)


def _keys(owner: Any, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(owner)
    for f in dataclasses.fields(owner):
        if f.name == OWN:
            continue
        inner = _settings_in(hints[f.name])
        if inner is Ref:
            yield Key(name=prefix + f.name, type=str, default=None, limits={}, help=REFS[f.name])
        elif inner is not None:
            if type(None) in typing.get_args(hints[f.name]):
                text = f"null: no {f.name}"
                yield Key(name=f.name, type=type(None), default=f.default, limits={}, help=text)
            yield from _keys(inner, f"{prefix}{f.name}.")
        else:
            registry = f.metadata.get("registry")
            yield Key(
                name=prefix + f.name,
                # A Literal, as of the other choices
                type=operator.getitem(Literal, tuple(registry)) if registry else hints[f.name],
                default=f.default,
                limits=f.metadata.get("limits", {}),
                help=registry.summary() if registry else f.metadata.get("help", ""),
                registry=registry,
            )


REFS = {
    "dataset": "target images, by name",
    "test_dataset": "another dataset to test the prompt on, with its class names; null: the same",
    "backbone": "tiny, an open_clip folder, <architecture>/<tag> or <architecture>@<file>",
    "generator": "tiny, a diffusers folder, owner/name of the hub, or folder:<path> of images",
}


@cache  # evaluating annotations is slow
def settings_groups() -> dict[str, Any]:
    """The dataclass of each group of settings, such as `lora`."""
    found = {
        name: _settings_in(hint) for name, hint in typing.get_type_hints(TrialSettings).items()
    }
    return {name: kind for name, kind in found.items() if kind not in (None, Ref)}


def _settings_in(hint: Any) -> Any:
    """The dataclass in an annotation such as `LoraSettings | None`; None if there is none."""
    return next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None)


def _flat(spec: Any, kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(kind):
        value = getattr(spec, f.name)
        if isinstance(value, Ref):
            yield prefix + f.name, value.name
        elif f.name == OWN:
            yield from ((prefix + name, own) for name, own in value)
        elif dataclasses.is_dataclass(value):
            yield from _flat(value, value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value
