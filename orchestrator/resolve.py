"""Names from outside become content digests before anything is hashed.

Digests of files are cached by (path, size, mtime), so planning reads no weights twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from air_core.datasets import Dataset, get_dataset
from air_core.datasets.class_folders import class_files
from air_core.specs import Ref, TrialSpec, from_flat, uses_images
from orchestrator.keys import digest
from orchestrator.presets import OUTSIDE
from orchestrator.store import file_digest, write_whole

EMBEDDED = {"backbone": "clip", "generator": "diffusion"}  # folders of the tiny world
MARKER = {"backbone": "open_clip_config.json", "generator": "model_index.json"}


class NotThere(ValueError):
    """Weights or images that a spec names are not there."""


@dataclass
class Resolver:
    """Refs for the names of one sweep.

    Args:
        cache: a JSON file for digests.
        data_root: folder of real datasets.
    """

    cache: Path
    data_root: Path | None

    def __post_init__(self) -> None:
        self._digests: dict[str, list[Any]] = {}
        if self.cache.exists():
            self._digests = json.loads(self.cache.read_text())
        self._known = dict(self._digests)
        self._refs: dict[tuple[str, str], Ref] = {}
        self._ready: dict[str, tuple[int, str]] = {}  # fewest images, and of which class

    def trial(self, flat: dict[str, Any]) -> TrialSpec:
        """A TrialSpec from a flat dict that still has names.

        Raises:
            ValueError: weights or images are missing, or too few.
        """
        flat = OUTSIDE | flat
        dataset = get_dataset(flat["dataset"])
        refs = {
            "dataset": self.dataset(dataset),
            "backbone": self.weights("backbone", flat["backbone"]),
            "generator": Ref(name=flat["generator"], digest=""),
        }
        rest = {name: value for name, value in flat.items() if name not in refs}
        trial = from_flat(rest, refs, dataset.classnames)
        # Where no images are used, the generator need not be there.
        if uses_images(trial):
            generator = self.weights("generator", flat["generator"])
            trial = replace(trial, generator=generator)
            if generator.name.startswith("folder:"):
                self._enough(generator.name, trial)
        return trial

    def _enough(self, name: str, trial: TrialSpec) -> None:
        """A folder of ready images has what the trial reads."""
        if name not in self._ready:
            files = class_files(folder_of("generator", name), trial.classnames)
            self._ready[name] = min((len(of), c) for c, of in files.items())
        fewest, classname = self._ready[name]
        if fewest < trial.images_per_class:
            raise NotThere(
                f"generator {name!r}: class {classname!r} has {fewest} images there, but "
                f"images_per_class is {trial.images_per_class}; add some or ask for fewer"
            )

    def dataset(self, dataset: Dataset) -> Ref:
        known = ("dataset", dataset.name)
        if known not in self._refs:
            found = dataset.files(self.data_root)
            content = {
                "files": list(zip(map(self._named, found), self._file_digests(found), strict=True)),
                "classnames": dataset.classnames,
                "template": dataset.template,
                "recipe": dataset.recipe,
            }
            self._refs[known] = Ref(name=dataset.name, digest=digest(content))
        return self._refs[known]

    def weights(self, role: str, name: str) -> Ref:
        """A backbone or generator.

        Raises:
            NotThere: no such folder, or not one of that kind.
        """
        if (role, name) not in self._refs:
            folder = folder_of(role, name)
            marker = MARKER[role]
            if not folder.is_dir():
                raise NotThere(
                    f"{role} {name!r}: {folder} is not there; allowed: tiny, or a folder with "
                    f"{marker}" + (", or folder:<path>" if role == "generator" else "")
                )
            if not name.startswith("folder:") and not (folder / marker).is_file():
                raise NotThere(f"{role} {name!r}: {folder} holds no {marker}")
            inside = sorted(p for p in folder.rglob("*") if p.is_file())
            content = dict(
                zip(
                    [str(p.relative_to(folder)) for p in inside],
                    self._file_digests(inside),
                    strict=True,
                )
            )
            self._refs[role, name] = Ref(name=name, digest=digest(content))
        return self._refs[role, name]

    def save(self) -> None:
        """Keep the digests for the next start."""
        if self._digests != self._known:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.cache, json.dumps(self._digests, indent=1, sort_keys=True))
            self._known = dict(self._digests)

    def _named(self, path: Path) -> str:
        """A dataset's file by its place below the data root; folders may be its classes."""
        if self.data_root is not None and path.is_relative_to(self.data_root):
            return str(path.relative_to(self.data_root))
        return path.name

    def _file_digests(self, paths: Sequence[Path]) -> list[str]:
        found = []
        for path in paths:
            if not path.is_file():
                raise NotThere(f"{path} is not there")
            stat = path.stat()
            name = str(path.resolve())
            stamp = [stat.st_size, stat.st_mtime_ns]
            known = self._digests.get(name)
            if known is None or known[:2] != stamp:
                known = [*stamp, file_digest(path)]
                self._digests[name] = known
            found.append(str(known[2]))
        return found


def folder_of(role: str, name: str) -> Path:
    """Where the weights of a name lie; the embedded ones come with the package."""
    if name == "tiny":
        return Path(str(files("air_core") / "tiny" / "weights" / EMBEDDED[role]))
    return Path(name.removeprefix("folder:")).expanduser().absolute()


def text_digest(text: str) -> str:
    """12 hex digits of a text, such as a sweep file."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
