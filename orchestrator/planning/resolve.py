"""Resolve the names of datasets and weights to digests of their files.

Digests of files are cached by path, size and modification time, so planning reads unchanged weights
only once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from air_core.datasets import Dataset, get_dataset
from air_core.datasets.class_folders import class_files
from air_core.methods import EMBEDDED
from air_core.paradigms import TooFewImages, split_positions
from air_core.seal import sealed_json
from air_core.specs import (
    CodeVersions,
    Ref,
    SplitSettings,
    TrialSpec,
    labels_use_evidence,
    reader_of,
    uses_evidence,
    uses_generator,
)
from air_core.specs.flat import from_flat
from air_core.tokens import check_room
from air_core.weights import GENERATORS as PIPELINES
from air_core.weights import (
    check_lora_fits,
    check_whole,
    generator_files,
    generator_folder,
    is_distilled,
    scheduler_config,
    weights_files,
    weights_settings,
)
from orchestrator.failures import is_disk_full
from orchestrator.files import file_digest, file_stamp, write_atomic
from orchestrator.keys import canonical_json, digest, plain
from orchestrator.store import SweepLocation, read_resolved
from orchestrator.store.code_version import unlisted_versions
from orchestrator.store.verification import read_cache


class MissingInput(ValueError):
    """Weights or images that a sweep names are missing."""


@dataclass(frozen=True)
class DatasetInput:
    """A resolved dataset: the digest of its content, its class names and its template."""

    ref: Ref
    classnames: tuple[str, ...]
    template: str


@dataclass
class Resolver:
    """Resolves the names in one sweep to Refs, each of which has a name and a digest.

    Args:
        cache: JSON file with the digests of files.
        data_root: folder of real datasets.
        versions: code versions of an earlier run, by part; None: those of the installed code.
    """

    cache: Path
    data_root: Path | None
    versions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        # Stamp and digest by path. Entries of earlier versions have another shape and never match.
        self._digests: dict[str, list[Any]] = read_cache(self.cache, _entries, {})
        self._saved = dict(self._digests)
        self._refs: dict[tuple[str, str], Ref] = {}
        self._datasets: dict[str, DatasetInput] = {}
        self._labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # labels, parts by dataset
        self._pool_sizes: dict[str, int] = {}  # by `_split_name`
        self._code: dict[str, str] = {}
        self._smallest: dict[str, tuple[int, str]] = {}  # class of the fewest images, by folder

    def trial(self, flat: dict[str, Any]) -> TrialSpec:
        """Build a TrialSpec from a flat dict of settings with names of inputs.

        Raises:
            ValueError: weights or images are missing, or too few.
        """
        flat = EMBEDDED | flat
        dataset = self.dataset_by_name(flat["dataset"])
        refs = {
            "dataset": dataset.ref,
            "backbone": self.weights("backbone", flat["backbone"]),
            "generator": Ref(name=flat["generator"], digest=""),
        }
        datasets = [dataset]
        if flat.get("test_dataset") is not None:
            datasets.append(self.dataset_by_name(flat["test_dataset"]))
            refs["test_dataset"] = datasets[-1].ref
        trial = from_flat(flat, refs, dataset.classnames)
        trial = replace(trial, code=self.code_versions([dataset.ref.name for dataset in datasets]))
        # A trial that does not use the generator does not need it to exist.
        if uses_generator(trial):
            trial = replace(trial, generator=self.weights("generator", flat["generator"]))
        self.check(trial, datasets)
        return self.with_scored_images(trial)

    def check(self, trial: TrialSpec, datasets: Sequence[DatasetInput]) -> None:
        """Check that the inputs of a trial are sufficient.

        Raises:
            ValueError: a class name is too long, images are too few, a LoRA does not fit the
                generator, or the evidence has no time step.
        """
        learned = trial.prompt.length if trial.modality == "text" and trial.iterations else 0
        for dataset in datasets:
            check_room(trial.backbone.name, dataset.classnames, dataset.template, learned)
        if trial.paradigm == "ssl":
            self._check_split(get_dataset(trial.dataset.name), trial.split)
        low, high = trial.evidence.low, trial.evidence.high
        if uses_evidence(trial) and low > high:
            raise ValueError(
                f"evidence.low is {low}, but evidence.high is {high}; allowed: low <= high"
            )
        if uses_generator(trial):
            if trial.generator.name.startswith("folder:"):
                if uses_evidence(trial):
                    raise ValueError(
                        f"generator {trial.generator.name!r} is a folder of images, but "
                        "evidence.draws needs a diffusion model; set evidence.draws: 0, or name a "
                        "diffusers folder"
                    )
                self._check_ready_images(trial.generator.name, trial)
            elif trial.lora is not None or uses_evidence(trial):
                check_lora_fits(generator_folder(trial.generator.name))

    def _check_split(self, dataset: Dataset, split: SplitSettings) -> None:
        """Check that every class has enough images for the split.

        Raises:
            ValueError: a class has too few.
        """
        if _split_name(dataset.name, split) in self._pool_sizes:
            return
        if dataset.name not in self._labels:
            examples = dataset.load(self.data_root)
            self._labels[dataset.name] = (examples.labels, examples.parts)
        try:
            positions, _ = split_positions(*self._labels[dataset.name], split)
        except TooFewImages as problem:
            name = dataset.classnames[problem.class_index]
            raise ValueError(f"{dataset.name}: {problem}; it is {name!r}") from problem
        self._pool_sizes[_split_name(dataset.name, split)] = len(positions["pool"])

    def with_scored_images(self, trial: TrialSpec) -> TrialSpec:
        """Set the number of images of the pool, and of those that the evidence scores, if any."""
        if not uses_evidence(trial) and not labels_use_evidence(trial):
            return trial
        self._check_split(get_dataset(trial.dataset.name), trial.split)
        size = self._pool_sizes[_split_name(trial.dataset.name, trial.split)]
        scored = min(size, trial.evidence.images or size)
        return replace(trial, scored_images=scored, pool_images=size)

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
        """Code versions, by part, that no recipe number covers, for trials on these datasets."""
        if self.versions is not None:
            return tuple(self.versions.items())
        versions = unlisted_versions(*map(reader_of, datasets))
        self._code |= versions
        return versions

    def dataset_by_name(self, name: str) -> DatasetInput:
        """Resolve a dataset by name.

        Raises:
            ValueError: no dataset has this name.
            MissingInput: a file of the dataset is missing.
        """
        if name not in self._datasets:
            dataset = get_dataset(name)
            ref = self.dataset(dataset)
            self._datasets[name] = DatasetInput(ref, dataset.classnames, dataset.template)
        return self._datasets[name]

    def dataset(self, dataset: Dataset) -> Ref:
        """Resolve a dataset, once for each name."""
        key = ("dataset", dataset.name)
        if key not in self._refs:
            self._refs[key] = self.dataset_content(dataset)
        return self._refs[key]

    def dataset_content(self, dataset: Dataset) -> Ref:
        """Resolve a dataset from its files as they are now, even if it was resolved before."""
        files = dataset.files(self.data_root)
        content = {
            "files": list(zip(_relative_paths(files), self._file_digests(files), strict=True)),
            "classnames": dataset.classnames,
            "template": dataset.template,
            "recipe": dataset.recipe,
        }
        return Ref(name=dataset.name, digest=digest(content))

    def inputs(self) -> dict[str, Any]:
        """Everything that was resolved so far, as plain data for `RecordedResolver`."""
        weights = ((role, ref) for (role, _), ref in self._refs.items() if role != "dataset")
        return {
            "datasets": {name: asdict(dataset) for name, dataset in self._datasets.items()},
            "weights": {f"{role} {ref.name}": ref.digest for role, ref in weights},
            "code": self._code,
            "pools": self._pool_sizes,
        }

    def weights(self, role: str, name: str) -> Ref:
        """Resolve a backbone or generator, once for each name.

        Raises:
            MissingInput: no weights of this name exist; the message lists what is allowed.
            ValueError: a file is truncated, such as after an incomplete copy.
        """
        if (role, name) not in self._refs:
            self._refs[role, name] = self.weights_content(role, name)
        return self._refs[role, name]

    def weights_content(self, role: str, name: str) -> Ref:
        """Resolve weights from their files as they are now, even if they were resolved before."""
        try:
            folder, files = input_files(role, name)
            settings = weights_settings(name) if role == "backbone" else {}
        except ValueError as problem:
            raise MissingInput(str(problem)) from None
        paths = [str(file.relative_to(folder)) for file in files]
        content: dict[str, Any] = dict(zip(paths, self._file_digests(files), strict=True))
        if role == "generator" and is_distilled(scheduler_config(folder)):
            content = {"files": content, "sampler": "own"}  # earlier versions replaced it
        if settings:  # with another architecture, the same file is another model
            content = {"files": content, "settings": settings}
        return Ref(name=name, digest=digest(content))

    def save(self) -> None:
        """Write the digests of files to the cache, for the next process."""
        if self._digests != self._saved:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_atomic(self.cache, sealed_json(self._digests))
            except OSError as problem:
                if not is_disk_full(problem):  # a full disk: the next process reads the files again
                    raise
            self._saved = dict(self._digests)

    def has_digests_of(self, files: Sequence[Path]) -> bool:
        """Whether this resolver has digests of these files as they are now."""
        with suppress(OSError):
            return all(self._known_digest(file, [*file_stamp(file)]) for file in files)
        return False

    def _known_digest(self, file: Path, stamp: list[int]) -> str | None:
        """The digest of a file that had this stamp when it was read; None: it was another."""
        entry = self._digests.get(str(file.resolve()), [])
        return str(entry[-1]) if entry[:-1] == stamp else None

    def _file_digests(self, paths: Sequence[Path]) -> list[str]:
        digests = []
        for path in paths:
            if not path.is_file():
                raise MissingInput(f"{path} does not exist")
            stamp = [*file_stamp(path)]
            known = self._known_digest(path, stamp)
            if known is None:
                check_whole(path)
                known = file_digest(path)
                self._digests[str(path.resolve())] = [*stamp, known]
            digests.append(known)
        return digests


class RecordedResolver(Resolver):
    """Resolves names to the digests and class names of a sweep's last run, and reads no files.

    Args:
        inputs: `Resolver.inputs` of that run.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._recorded = {
            name: DatasetInput(Ref(**entry["ref"]), tuple(entry["classnames"]), entry["template"])
            for name, entry in inputs["datasets"].items()
        }
        self._weights: Mapping[str, str] = inputs["weights"]
        self.versions = inputs.get("code", {})
        self._pool_sizes = inputs.get("pools", {})  # earlier versions recorded none

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
        digest = self._weights.get(f"{role} {name}")
        if digest is None:
            raise NotRecorded(f"no run of this sweep has used the {role} {name}")
        return Ref(name=name, digest=digest)

    def check(self, trial: TrialSpec, datasets: Sequence[DatasetInput]) -> None:
        """Do nothing: the last run checked its trials."""

    def _check_split(self, dataset: Dataset, split: SplitSettings) -> None:
        """
        Raises:
            NotRecorded: no run of the sweep has used this split.
        """
        if _split_name(dataset.name, split) not in self._pool_sizes:
            raise NotRecorded(
                f"no run of this sweep has used this split of {dataset.name}: {split}"
            )

    def save(self) -> None:
        """Do nothing: no file was read."""


