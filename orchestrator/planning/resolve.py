"""Names from outside become content digests before anything is hashed.

Digests of files are cached by (path, size, mtime), so planning reads no weights twice.
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
from air_core.flat import from_flat
from air_core.paradigms import TooFewImages, split_positions
from air_core.seal import sealed_json
from air_core.specs import CodeVersions, Ref, SplitSettings, TrialSpec, reader_of, uses_images
from air_core.tokens import check_room
from air_core.weights import GENERATORS as PIPELINES
from air_core.weights import (
    check_lora_fits,
    check_whole,
    generator_files,
    generator_folder,
    weights_files,
    weights_settings,
)
from orchestrator.failures import no_room
from orchestrator.files import file_digest, file_stamp, write_whole
from orchestrator.keys import digest
from orchestrator.spec.presets import OUTSIDE
from orchestrator.store import SweepLocation, read_resolved
from orchestrator.store.code_version import unlisted_versions
from orchestrator.store.verification import read_cache


class NotThere(ValueError):
    """Weights or images that a spec names are not there."""


@dataclass(frozen=True)
class DatasetInput:
    """A dataset: the digest of its content, its classes and its template."""

    ref: Ref
    classnames: tuple[str, ...]
    template: str


@dataclass
class Resolver:
    """Refs for the names of one sweep.

    Args:
        cache: a JSON file for digests.
        data_root: folder of real datasets.
        versions: of the code of an earlier run, by part; None: of the code here.
    """

    cache: Path
    data_root: Path | None
    versions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        # Stamp and digest by path; an entry of another shape is one of an earlier version.
        self._digests: dict[str, list[Any]] = read_cache(self.cache, _entries, {})
        self._known = dict(self._digests)
        self._refs: dict[tuple[str, str], Ref] = {}
        self._datasets: dict[str, DatasetInput] = {}
        self._labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # and parts, of a dataset
        self._split: set[tuple[str, SplitSettings]] = set()  # those that can be made
        self._code: dict[str, str] = {}
        self._ready: dict[str, tuple[int, str]] = {}  # fewest images, and of which class

    def trial(self, flat: dict[str, Any]) -> TrialSpec:
        """A TrialSpec from a flat dict that still has names.

        Raises:
            ValueError: weights or images are missing, or too few.
        """
        flat = OUTSIDE | flat
        dataset = self.named(flat["dataset"])
        refs = {
            "dataset": dataset.ref,
            "backbone": self.weights("backbone", flat["backbone"]),
            "generator": Ref(name=flat["generator"], digest=""),
        }
        datasets = [dataset]
        if flat.get("test_dataset") is not None:
            datasets.append(self.named(flat["test_dataset"]))
            refs["test_dataset"] = datasets[-1].ref
        trial = from_flat(flat, refs, dataset.classnames)
        trial = replace(trial, code=self.code([one.ref.name for one in datasets]))
        # Where no images are used, the generator need not be there.
        if uses_images(trial):
            trial = replace(trial, generator=self.weights("generator", flat["generator"]))
        self.check(trial, datasets)
        return trial

    def check(self, trial: TrialSpec, datasets: Sequence[DatasetInput]) -> None:
        """
        Raises:
            ValueError: a class name is too long, images are too few, or a LoRA does not fit the
                generator.
        """
        learned = trial.prompt.length if trial.modality == "text" and trial.iterations else 0
        for one in datasets:
            check_room(trial.backbone.name, one.classnames, one.template, learned)
        if trial.paradigm == "ssl":
            self._labels_enough(get_dataset(trial.dataset.name), trial.split)
        if uses_images(trial):
            if trial.generator.name.startswith("folder:"):
                self._enough(trial.generator.name, trial)
            elif trial.lora is not None:
                check_lora_fits(generator_folder(trial.generator.name))

    def _labels_enough(self, dataset: Dataset, split: SplitSettings) -> None:
        """Before images are drawn for a split that cannot be made."""
        known = (dataset.name, split)
        if known in self._split:
            return
        if dataset.name not in self._labels:
            examples = dataset.load(self.data_root)
            self._labels[dataset.name] = (examples.labels, examples.parts)
        try:
            split_positions(*self._labels[dataset.name], split)
        except TooFewImages as problem:
            name = dataset.classnames[problem.class_index]
            raise ValueError(f"{dataset.name}: {problem}; it is {name!r}") from problem
        self._split.add(known)

    def _enough(self, name: str, trial: TrialSpec) -> None:
        """A folder of ready images has what the trial reads."""
        if name not in self._ready:
            files = class_files(images_folder(name), trial.classnames)
            self._ready[name] = min((len(of), c) for c, of in files.items())
        fewest, classname = self._ready[name]
        if fewest < trial.images_per_class:
            raise NotThere(
                f"generator {name!r}: class {classname!r} has {fewest} images there, but "
                f"images_per_class is {trial.images_per_class}; add some or ask for fewer"
            )

    def code(self, datasets: Sequence[str]) -> CodeVersions:
        """The versions of the code that no recipe number covers."""
        if self.versions is not None:
            return tuple(self.versions.items())
        found = unlisted_versions(*map(reader_of, datasets))
        self._code |= found
        return found

    def named(self, name: str) -> DatasetInput:
        """A dataset by name. Raises as `get_dataset`, and where its files are missing."""
        if name not in self._datasets:
            dataset = get_dataset(name)
            ref = self.dataset(dataset)
            self._datasets[name] = DatasetInput(ref, dataset.classnames, dataset.template)
        return self._datasets[name]

    def dataset(self, dataset: Dataset) -> Ref:
        known = ("dataset", dataset.name)
        if known not in self._refs:
            self._refs[known] = self.content(dataset)
        return self._refs[known]

    def content(self, dataset: Dataset) -> Ref:
        """A dataset as its files are now, whatever was found before."""
        found = dataset.files(self.data_root)
        content = {
            "files": list(zip(_places(found), self._file_digests(found), strict=True)),
            "classnames": dataset.classnames,
            "template": dataset.template,
            "recipe": dataset.recipe,
        }
        return Ref(name=dataset.name, digest=digest(content))

    def inputs(self) -> dict[str, Any]:
        """All that was resolved so far, as plain data for `RecordedResolver`."""
        weights = ((role, ref) for (role, _), ref in self._refs.items() if role != "dataset")
        return {
            "datasets": {name: asdict(target) for name, target in self._datasets.items()},
            "weights": {f"{role} {ref.name}": ref.digest for role, ref in weights},
            "code": self._code,
        }

    def weights(self, role: str, name: str) -> Ref:
        """A backbone or generator.

        Raises:
            NotThere: nothing of that name is here; says what is allowed.
            ValueError: a file is cut off, as one that was copied in part.
        """
        if (role, name) not in self._refs:
            self._refs[role, name] = self.weights_content(role, name)
        return self._refs[role, name]

    def weights_content(self, role: str, name: str) -> Ref:
        """The same as the files are now, whatever was found before."""
        try:
            folder, found = read_from(role, name)
            settings = weights_settings(name) if role == "backbone" else {}
        except ValueError as problem:
            raise NotThere(str(problem)) from None
        locations = [str(path.relative_to(folder)) for path in found]
        content: dict[str, Any] = dict(zip(locations, self._file_digests(found), strict=True))
        if settings:  # the same file is another model under another architecture
            content = {"files": content, "settings": settings}
        return Ref(name=name, digest=digest(content))

    def save(self) -> None:
        """Keep the digests for the next start."""
        if self._digests != self._known:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_whole(self.cache, sealed_json(self._digests))
            except OSError as problem:
                if not no_room(problem):  # then the next start reads the files again
                    raise
            self._known = dict(self._digests)

    def _file_digests(self, paths: Sequence[Path]) -> list[str]:
        found = []
        for path in paths:
            if not path.is_file():
                raise NotThere(f"{path} is not there")
            name = str(path.resolve())
            stamp = [*file_stamp(path)]
            known = self._digests.get(name)
            if known is None or known[:-1] != stamp:
                check_whole(path)
                known = [*stamp, file_digest(path)]
                self._digests[name] = known
            found.append(str(known[-1]))
        return found


class RecordedResolver(Resolver):
    """Gives the digests and class names that a sweep's last run found, and looks at no file.

    Args:
        inputs: what `Resolver.inputs` gave then.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._recorded = {
            name: DatasetInput(Ref(**of["ref"]), tuple(of["classnames"]), of["template"])
            for name, of in inputs["datasets"].items()
        }
        self._weights: Mapping[str, str] = inputs["weights"]
        self.versions = inputs.get("code", {})

    def named(self, name: str) -> DatasetInput:
        """
        Raises:
            NotRecorded: no run has used it.
        """
        if name not in self._recorded:
            raise NotRecorded(f"no run of this sweep has used the dataset {name}")
        return self._recorded[name]

    def weights(self, role: str, name: str) -> Ref:
        """
        Raises:
            NotRecorded: no run has used them.
        """
        digest = self._weights.get(f"{role} {name}")
        if digest is None:
            raise NotRecorded(f"no run of this sweep has used the {role} {name}")
        return Ref(name=name, digest=digest)

    def check(self, trial: TrialSpec, datasets: Sequence[DatasetInput]) -> None:
        """What was run fits."""

    def save(self) -> None:
        """Nothing was digested."""


