"""Resolve the names of datasets and weights to digests of their files.

Digests of files are cached by path, size and modification time, so planning reads unchanged weights
only once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from air_core.captions import caption_problem
from air_core.components import BACKBONES, GENERATORS, is_component
from air_core.datasets import Dataset, get_dataset
from air_core.datasets.class_folders import class_files
from air_core.datasets.image_folder import PREFIX, check_no_leak
from air_core.datasets.images import BAD_SHARE, too_many_unreadable
from air_core.datasets.unlabelled import LABELS
from air_core.methods import EMBEDDED
from air_core.models.drawing import drawing_defaults
from air_core.models.families import FAMILIES, check_denoiser
from air_core.models.tokens import check_room
from air_core.models.weights import (
    check_image_tower,
    generator_folder,
    local_path,
)
from air_core.paradigms import TooFewImages, label_problem, split_positions
from air_core.specs import Ref, Templates
from air_core.specs.conditions import (
    can_transfer,
    has_context,
    reads_tokens,
    uses_evidence,
    uses_generator,
)
from air_core.specs.flat import to_flat
from air_core.specs.normal import normalised
from orchestrator.keys import CodeVersions, canonical_json, plain
from orchestrator.plugins import plugin_versions
from orchestrator.spec import SweepSpec, presets
from orchestrator.spec.sweep import split_name
from orchestrator.stages import STAGES, TrialSpec
from orchestrator.stages.inputs import (
    Contents,
    MissingInput,
    count_images,
    dataset_ref,
    images_folder,
)
from orchestrator.stages.trial import reader_of, trial_of
from orchestrator.store import SweepLocation, read_resolved
from orchestrator.store.code_version import changed_versions


class InvalidSetting(MissingInput):
    """The value of a trial key does not fit the inputs.

    Args:
        key: the trial key.
        message: what is wrong with its value, and what is allowed.
    """

    value: Any = None

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)  # pickle needs all arguments
        self.key, self.message = key, message

    def __str__(self) -> str:
        return self.message


@contextmanager
def _checking(key: str) -> Iterator[None]:
    """Name the trial key whose value an error is about.

    Raises:
        InvalidSetting: the block raised another ValueError.
    """
    try:
        yield
    except NotRecorded:
        raise
    except ValueError as problem:
        raise InvalidSetting(key, str(problem)) from problem


@dataclass(frozen=True)
class DatasetInput:
    """A resolved dataset: the digest of its content, its class names and its template."""

    ref: Ref
    classnames: tuple[str, ...]
    template: str
    pool_labels: str = "known"  # see `Dataset`


@dataclass
class Resolver(Contents):
    """Resolves the names in one sweep to Refs, each of which has a name and a digest.

    Args:
        versions: code versions of an earlier run, by part; None: those of the installed code.
        folders: names of datasets and models as the sweep file has them, and with the path from
            the working directory; see `SweepSpec.folders`.
    """

    versions: Mapping[str, str] | None = None
    folders: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights: dict[tuple[str, str], Ref] = {}  # by role and name
        self._datasets: dict[str, DatasetInput] = {}
        self._labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # labels, parts by dataset
        self._pool_sizes: dict[str, int] = {}  # by `_split_name`
        self._code: dict[str, str] = {}
        self._drawing: dict[str, dict[str, Any]] = {}  # defaults, by generator
        self._smallest: dict[str, tuple[int, str]] = {}  # class of the fewest images, by folder

    def trial(self, flat: dict[str, Any]) -> TrialSpec:
        """Build a normalised TrialSpec from a flat dict of settings with names of inputs.

        Raises:
            InvalidSetting: weights or images are missing, or too few.
        """
        flat = EMBEDDED | flat
        try:
            return self._trial(flat)
        except InvalidSetting as problem:
            problem.value = flat.get(problem.key)
            raise

    def _trial(self, flat: dict[str, Any]) -> TrialSpec:
        datasets = {}
        for key in ("dataset", "test_dataset"):
            if flat.get(key) is not None:
                with _checking(key):
                    datasets[key] = self.dataset_by_name(flat[key])
        refs = {key: dataset.ref for key, dataset in datasets.items()}
        with _checking("backbone"):
            refs["backbone"] = self.weights("backbone", flat["backbone"])
        refs["generator"] = Ref(name=flat["generator"], digest="")
        dataset = datasets["dataset"]
        trial = trial_of(flat, refs, dataset.classnames)
        names = [each.ref.name for each in datasets.values()]
        trial = replace(trial, versions=self.code_versions(names))
        # A trial that does not use the generator does not need it to exist.
        if uses_generator(trial):
            with _checking("generator"):
                trial = replace(trial, generator=self.weights("generator", flat["generator"]))
        self.check(trial, datasets)
        with _checking("dataset"):
            return self.with_scored_images(normalised(trial))

    def check(self, trial: TrialSpec, datasets: Mapping[str, DatasetInput]) -> None:
        """Check that the inputs of a trial are sufficient.

        Args:
            datasets: by the trial key that names them.

        Raises:
            InvalidSetting: a class name is too long, images are too few or have no labels that a
                setting needs, a LoRA does not fit the generator, or the evidence has no time step.
        """
        learned = trial.prompt.length if has_context(trial) else 0
        for key, dataset in datasets.items():
            with _checking(key):
                check_room(trial.backbone.name, dataset.classnames, dataset.template, learned)
        for key, texts in _captions(trial).items():
            if problem := caption_problem(texts, trial.classnames):
                raise InvalidSetting(key, problem)
        if reads_tokens(trial):
            with _checking("backbone"):
                check_image_tower(trial.backbone.name)
        if datasets["dataset"].pool_labels == "unknown":
            _check_labels_unneeded(trial)
        if trial.test_dataset is not None and not self._test_images(trial.test_dataset.name):
            raise InvalidSetting(
                "test_dataset",
                f"{trial.test_dataset.name} has no test images; label some in its {LABELS}",
            )
        if trial.test_dataset is not None and not can_transfer(trial):
            raise InvalidSetting(
                "test_dataset",
                f"the learner {trial.modality!r} works with the class names that it learned only, "
                "so it cannot be tested on another dataset; set test_dataset: null",
            )
        if trial.paradigm == "ssl":
            with _checking("shots"):
                self._pool_images(trial)
        low, high = trial.evidence.low, trial.evidence.high
        if uses_evidence(trial) and low > high:
            raise InvalidSetting(
                "evidence.low",
                f"evidence.low is {low}, but evidence.high is {high}; allowed: low <= high",
            )
        if uses_generator(trial):
            if trial.generator.name.startswith("folder:"):
                if uses_evidence(trial):
                    raise InvalidSetting(
                        "generator",
                        f"generator {trial.generator.name!r} is a folder of images, but "
                        "evidence.draws needs a diffusion model; set evidence.draws: 0, or name a "
                        "diffusers folder",
                    )
                with _checking("generator"):
                    self._check_ready_images(trial.generator.name, trial)
            else:
                with _checking("generator"):
                    self._check_generator(trial)

    def _pool_images(self, trial: TrialSpec) -> int:
        """Number of pool images of a trial.

        Raises:
            ValueError: a class has too few images for the split.
        """
        name = _split_name(trial)
        if name not in self._pool_sizes:
            dataset = get_dataset(trial.dataset.name)
            try:
                positions, _ = split_positions(*self._labels_and_parts(dataset), trial.split)
            except TooFewImages as problem:
                classname = dataset.classnames[problem.class_index]
                raise ValueError(f"{dataset.name}: {problem}; it is {classname!r}") from problem
            self._pool_sizes[name] = len(positions["pool"])
        return self._pool_sizes[name]

    def _labels_and_parts(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if dataset.name not in self._labels:
            examples = dataset.load(self.data_root)
            self._labels[dataset.name] = (examples.labels, examples.parts)
        return self._labels[dataset.name]

    def _test_images(self, name: str) -> bool:
        """Whether a dataset has test images: one of unlabelled images may have none."""
        dataset = get_dataset(name)
        if dataset.pool_labels == "known":
            return True
        return "test" in self._labels_and_parts(dataset)[1]

    def check_validation(self, name: str) -> None:
        """Check that a dataset has validation images: one of unlabelled images may have none.

        Raises:
            InvalidSetting: it has none.
        """
        dataset = get_dataset(self.folders.get(name, name))
        if dataset.pool_labels == "unknown" and "val" not in self._labels_and_parts(dataset)[1]:
            problem = InvalidSetting(
                "dataset",
                f"{name} has no validation images for the objective validation_accuracy; label "
                f"some in its {LABELS} with the part val, or set objective: mutual_information",
            )
            problem.value = name
            raise problem

    def with_scored_images(self, trial: TrialSpec) -> TrialSpec:
        """Set the number of pool images that the evidence scores, if it is used."""
        if not uses_evidence(trial):
            return trial
        size = self._pool_images(trial)
        scored = min(size, trial.evidence.images or size)
        return replace(trial, scored_images=scored)

    def pool_size(self, trial: TrialSpec) -> int | None:
        """Number of pool images of a trial; None if it cannot be known."""
        try:
            return self._pool_images(trial)
        except ValueError:
            return None

    def _check_generator(self, trial: TrialSpec) -> None:
        """
        Raises:
            ValueError: the model does not draw from text, or LoRA and evidence cannot use it.
        """
        if trial.generator.kind and trial.generator.kind not in FAMILIES:
            _check_draws(generator_folder(trial.generator.name))
        remedies = {"lora: null": trial.lora, "evidence.draws: 0": uses_evidence(trial)}
        if needed := " and ".join(setting for setting, used in remedies.items() if used):
            folder = generator_folder(trial.generator.name)
            check_denoiser(folder, f"set {needed} to draw images only")

    def _check_ready_images(self, name: str, trial: TrialSpec) -> None:
        """Check that a folder of ready images has as many per class as the trial reads.

        Raises:
            MissingInput: a class has too few.
        """
        if name not in self._smallest:
            files = class_files(images_folder(name), trial.classnames)
            self._smallest[name] = min(
                (len(paths), classname) for classname, paths in files.items()
            )
        fewest, classname = self._smallest[name]
        if fewest < trial.images_per_class:
            raise MissingInput(
                f"generator {name!r}: class {classname!r} has {fewest} images, but "
                f"images_per_class is {trial.images_per_class}; add images, or lower "
                "images_per_class"
            )

    def code_versions(self, datasets: Sequence[str]) -> CodeVersions:
        """Code versions that are not those of the recipes, by part, for trials on datasets."""
        if self.versions is not None:
            return tuple(self.versions.items())
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
            ValueError: too many images are visibly damaged, or test images of a folder are also
                training images.
        """
        files = dataset.files(self.data_root)
        digests = self.file_digests(files)
        self._check_images(dataset.name, files)
        if dataset.name.startswith(PREFIX):
            check_no_leak(Path(dataset.source), dict(zip(files, digests, strict=True)))
        return dataset_ref(dataset, files, digests)

    def _check_images(self, name: str, files: Sequence[Path]) -> None:
        """
        Raises:
            ValueError: too many images are visibly damaged. The stage of the features decodes all,
                and refuses more than the same share of them.
        """
        problems = [self.unreadable[file] for file in files if file in self.unreadable]
        if problem := too_many_unreadable(name, problems, count_images(files), BAD_SHARE):
            raise ValueError(f"{problem}; `airsweep check {name}` opens all")

    def inputs(self) -> dict[str, Any]:
        """Everything that was resolved so far, as plain data for `RecordedResolver`."""
        return {
            "datasets": {name: asdict(dataset) for name, dataset in self._datasets.items()},
            "weights": {
                f"{role} {name}": ref.digest for (role, name), ref in self._weights.items()
            },
            "paths": {f"{role} {name}": ref.name for (role, name), ref in self._weights.items()},
            "kinds": {f"{role} {name}": ref.kind for (role, name), ref in self._weights.items()},
            "code": self._code,
            "pools": self._pool_sizes,
            "drawing": self._drawing,
        }

    def model_defaults(self, role: str, name: str) -> dict[str, Any]:
        """Defaults of settings that the files of a model determine, by trial key."""
        if role != "generator":
            return {}
        if name not in self._drawing and not name.startswith("folder:"):
            with suppress(ValueError):  # `trial` explains what is wrong with the folder
                folder = generator_folder(located_weights(name, self.folders))
                self._drawing[name] = {
                    f"generation.{setting}": value
                    for setting, value in drawing_defaults(folder).items()
                }
        return self._drawing.get(name, {})

    def weights(self, role: str, name: str) -> Ref:
        """Resolve a backbone or generator, once for each name.

        Raises:
            MissingInput: no weights of this name exist; the message lists what is allowed.
            ValueError: a file is truncated, such as after an incomplete copy.
        """
        if (role, name) not in self._weights:
            self._weights[role, name] = self.weights_content(
                role, located_weights(name, self.folders)
            )
        return self._weights[role, name]


