"""Components: what a choice in a sweep file names, such as `pseudo_labels.kind: threshold`.

A registry has the components of one key. An entry says what other code needs to know about a
component without importing it: its summary for help and documentation, the settings that it reads,
and the modules whose code is part of the keys of its trials. The component itself is imported when
it is first used, so reading a registry does not import torch.

A new component of this package is a module, a line below and a test. Imports the standard library
only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Component:
    """One choice of a registry.

    Args:
        target: where it is defined, `module:name`.
        summary: what it does, in one line.
        reads: settings of the registry's group that it reads. Settings of the group that other
            components read and this one does not cannot change its results.
        modules: modules whose code determines its results, beside those of all trials.
    """

    name: str
    target: str
    summary: str
    reads: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()


class Registry(Mapping[str, Component]):
    """The components that a key of a sweep file can name. Read-only.

    Args:
        key: the key, such as `pseudo_labels.kind`.
        group: group of the settings in `reads`. Default: that of the key.
    """

    def __init__(self, key: str, group: str | None = None) -> None:
        self.key = key
        self.group = key.rpartition(".")[0] if group is None else group
        self._components: dict[str, Component] = {}
        REGISTRIES[key] = self

    def __getitem__(self, name: str) -> Component:
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(
            f"{self.key} {name!r} cannot be replaced: processes that run trials import airsweep "
            "themselves and would not see it; edit the module "
            f"{self[name].target.partition(':')[0]}"
            if name in self
            else f"{self.key} has no component {name!r}; components are added in {__name__}"
        )

    def declare(
        self,
        name: str,
        target: str,
        summary: str,
        reads: Iterable[str] = (),
        modules: Iterable[str] | None = None,
    ) -> None:
        """Add a component of this package; see `Component`.

        Args:
            modules: by default the module of the target.
        """
        own = (target.partition(":")[0],) if modules is None else tuple(modules)
        self._components[name] = Component(name, target, summary, frozenset(reads), own)

    def part(self, name: str) -> str:
        """Name of a component's code among the parts of orchestrator.store.code_version."""
        return f"{self.key}:{name}"

    def load(self, name: str) -> Any:
        """The component itself; imports its module."""
        return _imported(self[name].target)

    @property
    def conditional(self) -> frozenset[str]:
        """Settings of the group that only some components read."""
        return frozenset[str]().union(*(one.reads for one in self.values()))

    def summary(self) -> str:
        """The choices in one line, for the help of the key."""
        return "; ".join(f"{name}: {one.summary}" for name, one in self.items())


REGISTRIES: dict[str, Registry] = {}  # by key


@cache
def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------- components of this package

STRATEGIES = Registry("pseudo_labels.kind")  # air_core.pseudo_labels.Strategy
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

LOSSES = Registry("pseudo_labels.loss")  # (logits (B, C), targets (B, C)) -> loss
LOSSES.declare("cc", "air_core.training:candidate_loss", "mass of the set", modules=())
LOSSES.declare("ce", "air_core.training:soft_cross_entropy", "soft cross-entropy", modules=())
LOSSES.declare("rc", "air_core.training:soft_cross_entropy", "ce, re-weighted", modules=())

AUXILIARIES = Registry("auxiliary.kind")  # air_core.auxiliary.Bank -> classifier
AUXILIARIES.declare("prototype", "air_core.auxiliary.prototype:prototype", "class means")
AUXILIARIES.declare("lda", "air_core.auxiliary.lda:lda", "linear discriminant")
AUXILIARIES.declare("knn", "air_core.auxiliary.nearest:knn", "nearest images", {"neighbours"})
AUXILIARIES.declare("cache", "air_core.auxiliary.nearest:cache", "Tip-Adapter's")
AUXILIARIES.declare(
    "linear_probe", "air_core.auxiliary.linear_probe:linear_probe", "logistic regression"
)

# (bank, settings, text features of classes, real images or None) -> bank
FIDELITIES = Registry("fidelity.kind")
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

TRANSDUCTIONS = Registry("transduction")  # (text classifier, pool, unseen) -> classifier
TRANSDUCTIONS.declare("none", "air_core.classifiers:unchanged", "no refinement", modules=())
TRANSDUCTIONS.declare(
    "gmm",
    "air_core.transduction:transductive",
    "text scores are refined by a mixture model over the whole pool",
)

# (settings, backbone, classnames, template, seed) -> air_core.prompts.PromptLearner
LEARNERS = Registry("modality", group="prompt")
LEARNERS.declare("text", "air_core.prompts.text:TextPrompt", "CoOp context vectors", modules=())
LEARNERS.declare("visual", "air_core.prompts.visual:VisualPrompt", "VPT tokens", {"depth", "init"})
