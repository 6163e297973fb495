"""Components: what a choice in a sweep file names, such as `pseudo_labels.kind: threshold`.

A registry has the components of one key. An entry says what other code needs to know about a
component without importing it: its summary for help and documentation, its settings, and the
modules whose code is part of the keys of its trials. The component itself is imported when it is
first used, so reading a registry does not import torch.

A new component of this package is a module, a line below and a test. A component of one's own is a
plugin, a file that a sweep names under `plugins:`:

    @STRATEGIES.add("margin", settings=Margin, summary="images whose two best classes differ")
    def margin(scores, settings, *, capacity, iteration, previous): ...

Imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
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
        modules: modules whose code determines its results, beside those of all trials.
        settings: of a plugin: the dataclass of its own settings.
        source: of a plugin: the digest of its file, which is part of the keys of its trials.
        facts: properties that other code depends on, of `Registry.facts`.
    """

    name: str
    target: str
    summary: str
    reads: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
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
        self._components: dict[str, Component] = {}
        self._plugins: dict[str, Component] = {}
        REGISTRIES[key] = self

    def __getitem__(self, name: str) -> Component:
        return self._plugins[name] if name in self._plugins else self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._components, *self._plugins])

    def __len__(self) -> int:
        return len(self._components) + len(self._plugins)

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"{self.key} {name!r} cannot be set here: {NOT_HERE}")

    def declare(
        self,
        name: str,
        target: str,
        summary: str,
        reads: Iterable[str] = (),
        modules: Iterable[str] | None = None,
        facts: Iterable[str] = (),
    ) -> None:
        """Add a component of this package; see `Component`.

        Args:
            modules: by default the module of the target.
        """
        own = (target.partition(":")[0],) if modules is None else tuple(modules)
        self._components[name] = Component(
            name, target, summary, frozenset(reads), own, facts=frozenset(facts)
        )

    def add(
        self, name: str, *, settings: type | None = None, summary: str, facts: Iterable[str] = ()
    ) -> Callable[[F], F]:
        """Add a component in a plugin; decorates a function or class.

        Args:
            name: lower case, with digits and `_`.
            settings: frozen dataclass of its own settings, with fields from `setting`, which are
                keys such as `pseudo_labels.<name>.<field>`. Without it the component gets the
                settings of the group.
            summary: what it does, in one line.
            facts: its properties, of those that the registry has.

        Raises:
            TypeError: outside of a plugin, or the signature or the settings are wrong.
            ValueError: the name is taken or invalid, or a fact is unknown.
        """

        def register(component: F) -> F:
            plugin = _loading.get()
            if plugin is None:
                raise TypeError(f"{self.key} {name!r} cannot be added here: {NOT_HERE}")
            self._check(name, settings, summary, facts, component)
            target = f"{plugin.file}:{getattr(component, '__name__', name)}"
            # It may read every setting of the group: the number of images per class, for example,
            # depends on settings that a strategy does not see.
            added = Component(
                name, target, summary, self.conditional, (), settings, plugin.digest,
                frozenset(facts), component,
            )  # fmt: skip
            plugin.components.append((self, added))
            return component

        return register

    def _check(
        self,
        name: str,
        settings: type | None,
        summary: str,
        facts: Iterable[str],
        component: Any,
    ) -> None:
        if not self.is_open:
            others = ", ".join(key for key, registry in REGISTRIES.items() if registry.is_open)
            raise ValueError(f"a plugin cannot add a component of {self.key}; it can of {others}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name; allowed: lower case letters, digits and _")
        if name in self._components:
            raise ValueError(f"{self.key} has a component {name!r} already; choose another name")
        if not summary.strip() or "\n" in summary:
            raise ValueError(f"the summary of {name!r} must be one line of text")
        if unknown := sorted(set(facts) - self.facts):
            known = ", ".join(sorted(self.facts)) or "none"
            raise ValueError(f"{name!r} has the unknown fact {unknown[0]!r}; allowed: {known}")
        positional, _, keyword = self.signature.partition(", *, ")
        arguments = dict.fromkeys(filter(None, keyword.split(", ")))
        try:
            inspect.signature(component).bind(*filter(None, positional.split(", ")), **arguments)
        except TypeError:
            raise TypeError(
                f"{name!r} must have the parameters ({self.signature}), but it has "
                f"{inspect.signature(component)}"
            ) from None
        if self.has_files and not callable(getattr(component, "files", None)):
            raise TypeError(f"{name!r} must have a static method files() -> list[Path]")
        if settings is not None and not self.group:
            raise TypeError(f"{name!r} has settings, which a component of {self.key} cannot have")
        if settings is not None:
            _check_settings(name, settings)

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