def _captions(trial: TrialSpec) -> dict[str, Templates]:
    """The texts that the diffusion model reads, by key."""
    lora = {} if trial.lora is None else {"lora.caption": trial.lora.caption}
    drawn = {"generation.template": trial.generation.template}
    return {**lora, **drawn, "evidence.template": trial.evidence.template}


def _check_labels_unneeded(trial: TrialSpec) -> None:
    """Check that a trial needs no label of a pool image.

    Raises:
        InvalidSetting: it needs some.
    """
    if problem := label_problem(trial.split):
        raise InvalidSetting("dataset", problem)
    if trial.images_from == "true_labels" or trial.initial_labels.true_share is not None:
        raise InvalidSetting(
            "dataset",
            "images_from: true_labels (method air_ceiling) and initial_labels.true_share (method "
            "air_labels) read the classes of the pool images, but they have no labels; leave the "
            "method out, or sort your images into class folders",
        )


@functools.cache
def _check_draws(folder: Path) -> None:
    """Check that a pipeline outside of the families draws from text.

    Raises:
        ValueError: it does not.
    """
    from air_core.diffusion.pipeline import check_classes  # diffusers takes seconds

    check_classes(folder)


class RecordedResolver(Resolver):
    """Resolves names to the digests and class names of a sweep's last run, and reads no files.

    Args:
        inputs: `Resolver.inputs` of that run.
    """

    def __init__(self, inputs: Mapping[str, Any], folders: Mapping[str, str]) -> None:
        self._recorded = {
            name: DatasetInput(Ref(**entry["ref"]), tuple(entry["classnames"]), entry["template"])
            for name, entry in inputs["datasets"].items()
        }
        self._weight_digests: Mapping[str, str] = inputs["weights"]
        self._paths: Mapping[str, str] = inputs["paths"]
        self._kinds: Mapping[str, str] = inputs["kinds"]
        self.versions, self.folders = inputs["code"], folders
        self._pool_sizes = inputs["pools"]
        self._drawing = inputs["drawing"]

    def dataset_by_name(self, name: str) -> DatasetInput:
        """Look up a dataset.

        Raises:
            NotRecorded: no run of the sweep has used the dataset.
        """
        if name not in self._recorded:
            raise NotRecorded(f"no run of this sweep has used the dataset {name}")
        return self._recorded[name]

    def weights(self, role: str, name: str) -> Ref:
        """Look up weights.

        Raises:
            NotRecorded: no run of the sweep has used the weights.
        """
        digest = self._weight_digests.get(f"{role} {name}")
        if digest is None:
            raise NotRecorded(f"no run of this sweep has used the {role} {name}")
        return Ref(
            name=self._paths[f"{role} {name}"], digest=digest, kind=self._kinds[f"{role} {name}"]
        )

    def model_defaults(self, role: str, name: str) -> dict[str, Any]:
        """Defaults as of the last run."""
        return self._drawing.get(name, {}) if role == "generator" else {}

    def check(self, trial: TrialSpec, datasets: Mapping[str, DatasetInput]) -> None:
        """Do nothing: the last run checked its trials."""

    def check_validation(self, name: str) -> None:
        """Do nothing: the last run checked its datasets."""

    def _pool_images(self, trial: TrialSpec) -> int:
        """
        Raises:
            NotRecorded: no run of the sweep has used the split of the trial.
        """
        name = _split_name(trial)
        if name not in self._pool_sizes:
            raise NotRecorded(f"no run of this sweep has used this split: {name}")
        return self._pool_sizes[name]

    def save(self) -> None:
        """Do nothing: no file was read."""