class NotRecorded(ValueError):
    """A dataset or weights that no run of a sweep has used."""


def _entries(kept: dict[str, Any]) -> dict[str, list[Any]]:
    return {path: [*entry] for path, entry in kept.items()}


def _places(files: Sequence[Path]) -> list[str]:
    """Files by their place below what they have in common: folders may be classes, and where the
    whole of it lies does not matter."""
    common = os.path.commonpath([file.parent for file in files])
    return [str(file.relative_to(common)) for file in files]


def read_from(role: str, name: str) -> tuple[Path, list[Path]]:
    """All files that make up weights or ready images, and the folder that they are in."""
    if role == "backbone":
        found = weights_files(name)
        return Path(os.path.commonpath([path.parent for path in found])), found
    folder = images_folder(name)
    if not name.startswith("folder:"):
        return folder, generator_files(folder)
    if not folder.is_dir():
        raise ValueError(f"generator {name!r}: {folder} is not there; allowed: {GENERATORS}")
    return folder, sorted(path for path in folder.rglob("*") if path.is_file())


GENERATORS = f"{PIPELINES}, or folder:<path> of ready images"


def images_folder(generator: str) -> Path:
    """Where a generator lies: a diffusers folder, or one of ready images."""
    if generator.startswith("folder:"):
        return Path(generator.removeprefix("folder:")).expanduser().absolute()
    return generator_folder(generator)


def text_digest(text: str) -> str:
    """12 hex digits of a text, such as a sweep file."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def resolver_of(location: SweepLocation) -> Resolver:
    """The resolver of a sweep's inputs; where the place is `recorded`, by recorded digests."""
    cache = location.store.root / "digests.json"
    if location.recorded:
        with suppress(FileNotFoundError):
            inputs = read_resolved(location).get("inputs")
            # Earlier versions of airsweep recorded none.
            return RecordedResolver(inputs) if inputs else Resolver(cache, location.data_root, {})
    return Resolver(cache, location.data_root)
