"""Resolve the names of datasets and weights to digests of their files.

Digests of files are cached by path, size and modification time, so planning reads unchanged weights
only once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from air_core.datasets import Dataset, get_dataset
from air_core.datasets.class_folders import class_files
from air_core.datasets.image_folder import PREFIX, check_no_leak
from air_core.datasets.images import BAD_SHARE, too_many_unreadable
from air_core.datasets.unlabelled import LABELS
from air_core.methods import EMBEDDED
from air_core.models.families import drawing_defaults
from air_core.models.weights import generator_folder, local_path
from air_core.paradigms import split_positions
from air_core.settings import Ref
from air_core.settings.components import BACKBONES, GENERATORS, is_component
from air_core.settings.conditions import uses_evidence, uses_generator
from air_core.settings.flat import to_flat
from air_core.settings.normal import normalised
from orchestrator.keys import CodeVersions, canonical_json
from orchestrator.planning.trial_checks import InvalidSetting, check_trial, checking
from orchestrator.plugins import plugin_versions
from orchestrator.spec import SweepSpec, presets
from orchestrator.spec.sweep import split_name
from orchestrator.stages import STAGES, TrialSpec
from orchestrator.stages.inputs import Contents, count_images, dataset_ref, images_folder
from orchestrator.stages.trial import reader_of, trial_of
from orchestrator.store import SweepLocation
from orchestrator.store.code_version import changed_versions


@dataclass(frozen=True)
class DatasetInput:
    """A resolved dataset: the digest of its content, its class names and its template."""

    ref: Ref
    classnames: tuple[str, ...]
    template: str
    pool_labels: str = "known"  # see `Dataset`


@dataclass(eq=False)
class Resolver(Contents):
    """Resolves the names in one sweep to Refs, each of which has a name and a digest.

    Args:
        folders: names of datasets and models as the sweep file has them, and with the path from
            the working directory; see `SweepSpec.folders`.
    """

    folders: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._datasets: dict[str, DatasetInput] = {}  # by name
        self._weights: dict[str, Ref] = {}  # by role and name
        self._code: dict[str, str] = {}
        self._trials: dict[frozenset[tuple[str, Any]], TrialSpec] = {}  # by settings
        self._pool_sizes: dict[str, int] = {}  # by dataset and split
        self._labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # labels, parts by dataset
        self._smallest: dict[str, tuple[int, str]] = {}  # class of the fewest images, by folder

    def trial(self, flat: dict[str, Any]) -> TrialSpec:
        """Build a normalised TrialSpec from a flat dict of settings with names of inputs, once for
        each.

        Raises:
            InvalidSetting: weights or images are missing, or too few.
        """
        flat = EMBEDDED | flat
        settings = frozenset(flat.items())
        if settings not in self._trials:
            try:
                self._trials[settings] = self._trial(flat)
            except InvalidSetting as problem:
                problem.value = flat.get(problem.key)
                raise
        return self._trials[settings]

    def _trial(self, flat: dict[str, Any]) -> TrialSpec:
        datasets = {}
        for key in ("dataset", "test_dataset"):
            if flat.get(key) is not None:
                with checking(key):
                    datasets[key] = self.dataset_by_name(flat[key])
        refs = {key: dataset.ref for key, dataset in datasets.items()}
        with checking("backbone"):
            refs["backbone"] = self.weights("backbone", flat["backbone"])
        refs["generator"] = Ref(name=flat["generator"], digest="")
        dataset = datasets["dataset"]
        versions = self.code_versions([each.ref.name for each in datasets.values()])
        trial = normalised(trial_of(flat, refs, dataset.classnames, versions))
        # A trial that does not use the generator does not need it to exist.
        if uses_generator(trial):
            with checking("generator"):
                trial = replace(trial, generator=self.weights("generator", flat["generator"]))
        check_trial(trial, datasets, self)
        if not uses_evidence(trial):
            return trial
        with checking("dataset"):
            size = self.pool_images(trial)
        return replace(trial, scored_images=min(size, trial.evidence.images or size))

    def pool_images(self, trial: TrialSpec) -> int:
        """Number of pool images of a trial.

        Raises:
            ValueError: a class has too few images for the split.
        """
        name = f"{trial.dataset.name} {canonical_json(trial.split)}"
        if name not in self._pool_sizes:
            dataset = get_dataset(trial.dataset.name)
            positions, _ = split_positions(*self.labels_and_parts(dataset), trial.split)
            self._pool_sizes[name] = len(positions["pool"])
        return self._pool_sizes[name]

    def labels_and_parts(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if dataset.name not in self._labels:
            examples = dataset.load(self.data_root)
            self._labels[dataset.name] = (examples.labels, examples.parts)
        return self._labels[dataset.name]

    def has_images(self, name: str, part: str) -> bool:
        """Whether a dataset has images of a part: one of unlabelled images may have none."""
        dataset = get_dataset(self.folders.get(name, name))
        return dataset.pool_labels == "known" or part in self.labels_and_parts(dataset)[1]

    def check_validation(self, name: str) -> None:
        """Check that a dataset has validation images.

        Raises:
            InvalidSetting: it has none.
        """
        if not self.has_images(name, "val"):
            raise InvalidSetting(
                "dataset",
                f"{name} has no validation images for the objective validation_accuracy; label "
                f"some in its {LABELS} with the part val, or set objective: mutual_information",
                name,
            )

    def pool_size(self, trial: TrialSpec) -> int | None:
        """Number of pool images of a trial; None if it cannot be known."""
        try:
            return self.pool_images(trial)
        except ValueError:
            return None

    def fewest_ready_images(self, name: str, classnames: Sequence[str]) -> tuple[int, str]:
        """The smallest number of images of a class in a folder of ready images, and the class."""
        if name not in self._smallest:
            files = class_files(images_folder(name), classnames)
            self._smallest[name] = min((len(paths), of) for of, paths in files.items())
        return self._smallest[name]

    def code_versions(self, datasets: Sequence[str]) -> CodeVersions:
        """Code versions that are not those of the recipes, by part, for trials on datasets."""
        readers = [part for part in map(reader_of, datasets) if not is_component(part)]
        versions = (*changed_versions(tuple(STAGES.values()), *readers), *plugin_versions())
        self._code |= versions
        return versions

    def dataset_by_name(self, name: str) -> DatasetInput:
        """Resolve a dataset by name.

        Raises:
            ValueError: no dataset has this name.
            MissingInput: a file of the dataset is missing.
        """
        if name not in self._datasets:
            dataset = get_dataset(self.folders.get(name, name))
            ref = self.dataset(dataset)
            self._datasets[name] = DatasetInput(
                ref, dataset.classnames, dataset.template, dataset.pool_labels
            )
        return self._datasets[name]

    def dataset(self, dataset: Dataset) -> Ref:
        """Resolve a dataset and check its images.

        Raises:
            ValueError: too many images are visibly damaged (the stage of the features decodes all,
                and refuses more than the same share), or test images of a folder are also training
                images.
        """
        files = dataset.files(self.data_root)
        digests = self.file_digests(files)
        problems = [self.unreadable[file] for file in files if file in self.unreadable]
        if problem := too_many_unreadable(dataset.name, problems, count_images(files), BAD_SHARE):
            raise ValueError(f"{problem}; `airsweep check {dataset.name}` opens all")
        if dataset.name.startswith(PREFIX):
            check_no_leak(dataset, dict(zip(files, digests, strict=True)))
        return dataset_ref(dataset, files, digests)

    def inputs(self) -> dict[str, Any]:
        """Digests of everything that was resolved so far, by name."""
        datasets = {name: dataset.ref.digest for name, dataset in self._datasets.items()}
        weights = {words: ref.digest for words, ref in self._weights.items()}
        return {"datasets": datasets, "weights": weights, "code": self._code}

    def generator_defaults(self, name: str) -> dict[str, Any]:
        """Defaults of settings that the files of a generator determine, by trial key."""
        if name.startswith("folder:"):
            return {}
        with suppress(ValueError):  # `trial` explains what is wrong with the folder
            found = drawing_defaults(generator_folder(located_weights(name, self.folders)))
            return {f"generation.{setting}": value for setting, value in found.items()}
        return {}

    def weights(self, role: str, name: str) -> Ref:
        """Resolve a backbone or generator, once for each name.

        Raises:
            MissingInput: no weights of this name exist; the message lists what is allowed.
            ValueError: a file is truncated, such as after an incomplete copy.
        """
        words = f"{role} {name}"
        if words not in self._weights:
            located = located_weights(name, self.folders)
            self._weights[words] = self.weights_content(role, located)
        return self._weights[words]


def with_model_defaults(sweep: SweepSpec, resolver: Resolver) -> SweepSpec:
    """The sweep with the defaults of its generators, without the embedded one."""
    role, choices = "generator", (sweep.fixed, *(override.set for override in sweep.overrides))
    names = {str(each[role]) for each in choices if role in each} - {EMBEDDED[role]}
    names |= {*map(str, (sweep.axes or sweep.grid).get(role, ()))} - {EMBEDDED[role]}
    worlds = {(role, name): resolver.generator_defaults(name) for name in sorted(names)}
    return replace(sweep, worlds={**presets.WORLDS, **worlds}) if any(worlds.values()) else sweep


def located_weights(name: str, folders: Mapping[str, str] | None = None) -> str:
    """The name of weights with an absolute path if it has one, since workers have another working
    directory."""
    before, path = split_name((folders or {}).get(name, name))
    with suppress(ValueError):
        known = {*EMBEDDED.values(), *BACKBONES, *GENERATORS}
        if name not in known and (located := local_path(path)).exists():
            return before + os.path.normpath(located)
    return before + path


REFS = ("dataset", "test_dataset", "backbone", "generator")


def refs_of(spec: TrialSpec) -> dict[str, Ref]:
    """Select the external inputs that a trial reads, by setting."""
    refs = {name: getattr(spec, name) for name in REFS}
    return {name: ref for name, ref in refs.items() if ref is not None and ref.digest}


def spec_json(spec: TrialSpec, key: str) -> str:
    """Write a trial as JSON: every setting as computed, and the digest of every input."""
    resolved: dict[str, Any] = to_flat(spec)
    for name in REFS:
        ref = getattr(spec, name)
        if ref is not None:
            resolved[f"{name}.digest"] = ref.digest
    return json.dumps({"key": key, **resolved}, indent=1, sort_keys=True)


def text_digest(text: str) -> str:
    """Digest of a text, such as a sweep file, as 12 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def resolver_of(location: SweepLocation, folders: Mapping[str, str] | None = None) -> Resolver:
    """The resolver for a sweep's inputs.

    Args:
        folders: of the sweep; None: it has no relative folders.
    """
    return Resolver(location.store.root / "digests.json", location.data_root, folders or {})
