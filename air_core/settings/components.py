"""Components: what a choice in a sweep file names, such as `pseudo_labels.kind: threshold`.

A registry has the components of one key. A decorator adds a component, in this package and in a
plugin, a file that a sweep names under `plugins:`:

    @STRATEGIES.add("margin", settings=Margin, summary="images whose two best classes differ")
    def margin(scores, settings, *, capacity, iteration, previous): ...

The decorators of this package are read, not run: their arguments are literals. A component is
imported when it is first used, so reading a registry does not import torch.

Imports the standard library only.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")
Own = tuple[tuple[str, Any], ...]  # settings of components from plugins: ("margin.tau", 0.2)


@dataclass(frozen=True)
class Component:
    """One choice of a registry.

    Args:
        target: where it is defined, `module:name`, or `file:name` of a plugin.
        summary: what it does, in one line.
        reads: settings of the registry's group that it reads. Settings of the group that other
            components read and this one does not cannot change its results.
        settings: of a plugin: the dataclass of its own settings.
        source: of a plugin: the digest of its file, which is part of the keys of its trials.
        facts: properties that other code depends on, of `Registry.facts`.
    """

    name: str
    target: str
    summary: str
    reads: frozenset[str] = frozenset()
    settings: type | None = None
    source: str = ""
    facts: frozenset[str] = frozenset()
    function: Any = field(default=None, repr=False)  # of a plugin


def setting(default: Any, help: str, **limits: float) -> Any:
    """A field of a plugin's settings, with its default, one line of help and limits (ge, gt, le,
    lt). Its type is bool, int, float or str."""
    return field(default=default, metadata={"help": help, "limits": limits})


class Registry(Mapping[str, Component]):
    """The components that a key of a sweep file can name: those of this package, and those of the
    plugins that are in use.

    Args:
        key: the key, such as `pseudo_labels.kind`.
        signature: parameters of a component, which is a function or a class.
        components: those of this package.
        is_open: whether plugins can add components.
        group: group of the settings in `reads` and of own settings. Default: that of the key.
        facts: properties that components can have.
        has_files: whether a component has a static method `files()`, which returns the paths whose
            digests are part of the keys of its trials.
        of_trials: whether the key is a setting of trials.
    """

    def __init__(
        self,
        key: str,
        signature: str,
        components: Iterable[Component] = (),
        group: str | None = None,
        is_open: bool = True,
        facts: Iterable[str] = (),
        has_files: bool = False,
        of_trials: bool = True,
    ) -> None:
        self.key, self.signature, self.is_open = key, signature, is_open
        self.of_trials = of_trials
        self.facts, self.has_files = frozenset(facts), has_files
        self.group = key.rpartition(".")[0] if group is None else group
        self._components = {one.name: one for one in components}
        self._plugins: dict[str, Component] = {}
        REGISTRIES[key] = self

    def __getitem__(self, name: str) -> Component:
        return self._plugins[name] if name in self._plugins else self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._components, *self._plugins])

    def __len__(self) -> int:
        return len(self._components) + len(self._plugins)

    def add(
        self,
        name: str,
        *,
        summary: str,
        settings: type | None = None,
        reads: Iterable[str] | None = None,
        facts: Iterable[str] = (),
    ) -> Callable[[F], F]:
        """Add a component; decorates a function or class.

        Args:
            name: lower case, with digits and `_`.
            summary: what it does, in one line.
            settings: of a plugin: frozen dataclass of its own settings, with fields from
                `setting`, which are keys such as `pseudo_labels.<name>.<field>`. Without it the
                component gets the settings of the group.
            reads: see `Component`; by default none, in a plugin all. A strategy that uses
                `capacity` reads `growth` and `k`.
            facts: its properties, of those that the registry has.

        Raises:
            TypeError: outside of a plugin.
            ValueError: in a plugin: the name is taken or invalid, or another argument is wrong.
        """

        def register(component: F) -> F:
            plugin = LOADING.get()
            own = getattr(component, "__name__", name)
            if plugin is None:
                here = name in self._components and self._components[name].target
                if here == f"{component.__module__}:{own}":
                    return component
                raise TypeError(f"{self.key} {name!r} cannot be added here: {NOT_HERE}")
            # It may read every setting of the group: the number of images per class, for example,
            # depends on settings that a strategy does not see.
            added = Component(
                name, f"{plugin.file}:{own}", summary,
                self.conditional if reads is None else frozenset(reads), settings, plugin.digest,
                frozenset(facts), component,
            )  # fmt: skip
            if mistake := next(self._mistakes(added), None):
                raise ValueError(mistake)
            plugin.components.append((self, added))
            return component

        return register

    def _mistakes(self, added: Component) -> Iterator[str]:
        """What is wrong with a component of a plugin."""
        name, settings = repr(added.name), added.settings
        if not self.is_open:
            others = ", ".join(key for key, registry in REGISTRIES.items() if registry.is_open)
            yield f"a plugin cannot add a component of {self.key}; it can of {others}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", added.name):
            yield f"{name} is no name; allowed: lower case letters, digits and _"
        if added.name in self._components:
            yield f"{self.key} has a component {name} already; choose another name"
        for what, given, known in (
            ("fact", added.facts, self.facts),
            ("setting", added.reads, self.conditional),
        ):
            for unknown in sorted(given - known):
                allowed = ", ".join(sorted(known)) or "none"
                yield f"{name} has the unknown {what} {unknown!r}; allowed: {allowed}"
        positional, _, keyword = self.signature.partition(", *, ")
        arguments = dict.fromkeys(filter(None, keyword.split(", ")))
        parameters = inspect.signature(added.function)
        try:
            parameters.bind(*filter(None, positional.split(", ")), **arguments)
        except TypeError:
            yield f"{name} must have the parameters ({self.signature}), but it has {parameters}"
        if self.has_files and not callable(getattr(added.function, "files", None)):
            yield f"{name} must have a static method files() -> list[Path]"
        if settings is not None and not self.group:
            yield f"{name} has settings, which a component of {self.key} cannot have"
        if settings is not None:
            yield from _mistakes_of_settings(name, settings)

    def part(self, name: str) -> str:
        """Name of a component's code among the parts of orchestrator.store.code_version."""
        return f"{self.key}:{name}"

    def load(self, name: str) -> Any:
        """The component itself; imports its module."""
        component = self[name]
        return component.function if component.source else _imported(component.target)

    def settings_of(self, name: str, group: Any) -> Any:
        """What a component gets as `settings`: its own, or those of its group."""
        settings = self[name].settings
        if settings is None:
            return group
        own = dict(group.own)
        names = [f.name for f in dataclasses.fields(settings)]
        return settings(**{f: own[f"{name}.{f}"] for f in names if f"{name}.{f}" in own})

    @property
    def conditional(self) -> frozenset[str]:
        """Settings of the group that only some components read."""
        return frozenset[str]().union(*(one.reads for one in self._components.values()))

    def summary(self) -> str:
        """The choices in one line, for the help of the key."""
        return "; ".join(f"{name}: {one.summary}" for name, one in self.items())


