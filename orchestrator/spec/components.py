"""Describes the components of all registries, for `airsweep components`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from air_core.components import REGISTRIES, Component, Registry
from air_core.specs.flat import trial_keys
from orchestrator.spec._trial_values import value_schema
from orchestrator.spec.marked_yaml import allowed_choices
from orchestrator.spec.schema import allowed_values, yaml_text


@dataclass(frozen=True)
class DescribedSetting:
    """A setting that a component reads."""

    key: str
    default: str
    allowed: str
    help: str


@dataclass(frozen=True)
class Described:
    """A component and the key that names it."""

    key: str
    name: str
    summary: str
    target: str
    settings: Sequence[DescribedSetting]


def described(name: str | None = None) -> list[Described]:
    """All components, or those of a key, or those of a name.

    Raises:
        ValueError: no component and no key has the name.
    """
    every = [
        _described(registry, component)
        for registry in REGISTRIES.values()
        for component in registry.values()
    ]
    found = [one for one in every if name in (None, one.name, one.key)]
    if not found:
        names = dict.fromkeys(name for one in every for name in (one.key, one.name))
        raise ValueError(f"no component is named {name!r}; {allowed_choices(str(name), names)}")
    return found


def _described(registry: Registry, component: Component) -> Described:
    names = sorted(component.reads)
    if component.source:  # it may read all settings of the group
        own = () if component.settings is None else dataclasses.fields(component.settings)
        names = [f"{component.name}.{f.name}" for f in own]
    settings = [_setting(f"{registry.group}.{name}") for name in names]
    return Described(registry.key, component.name, component.summary, component.target, settings)


def _setting(name: str) -> DescribedSetting:
    key, allowed = trial_keys()[name], allowed_values(value_schema(name))
    return DescribedSetting(name, yaml_text(key.default), allowed, key.help)
