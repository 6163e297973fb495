"""Normalise trial specs: reset settings that cannot change a result, so that keys are equal.

Imports the standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, TypeVar, cast

from air_core.settings import LoraSettings, Ref, TrialSettings
from air_core.settings.components import (
    DATASETS,
    REGISTRIES,
    Own,
    Registry,
    computed_from_registries,
)
from air_core.settings.conditions import reads_lora_images
from air_core.settings.flat import settings_groups

Condition = Callable[[TrialSettings], bool]


S = TypeVar("S", bound=TrialSettings)


def normalised(spec: S) -> S:
    """The same computation, with all settings that cannot change its result at their defaults."""
    return cast(S, _normalised(spec))


@computed_from_registries
@lru_cache(maxsize=4096)  # a plan normalises each trial twice
def _normalised(spec: TrialSettings) -> TrialSettings:
    reset = _with_unused_reset(_with_equal_results(spec))
    return spec if reset == spec else _normalised(reset)


def _with_unused_reset(spec: TrialSettings) -> TrialSettings:
    """Reset the fields whose conditions in `air_core.settings`, or components, do not use them."""
    changes: dict[str, dict[str, Any]] = {}
    for rule in rules():
        settings = getattr(spec, rule.group) if rule.group else spec
        if settings is None or getattr(settings, rule.name) == rule.unused:
            continue
        if not rule.used_if(spec):
            changes.setdefault(rule.group, {})[rule.name] = rule.unused
    own = changes.pop("", {})
    groups = {name: replace(getattr(spec, name), **values) for name, values in changes.items()}
    return replace(spec, **groups | own) if groups or own else spec


@dataclass(frozen=True)
class Rule:
    """A field that cannot change a result if its condition is not met."""

    group: str  # field of TrialSettings, empty for its own fields
    name: str
    used_if: Condition
    unused: Any


@computed_from_registries
@cache
def rules() -> tuple[Rule, ...]:
    """One rule for each field with a condition, or that only some components read."""
    found = []
    for group, owner in {"": TrialSettings, **settings_groups()}.items():
        readers = [one for one in REGISTRIES.values() if one.group == group]
        for f in dataclasses.fields(owner):
            conditions = [f.metadata["used_if"]] if "used_if" in f.metadata else []
            conditions += [_reader(one, f.name) for one in readers if f.name in one.conditional]
            unused = f.metadata.get("unused", f.default)
            found += [Rule(group, f.name, condition, unused) for condition in conditions]
    return tuple(found)


def _reader(registry: Registry, name: str) -> Condition:
    """Whether the component that a trial names reads a setting."""
    return lambda spec: name in registry[chosen(registry, spec)].reads


def chosen(registry: Registry, spec: TrialSettings) -> str:
    """The component of a registry that a trial names."""
    found = attrgetter(registry.key)(spec)
    return str(found.name if isinstance(found, Ref) else found)


def used_components(spec: TrialSettings) -> tuple[tuple[Registry, str], ...]:
    """The registries that a trial uses, with the names of their components."""
    used = [
        (registry, chosen(registry, spec))
        for registry, conditions in _conditions()
        if all(used_if(spec) for used_if in conditions)
    ]
    if spec.test_dataset is not None:
        used.append((DATASETS, spec.test_dataset.name))
    return tuple(used)


@computed_from_registries
@cache
def _conditions() -> tuple[tuple[Registry, list[Condition]], ...]:
    """The registries, each with the conditions under which a trial uses it.

    A loss that a strategy does not read is the default, which is used.
    """
    found = []
    for registry in (one for one in REGISTRIES.values() if one.of_trials):
        group, _, name = registry.key.rpartition(".")
        names = {registry.group, group or name}
        conditions = [rule.used_if for rule in rules() if not rule.group and rule.name in names]
        found.append((registry, conditions))
    return tuple(found)


def _with_equal_results(spec: TrialSettings) -> TrialSettings:
    """Replace settings by others with the same results."""
    if spec.images_per_class == 0 and spec.auxiliary.source == "both":
        spec = replace(spec, auxiliary=replace(spec.auxiliary, source="real"))
    if reads_lora_images(spec):
        # The control reads the training images of the LoRA, but no diffusion model.
        source = spec.lora.source if spec.lora else LoraSettings.source
        spec = replace(spec, lora=LoraSettings(source=source))
    for name in _groups_of_plugins():
        group = getattr(spec, name)
        if (own := _complete(spec, name, dict(group.own))) != group.own:
            spec = replace(spec, **{name: replace(group, own=own)})
    return spec


@computed_from_registries
@cache
def _groups_of_plugins() -> tuple[str, ...]:
    """Groups that have settings of components from plugins."""
    own = [r.group for r in REGISTRIES.values() if any(c.settings is not None for c in r.values())]
    return tuple(dict.fromkeys(own))


def _complete(spec: TrialSettings, group: str, given: dict[str, Any]) -> Own:
    """All settings of the components of plugins that a trial names, and no others, sorted."""
    own = {}
    for registry, name in used_components(spec):
        if registry.group == group and (settings := registry[name].settings) is not None:
            for f in dataclasses.fields(settings):
                own[f"{name}.{f.name}"] = given.get(f"{name}.{f.name}", f.default)
    return tuple(sorted(own.items()))