def _mistakes_of_settings(name: str, settings: Any) -> Iterator[str]:
    if not getattr(getattr(settings, "__dataclass_params__", None), "frozen", False):
        yield f"the settings of {name} must be a frozen dataclass"
        return
    types = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        if "help" not in f.metadata or f.default is dataclasses.MISSING:
            yield (
                f"the setting {f.name!r} of {name} has no default or no help; write "
                f'`{f.name}: float = setting(0.2, "what it is", ge=0)`'
            )
        if types[f.name] not in (bool, int, float, str):
            yield (
                f"the setting {f.name!r} of {name} has the type {types[f.name]}; allowed: bool, "
                "int, float, str"
            )


# ---------------------------------------------------------------- plugins

NOT_HERE = (
    "the processes that run trials import airsweep themselves and would not see it; write it to a "
    "file (in a notebook: %%writefile mine.py) with the decorator .add(...), and name the file "
    "under `plugins:` in the sweep"
)


@dataclass
class Loading:
    """A plugin whose code runs: it collects the components that the code adds."""

    file: str
    digest: str
    components: list[tuple[Registry, Component]] = field(default_factory=list)


LOADING: ContextVar[Loading | None] = ContextVar("loading", default=None)


def use_components(components: Sequence[tuple[Registry, Component]]) -> None:
    """Make these the components of plugins in all registries, in place of any others.

    Raises:
        ValueError: two plugins add the same component.
    """
    wanted: dict[str, dict[str, Component]] = {key: {} for key in REGISTRIES}
    for registry, component in components:
        other = wanted[registry.key].setdefault(component.name, component)
        if other is not component:
            raise ValueError(
                f"{registry.key} {component.name!r} is added twice: by {other.target} and by "
                f"{component.target}"
            )
    if wanted != {key: registry._plugins for key, registry in REGISTRIES.items()}:
        for key, registry in REGISTRIES.items():
            registry._plugins = wanted[key]
        for function in _computed:
            function.cache_clear()


