"""Describes the components of all registries, for `airsweep components`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from air_core.settings.components import REGISTRIES, Component, Registry
from air_core.settings.flat import trial_keys
from orchestrator.spec._trial_values import value_schema
from orchestrator.spec.marked_yaml import allowed_choices
from orchestrator.spec.schema import allowed_values, yaml_text


def component_lines(name: str | None = None) -> Iterator[str]:
    """All components by key, or those of a key, or those of a name, with their settings.

    Raises:
        ValueError: no component and no key has the name.
    """
    names = dict.fromkeys(word for key, one in REGISTRIES.items() for word in (key, *one))
    if name not in (None, *names):
        raise ValueError(f"no component is named {name!r}; {allowed_choices(str(name), names)}")
    for key, registry in REGISTRIES.items():
        listed = [one for one in registry.values() if name in (None, key, one.name)]
        width = max((len(one.name) for one in listed), default=0)
        yield from [key] if listed else []
        for one in listed:
            yield f"  {one.name:<{width}}  {one.summary}"
            if one.name == name:
                yield from (f"  {'':<{width}}  {line}" for line in _details(registry, one))


def _details(registry: Registry, component: Component) -> Iterator[str]:
    """The module that defines a component, and the settings that it reads."""
    yield f"in {component.target}"
    names = sorted(component.reads)
    if component.source:  # it may read all settings of the group
        own = () if component.settings is None else dataclasses.fields(component.settings)
        names = [f"{component.name}.{f.name}" for f in own]
    for name in names:
        key = trial_keys()[f"{registry.group}.{name}"]
        allowed = allowed_values(value_schema(key.name))
        yield f"{key.name}: {yaml_text(key.default)}  ({allowed}) {key.help}"