class NotRecorded(ValueError):
    """A dataset or weights that no run of a sweep has used."""


def _split_name(dataset: str, split: SplitSettings) -> str:
    return f"{dataset} {canonical_json(plain(split))}"


def _entries(plain: dict[str, Any]) -> dict[str, list[Any]]:
    return {path: [*entry] for path, entry in plain.items()}


def _relative_paths(files: Sequence[Path]) -> list[str]:
    """Paths of files below their common folder.

    Folder names count, since they may be classes; the location of the common folder does not.
    """
    common = os.path.commonpath([file.parent for file in files])
    return [str(file.relative_to(common)) for file in files]


def input_files(role: str, name: str) -> tuple[Path, list[Path]]:
    """The folder and all files of weights or ready images.

    Raises:
        ValueError: the files are missing.
    """
    if role == "backbone":
        files = weights_files(name)
        return Path(os.path.commonpath([file.parent for file in files])), files
    folder = images_folder(name)
    if not name.startswith("folder:"):
        return folder, generator_files(folder)
    if not folder.is_dir():
        raise ValueError(f"generator {name!r}: {folder} does not exist; allowed: {GENERATORS}")
    return folder, sorted(path for path in folder.rglob("*") if path.is_file())


GENERATORS = f"{PIPELINES}, or folder:<path> of ready images"


def images_folder(generator: str) -> Path:
    """Folder of a generator: a diffusers pipeline, or ready images."""
    if generator.startswith("folder:"):
        return Path(generator.removeprefix("folder:")).expanduser().absolute()
    return generator_folder(generator)


def text_digest(text: str) -> str:
    """Digest of a text, such as a sweep file, as 12 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def resolver_of(location: SweepLocation) -> Resolver:
    """The resolver for a sweep's inputs. For a `recorded` location, it reads recorded digests."""
    cache = location.store.root / "digests.json"
    if location.recorded:
        with suppress(FileNotFoundError):
            inputs = read_resolved(location).get("inputs")
            # Earlier versions of airsweep recorded no inputs.
            return RecordedResolver(inputs) if inputs else Resolver(cache, location.data_root, {})
    return Resolver(cache, location.data_root)