_computed: list[Any] = []


def computed_from_registries(function: C) -> C:
    """Decorates a function with a cache that is cleared when plugins change."""
    _computed.append(function)
    return function


REGISTRIES: dict[str, Registry] = {}  # by key


def is_component(part: str) -> bool:
    """Whether a part of the code is a component; see `Registry.part`."""
    return ":" in part


@cache
def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------- components of this package

PACKAGE = Path(__file__).parents[1]
_parsing = threading.Lock()  # Python 3.11 fails if two threads make a syntax tree at once


def syntax(module: str) -> ast.Module:
    """The code of a module of airsweep, which is not imported."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    with _parsing:
        return ast.parse(file.read_text(encoding="utf-8"))


def decorated(registry: str, module: str) -> Iterator[Component]:
    """The components that a module adds to the registry of this variable."""
    return (component for variable, component in _added(module) if variable == registry)


@cache
def _added(module: str) -> list[tuple[str, Component]]:
    """The components that a module adds, read from its decorators, with the registries."""
    found = []
    for node in syntax(module).body:
        for decorator in getattr(node, "decorator_list", ()):
            if names := added_by(decorator):
                told = {one.arg: ast.literal_eval(one.value) for one in decorator.keywords}
                reads, facts = (frozenset(told.get(key, ())) for key in ("reads", "facts"))
                target = f"{module}:{getattr(node, 'name', '')}"
                component = Component(names[1], target, told["summary"], reads, facts=facts)
                found.append((names[0], component))
    return found


def added_by(decorator: ast.expr) -> tuple[str, str] | None:
    """Registry and component of a decorator that adds one; else None."""
    match decorator:
        case ast.Call(ast.Attribute(ast.Name(registry), "add"), [ast.Constant(str(name))]):
            return registry, name
    return None


# See air_core.pseudo_labels.Strategy.
STRATEGIES = Registry(
    "pseudo_labels.kind",
    "scores, settings, *, capacity, iteration, previous",
    decorated("STRATEGIES", "air_core.pseudo_labels"),
)
# (B, C) each -> the mean loss
LOSSES = Registry("pseudo_labels.loss", "logits, targets", decorated("LOSSES", "air_core.losses"))
# air_core.auxiliary.Bank -> classifier
AUXILIARIES = Registry("auxiliary.kind", "bank", decorated("AUXILIARIES", "air_core.auxiliary"))
# See air_core.auxiliary.high_fidelity.
FIDELITIES = Registry(
    "fidelity.kind", "bank, settings, text, real", decorated("FIDELITIES", "air_core.auxiliary")
)
# Text classifier, pool, and its classes -> classifier
TRANSDUCTIONS = Registry(
    "transduction",
    "text, pool, classes",
    decorated("TRANSDUCTIONS", "air_core.transduction"),
    is_open=False,
)
# -> air_core.prompts.PromptLearner
LEARNERS = Registry(
    "modality",
    "settings, backbone, classnames, template, seed",
    decorated("LEARNERS", "air_core.prompts"),
    group="prompt",
    facts=(
        "context",  # `prompt.length` vectors stand before each class name in the text tower
        "tokens",  # it reads image tokens beside the features, so its logits take long
        "transfers",  # what it learned on some classes also works with other class names
        "bundled",  # a bundle can have it, see `air_core.prompts.Bundled`
    ),
)
# -> air_core.datasets.Dataset, each in a module of its name
DATASETS = Registry(
    "dataset",
    "",
    (
        component
        for file in sorted((PACKAGE / "datasets").glob("*.py"))
        if "@DATASETS.add(" in file.read_text(encoding="utf-8")  # the rest need not be parsed
        for component in decorated("DATASETS", f"air_core.datasets.{file.stem}")
    ),
    facts=("validation",),  # its validation images choose a classifier: no pool has them by default
)

# Of plugins, beside the names that air_core.models.weights reads.
BACKBONES = Registry("backbone", "device, precision", has_files=True)  # air_core.backbone.Backbone
GENERATORS = Registry("generator", "settings, device", has_files=True)  # -> ImageGenerator
