"""Reads and writes bundle folders: `bundle.json` and safetensors files.

    bundle.json                  classes, backbone, metrics, lineage; digests of the other files
    text_features.safetensors    text_features (C, D) of unit length, logit_scale ()
    prompt.safetensors           prompt: the learned vectors; missing if nothing was learned
    fused.safetensors            auxiliary classifier and fusion, see `arrays`; missing without them
    model.onnx                   image tower and a classifier in one file; missing without --onnx

Digests are SHA-256, as for published weights; `bundle.json` has a seal (`air_core.tools.seal`).
Both do not make a bundle trustworthy, so its contents are checked as well, and paths in it are
never used. Imports no torch and opens no image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from air_core.bundle.checks import FORMS, ONNX, PROMPT, Arrays, check_arrays, classifiers
from air_core.bundle.content import BackboneContent, Content, checked
from air_core.models.weights import ClipWeights, find_backbone, public_backbone
from air_core.settings.components import LEARNERS
from air_core.tools.seal import intact, sealed_json

MANIFEST = "bundle.json"
LICENCE = (
    "The backbone's weights are not in this folder and have a separate licence. The learned "
    "vectors were trained on images under the licences below."
)


@dataclass(frozen=True)
class Manifest:
    """The checked contents of a bundle, unchanged since the export."""

    folder: Path
    content: Content  # bundle.json
    arrays: Arrays

    @property
    def classnames(self) -> tuple[str, ...]:
        return tuple(self.content.classnames)

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The classifiers that the bundle contains, of text, auxiliary and fused."""
        return classifiers(self.content, self.arrays)

    def selected(self, classifier: str | None = None) -> str:
        """A classifier of the bundle; None: the one that was selected at the export.

        Raises:
            ValueError: the bundle does not contain it.
        """
        if classifier is None:
            return self.content.classifier
        if classifier not in self.classifiers:
            raise ValueError(
                f"{self.folder} has no classifier {classifier!r}; it has: "
                f"{', '.join(self.classifiers)}"
            )
        return classifier

    def temperature(self, classifier: str) -> float:
        return self.content.temperatures.get(classifier, 1.0)

    @property
    def reads_tokens(self) -> bool:
        """Whether the learned prompt reads image tokens."""
        return PROMPT in self.arrays and "tokens" in LEARNERS[self.content.modality].facts

    def onnx_file(self) -> Path:
        """The file `model.onnx`.

        Raises:
            ValueError: the bundle has none.
        """
        if ONNX not in self.content.files:
            raise ValueError(
                f"{self.folder} has no {ONNX}; export it again with --onnx, or use --runtime torch"
            )
        return Path(self.folder, ONNX)

    def backbone(self, weights: str | None = None) -> ClipWeights:
        """Find the backbone on this machine and compare its digests with the recorded ones.

        Args:
            weights: the user's name or path of the backbone. Default: the published weights that
                the bundle names. Paths in a bundle are never used.

        Raises:
            ValueError: the backbone differs or is not on this machine, or the bundle names no
                published weights.
        """
        wanted = self.content.backbone
        learned = f"{self.folder} was trained with {_in_words(wanted)}"
        try:
            found = find_backbone(weights) if weights else public_backbone(wanted.name or "")
        except ValueError as problem:
            raise ValueError(f"{problem}; {learned}: give its path with --weights") from None
        if found is None:
            raise ValueError(
                f"{learned}; these weights are not published, so give --weights PATH: a folder "
                "or <architecture>@<file> with the same content"
            )
        if (wanted.files, wanted.settings) != (_digests(found), _settings(found)):
            raise ValueError(
                f"{learned}; files, architecture or preprocessing of {weights or wanted.name!r} "
                "differ: give the path of the right ones with --weights"
            )
        return found


# ---------------------------------------------------------------- backbones


def weights_description(name: str) -> dict[str, Any]:
    """Describe a backbone for bundle.json: digests, settings, and arguments for open_clip.

    The result contains no path of this machine. `name` is None unless the weights are published.

    Raises:
        ValueError: the backbone is not on this machine.
    """
    found = find_backbone(name)
    public = name == "tiny" or (bool(found.settings) and "@" not in name)
    return {
        "name": name if public else None,
        "open_clip": _arguments(name, found),
        "files": _digests(found),
        "settings": _settings(found),
    }