class NotRecorded(ValueError):
    """A dataset or weights that no run of a sweep has used."""


def with_model_defaults(sweep: SweepSpec, resolver: Resolver) -> SweepSpec:
    """The sweep with the defaults of its models, without the embedded ones."""
    choices = (sweep.fixed, *(override.set for override in sweep.overrides))
    worlds = {}
    for role in ("backbone", "generator"):
        names = {str(each[role]) for each in choices if role in each}
        names |= {str(name) for name in (sweep.axes or sweep.grid).get(role, ())}
        for name in sorted(names - {EMBEDDED[role]}):
            worlds[role, name] = resolver.model_defaults(role, name)
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


def _split_name(trial: TrialSpec) -> str:
    return f"{trial.dataset.name} {canonical_json(plain(trial.split))}"


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
    """The resolver for a sweep's inputs. For a `recorded` location, it reads recorded digests.

    Args:
        folders: of the sweep; None: it has no relative folders.
    """
    folders = folders or {}
    cache = location.store.root / "digests.json"
    if location.recorded:
        with suppress(FileNotFoundError):
            inputs = read_resolved(location).get("inputs")
            # Earlier versions of airsweep recorded no inputs.
            if inputs:
                return RecordedResolver(inputs, folders)
            return Resolver(cache, location.data_root, {}, folders)
    return Resolver(cache, location.data_root, None, folders)
