"""Inputs of stages by content: digests of the files of datasets and models.

Digests of files are cached by path, size and modification time, so unchanged weights are read only
once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from air_core.datasets import Dataset
from air_core.datasets.class_folders import SUFFIXES
from air_core.datasets.image_folder import PREFIX
from air_core.datasets.images import visible_problem
from air_core.models.configs import PIPELINE_CONFIG, read_index
from air_core.models.weights import GENERATORS as PIPELINES
from air_core.models.weights import (
    find_backbone,
    generator_files,
    generator_folder,
    is_distilled,
    local_path,
    scheduler_config,
)
from air_core.settings import Ref
from air_core.settings.components import BACKBONES, REGISTRIES
from air_core.tools.seal import sealed_json
from orchestrator.files import file_digest, file_stamp, write_atomic
from orchestrator.keys import digest
from orchestrator.store.verification import read_cache


class MissingInput(ValueError):
    """Weights or images that a sweep names are missing."""


@dataclass(eq=False)
class Contents:
    """Datasets and models as their files are now.

    Args:
        cache: JSON file with the digests of files.
        data_root: folder of real datasets.
    """

    cache: Path
    data_root: Path | None

    def __post_init__(self) -> None:
        # Stamp and digest by path.
        self._digests: dict[str, list[Any]] = read_cache(self.cache, _entries, {})
        self._saved = dict(self._digests)
        self.unreadable: dict[Path, str] = {}  # images, with the reason

    def dataset_content(self, dataset: Dataset) -> Ref:
        """Resolve a dataset without a check of its images."""
        files = dataset.files(self.data_root)
        return dataset_ref(dataset, files, self.file_digests(files))

    def weights_content(self, role: str, name: str) -> Ref:
        """Resolve weights from their files as they are now, even if they were resolved before."""
        try:
            folder, files = input_files(role, name)
            is_open_clip = role == "backbone" and name not in BACKBONES
            settings = find_backbone(name).settings if is_open_clip else {}
        except ValueError as problem:
            raise MissingInput(str(problem)) from None
        kind = ""
        if role == "generator" and (folder / PIPELINE_CONFIG).is_file():
            kind = read_index(folder).kind
        paths = [str(file.relative_to(folder)) for file in files]
        content: dict[str, Any] = dict(zip(paths, self.file_digests(files), strict=True))
        if role == "generator" and is_distilled(scheduler_config(folder)):
            content = {"files": content, "sampler": "own"}
        if settings:  # with another architecture, the same file is another model
            content = {"files": content, "settings": settings}
        return Ref(name=name, digest=digest(content), kind=kind)

    def save(self) -> None:
        """Write the digests of files to the cache, for the next process.

        A store that does not exist is not created: a plan or a refused run leaves no folder behind.
        """
        # The next process looks at unreadable images again.
        unreadable = {*map(os.path.abspath, self.unreadable)}
        digests = {file: e for file, e in self._digests.items() if file not in unreadable}
        if digests != self._saved and self.cache.parent.is_dir():
            # On a full disk, or in a store of another user, the next process reads the files again.
            with suppress(OSError):
                write_atomic(self.cache, sealed_json(digests))
            self._saved = digests

    def has_digests_of(self, files: Sequence[Path]) -> bool:
        """Whether this resolver has digests of these files as they are now."""
        with suppress(OSError):
            return all(self._known_digest(file, [*file_stamp(file)]) for file in files)
        return False

    def _known_digest(self, file: Path, stamp: list[int]) -> str | None:
        """The digest of a file that had this stamp when it was read; None: it was another."""
        entry = self._digests.get(os.path.abspath(file), [])
        return str(entry[-1]) if entry[:-1] == stamp else None

    def file_digests(self, paths: Sequence[Path]) -> list[str]:
        digests = []
        for path in paths:
            shown = str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
            if shown != str(path):  # results contain the names of images
                raise ValueError(f"{shown} is not UTF-8; rename it")
            if not path.is_file():
                raise MissingInput(f"{path} does not exist, or is not a file")
            stamp = [*file_stamp(path)]
            known = self._known_digest(path, stamp)
            if known is None:
                known = file_digest(path)
                self._digests[os.path.abspath(path)] = [*stamp, known]
                if path.suffix.lower() in SUFFIXES and (problem := visible_problem(path)):
                    self.unreadable[path] = problem
            digests.append(known)
        return digests


def _entries(plain: dict[str, Any]) -> dict[str, list[Any]]:
    return {path: [*entry] for path, entry in plain.items()}


def dataset_ref(dataset: Dataset, files: Sequence[Path], digests: Sequence[str]) -> Ref:
    pairs = list(zip(_relative_paths(files), digests, strict=True))
    if dataset.name.startswith(PREFIX):  # of text files counts what is read: Excel changes bytes
        pairs = [(path, of) for path, of in pairs if Path(path).suffix.lower() in SUFFIXES]
    content: dict[str, Any] = {
        "files": pairs,
        "classnames": dataset.classnames,
        "template": dataset.template,
        "recipe": dataset.recipe,
    }
    ref = Ref(name=dataset.name, digest="", images=count_images(files))
    if dataset.pool_labels == "unknown":
        examples = dataset.load(None)
        content["labels"] = [examples.labels.tolist(), examples.parts.tolist()]
        ref = replace(ref, labelled=int((examples.labels >= 0).sum()))
    return replace(ref, digest=digest(content))


def count_images(files: Sequence[Path]) -> int:
    return sum(file.suffix.lower() in SUFFIXES for file in files)


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
    if name in REGISTRIES[role]:
        files = sorted(REGISTRIES[role].load(name).files())
        return Path(os.path.commonpath([file.parent for file in files] or ["/"])), files
    if role == "backbone":
        files = list(find_backbone(name).files)
        return Path(os.path.commonpath([file.parent for file in files])), files
    folder = images_folder(name)
    if not name.startswith("folder:"):
        return folder, generator_files(folder)
    if not folder.is_dir():
        raise ValueError(f"generator {name!r}: {folder} does not exist; allowed: {ALLOWED}")
    return folder, sorted(path for path in folder.rglob("*") if path.is_file())


ALLOWED = f"{PIPELINES}, or folder:<path> of ready images"


def images_folder(generator: str) -> Path:
    """Folder of a generator: a diffusers pipeline, or ready images."""
    if generator.startswith("folder:"):
        return local_path(generator.removeprefix("folder:"))
    return generator_folder(generator)