def _digests(found: ClipWeights) -> dict[str, str]:
    """SHA-256 of each file, by its path relative to the common folder."""
    files = found.files
    top = os.path.commonpath([path.parent for path in files])
    return {path.relative_to(top).as_posix(): _file_digest(path) for path in files}


def _settings(found: ClipWeights) -> dict[str, Any]:
    return dict(json.loads(json.dumps(found.settings)))  # turns tuples into lists, as JSON does


def _arguments(name: str, found: ClipWeights) -> dict[str, Any]:
    """Arguments of open_clip.create_model_and_transforms, without paths of this machine."""
    if not found.settings:
        return {"model_name": "local-dir:FOLDER"}
    _, slash, tag = name.partition("/")
    known = slash and "@" not in name
    return {
        "model_name": found.name,
        "pretrained": tag if known else found.path.name,
        "force_quick_gelu": bool(found.model.get("quick_gelu")),
    }


def _in_words(backbone: BackboneContent) -> str:
    """Architecture and digests of a backbone in bundle.json, for a message."""
    architecture = str(backbone.open_clip.get("model_name", ""))
    if not architecture or architecture.startswith("local-dir:"):
        architecture = "an open_clip folder"
    files = [f"{name} sha256 {digest[:12]}" for name, digest in sorted(backbone.files.items())]
    return f"{architecture} ({', '.join(files)})"


# ---------------------------------------------------------------- writing


def write_bundle(
    folder: Path,
    content: Mapping[str, Any],
    arrays: Arrays,
    replace: bool,
    check: Callable[[Manifest], None] = lambda manifest: None,
    onnx: Callable[[Manifest], bytes] | None = None,
) -> None:
    """Write a bundle atomically. The same content gives the same bytes.

    Args:
        content: that of bundle.json without format, digests and seal.
        arrays: by file, then by name; see `checks.FORMS`.
        replace: whether to replace an existing bundle.
        check: called with the written bundle before it is published; raises to prevent that.
        onnx: makes the content of `model.onnx`.

    Raises:
        ValueError: the folder is in use, or the contents are not valid.
    """
    check_free(folder, replace)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        for name, of in arrays.items():
            (work / name).write_bytes(
                save({key: np.asarray(a, order="C") for key, a in of.items()})
            )
        written = _described(work, content)
        if onnx is not None:
            (work / ONNX).write_bytes(onnx(written))
            written = _described(work, content)
        check(written)
        if folder.exists() and any(folder.iterdir()):
            old = work.with_name(f"{work.name}-old")
            os.rename(folder, old)
            os.rename(work, folder)
            shutil.rmtree(old)
        else:
            os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_free(folder: Path, replace: bool) -> None:
    """Check that a bundle can be written to a folder.

    Raises:
        ValueError: the folder is in use.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a bundle; give another folder")
    if not replace:
        raise ValueError(f"{folder} is already a bundle; give another folder, or --force")


def _described(folder: Path, content: Mapping[str, Any]) -> Manifest:
    """Write `bundle.json` beside the other files, and read the bundle."""
    digests = {file.name: _file_digest(file) for file in folder.iterdir() if file.name != MANIFEST}
    described = {**content, "format": 1, "files": digests}
    (folder / MANIFEST).write_bytes(sealed_json(described))
    return read_bundle(folder)


# ---------------------------------------------------------------- reading


def read_bundle(folder: str | Path) -> Manifest:
    """Read a bundle and check all its bytes and values.

    Raises:
        ValueError: the folder is not a bundle, has an unsupported format, was changed, or has
            invalid contents.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: not a bundle; create one with "
            "`airsweep export TRIAL -o DIR`"
        )
    try:
        data = (folder / MANIFEST).read_bytes()
        if not intact(data):
            raise ValueError(f"{MANIFEST} was changed after the export")
        content = checked(json.loads(data))
        for name, digest in content.files.items():
            if not (folder / name).is_file() or _file_digest(folder / name) != digest:
                raise ValueError(f"{name} is missing or was changed after the export")
        arrays: Arrays = {n: load((folder / n).read_bytes()) for n in FORMS if n in content.files}
        check_arrays(content, arrays)
    except (ValueError, SafetensorError) as problem:
        raise ValueError(f"{folder} is not a bundle: {problem}; export it again") from None
    return Manifest(folder, content, arrays)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