def _check_settings(name: str, settings: type) -> None:
    if not dataclasses.is_dataclass(settings) or not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"the settings of {name!r} must be a frozen dataclass")
    types = typing.get_type_hints(settings)
    for f in dataclasses.fields(settings):
        if "help" not in f.metadata or f.default is dataclasses.MISSING:
            raise TypeError(
                f"the setting {f.name!r} of {name!r} has no default or no help; write "
                f'`{f.name}: float = setting(0.2, "what it is", ge=0)`'
            )
        if types[f.name] not in (bool, int, float, str):
            raise TypeError(
                f"the setting {f.name!r} of {name!r} has the type {types[f.name]}; allowed: bool, "
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


_loading: ContextVar[Loading | None] = ContextVar("loading", default=None)


@contextmanager
def loading(plugin: Loading) -> Iterator[None]:
    """Let the code in this block add components to the plugin."""
    token = _loading.set(plugin)
    try:
        yield
    finally:
        _loading.reset(token)


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
        for update in _updates:
            update()


_updates: list[Callable[[], object]] = []


def when_plugins_change(function: Callable[[], object]) -> None:
    """Call a function after each change of the plugins in use, in the order of registration."""
    _updates.append(function)


def computed_from_registries(function: C) -> C:
    """Decorates a function with a cache that is cleared when plugins change."""
    when_plugins_change(function.cache_clear)  # type: ignore[attr-defined]
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

# air_core.pseudo_labels.Strategy
STRATEGIES = Registry("pseudo_labels.kind", "scores, settings, *, capacity, iteration, previous")
_PER_CLASS = {"growth", "k"}
STRATEGIES.declare(
    "top_k",
    "air_core.pseudo_labels.top_k:top_k",
    "K most confident images of each class",
    _PER_CLASS,
)
STRATEGIES.declare(
    "predicted",
    "air_core.pseudo_labels.top_k:predicted",
    "the same among images with this best class",
    _PER_CLASS,
)
STRATEGIES.declare(
    "threshold",
    "air_core.pseudo_labels.threshold:threshold",
    "all images of at least this confidence",
    {"threshold"},
)
STRATEGIES.declare(
    "candidates",
    "air_core.pseudo_labels.candidates:candidates",
    "CPL's sets of classes",
    {*_PER_CLASS, "alpha", "beta", "loss"},
)

LOSSES = Registry("pseudo_labels.loss", "logits, targets")  # (B, C) each -> the mean loss
LOSSES.declare("cc", "air_core.losses:candidate_loss", "mass of the set", modules=())
LOSSES.declare("ce", "air_core.losses:soft_cross_entropy", "soft cross-entropy", modules=())
LOSSES.declare("rc", "air_core.losses:soft_cross_entropy", "ce, re-weighted", modules=())

AUXILIARIES = Registry("auxiliary.kind", "bank")  # air_core.auxiliary.bank.Bank -> classifier
AUXILIARIES.declare("prototype", "air_core.auxiliary.prototype:prototype", "class means")
AUXILIARIES.declare("lda", "air_core.auxiliary.lda:lda", "linear discriminant")
AUXILIARIES.declare("knn", "air_core.auxiliary.nearest:knn", "nearest images", {"neighbours"})
AUXILIARIES.declare("cache", "air_core.auxiliary.nearest:cache", "Tip-Adapter's")
AUXILIARIES.declare(
    "linear_probe", "air_core.auxiliary.linear_probe:linear_probe", "logistic regression"
)

# See air_core.auxiliary.fidelity.
FIDELITIES = Registry("fidelity.kind", "bank, settings, text, real")
_NEAREST = "`keep` images nearest to"
FIDELITIES.declare(
    "class_mean",
    "air_core.auxiliary.fidelity:class_mean",
    f"{_NEAREST} the mean of the class",
    {"keep"},
)
FIDELITIES.declare("text", "air_core.auxiliary.fidelity:text", f"{_NEAREST} its text", {"keep"})
FIDELITIES.declare("argmax", "air_core.auxiliary.fidelity:argmax", "images that CLIP recognises")
FIDELITIES.declare(
    "real_mean",
    "air_core.auxiliary.fidelity:real_mean",
    f"{_NEAREST} the mean of its pseudo-labelled images",
    {"keep"},
)
FIDELITIES.declare("random", "air_core.auxiliary.fidelity:random", "`keep` images", {"keep"})
FIDELITIES.declare("none", "air_core.auxiliary.fidelity:none", "all images")

# Text classifier, pool and air_core.types.Classes -> classifier
TRANSDUCTIONS = Registry("transduction", "text, pool, classes", is_open=False)
TRANSDUCTIONS.declare("none", "air_core.classifiers:unchanged", "no refinement", modules=())
TRANSDUCTIONS.declare(
    "gmm",
    "air_core.transduction:transductive",
    "text scores are refined by a mixture model over the whole pool",
)

# -> air_core.prompts.PromptLearner
LEARNERS = Registry(
    "modality",
    "settings, backbone, classnames, template, seed",
    group="prompt",
    facts=(
        "context",  # `prompt.length` vectors stand before each class name in the text tower
        "tokens",  # it reads image tokens beside the features, so its logits take long
        "transfers",  # what it learned on some classes also works with other class names
    ),
)
LEARNERS.declare(
    "text",
    "air_core.prompts.text:TextPrompt",
    "CoOp context vectors",
    modules=(),
    facts=("context", "transfers"),
)
LEARNERS.declare(
    "visual",
    "air_core.prompts.visual:VisualPrompt",
    "VPT tokens",
    {"depth", "init"},
    facts=("tokens", "transfers"),
)

# -> air_core.datasets.Dataset. The versions of their modules are parts of their own, `reader_of`.
DATASETS = Registry(
    "dataset",
    "",
    facts=("validation",),  # its validation images choose a classifier: no pool has them by default
)
DATASETS.declare(
    "digits",
    "air_core.datasets.digits:DATASET",
    "1,797 real digits",
    modules=(),
    facts=("validation",),
)
for _name, _about in {
    "flowers102": "8,189 flowers of 102 kinds",
    "resisc45": "31,500 aerial images of 45 scenes",
    "dtd": "5,640 textures of 47 kinds",
    "cub": "11,788 birds of 200 kinds",
    "eurosat": "27,000 satellite images of 10 land uses",
    "fgvc_aircraft": "10,000 aircraft of 100 variants",
    "fashion_mnist": "70,000 pictures of 10 kinds of clothes",
}.items():
    DATASETS.declare(_name, f"air_core.datasets.{_name}:DATASET", _about, modules=())

# Of plugins, beside the names that air_core.models.weights reads.
BACKBONES = Registry("backbone", "device, precision", has_files=True)  # air_core.backbone.Backbone
GENERATORS = Registry("generator", "settings, device", has_files=True)  # -> ImageGenerator
