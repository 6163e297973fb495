"""The folder of a bundle: safetensors, and `bundle.json` that says what they are.

    bundle.json                  classes, backbone, metrics, lineage; digests of the other files
    text_features.safetensors    text_features (C, D) of unit length, logit_scale ()
    prompt.safetensors           prompt: the learned vectors; not there where nothing was learned
    test.safetensors             index, predictions, labels (T,) of the images that it was tested on

Digests are SHA-256, by which weights are published too. `bundle.json` has its own, over itself
without it. Whoever writes a bundle can write digests that fit, so its contents are checked as well.
No path in it is ever followed. Imports no torch and opens no image.
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

from air_core.bundle.checks import PROMPT, TEST, TEXT, Arrays, check_contents, check_digests
from air_core.weights import (
    ClipFile,
    ClipFolder,
    find_backbone,
    public_backbone,
    weights_files,
    weights_settings,
)

FORMAT = 1
MANIFEST = "bundle.json"
FILES = (TEXT, PROMPT, TEST)  # no other name is ever opened
LICENCE = (
    "The backbone's weights are not in this folder and keep their own licence; what was learned "
    "here comes from images under the licences below."
)
MAKE = "make one by `airsweep export TRIAL -o DIR`"
SHOWN = 3  # files of weights in a message


@dataclass(frozen=True)
class Manifest:
    """A bundle as it lies there: whole, and as it was exported."""

    folder: Path
    said: Mapping[str, Any]  # bundle.json
    arrays: Arrays

    @property
    def classnames(self) -> tuple[str, ...]:
        return tuple(self.said["classnames"])

    @property
    def precision(self) -> str:
        return str(self.said["backbone"]["precision"])

    @property
    def text_features(self) -> np.ndarray:
        """(C, D), unit length."""
        return self.arrays[TEXT]["text_features"]

    @property
    def logit_scale(self) -> float:
        return float(self.arrays[TEXT]["logit_scale"])

    @property
    def visual_prompt(self) -> np.ndarray | None:
        """(P, V) or (layers, P, V) beside the patches; None: images are encoded as they are."""
        if self.said["modality"] != "visual" or PROMPT not in self.arrays:
            return None
        return self.arrays[PROMPT]["prompt"]

    def backbone(self, weights: str | None = None) -> ClipFolder | ClipFile:
        """Where the backbone lies on this machine; its digests are the recorded ones.

        Args:
            weights: the user's name or path of it; None: the published weights that the bundle
                names. A path in a bundle is never followed.

        Raises:
            ValueError: it is another one, is not here, or the bundle names no published weights.
        """
        wanted = self.said["backbone"]
        learned = f"{self.folder} was learned on {_in_words(wanted)}"
        try:
            found = find_backbone(weights) if weights else public_backbone(wanted.get("name") or "")
        except ValueError as problem:
            raise ValueError(f"{problem}; {learned}: --weights says where it lies here") from None
        if found is None:
            raise ValueError(
                f"{learned}; these are no published weights, so give --weights PATH: the folder, "
                "or <architecture>@<file>, with these bytes"
            )
        difference = _difference(wanted, found)
        if difference:
            raise ValueError(
                f"{self.folder} was learned on another backbone than "
                f"{weights or wanted['name']!r} here: {difference}; with these weights its prompt "
                "means nothing; --weights says where the others lie"
            )
        return found


# ---------------------------------------------------------------- backbones


def weights_said(name: str) -> dict[str, Any]:
    """What tells a backbone from all others, and how open_clip is asked for it.

    No path of this machine is in it: `name` is that of published weights, else None.

    Raises:
        ValueError: it is not here.
    """
    found = find_backbone(name)
    public = name == "tiny" or (isinstance(found, ClipFile) and "@" not in name)
    return {
        "name": name if public else None,
        "open_clip": _arguments(name, found),
        "architecture": _architecture(found),
        "files": _digests(found),
        "settings": _settings(found),
    }


def _digests(found: ClipFolder | ClipFile) -> dict[str, str]:
    """SHA-256 of each file, by its place below what they have in common."""
    files = weights_files(found)
    top = os.path.commonpath([path.parent for path in files])
    return {path.relative_to(top).as_posix(): _file_digest(path) for path in files}


def _settings(found: ClipFolder | ClipFile) -> dict[str, Any]:
    settings = weights_settings(found)
    return dict(json.loads(json.dumps(settings)))  # lists, as they are read again


def _architecture(found: ClipFolder | ClipFile) -> dict[str, Any]:
    """open_clip's configuration of both towers."""
    if isinstance(found, ClipFile):
        return found.model
    config = json.loads((found.path / "open_clip_config.json").read_text())
    return dict(config.get("model_cfg", {}))


def _arguments(name: str, found: ClipFolder | ClipFile) -> dict[str, Any]:
    """Of open_clip.create_model_and_transforms, without the folders of this machine."""
    if not isinstance(found, ClipFile):
        return {"model_name": "local-dir:FOLDER"}
    _, slash, tag = name.partition("/")
    known = slash and "@" not in name
    return {
        "model_name": found.architecture,
        "pretrained": tag if known else found.weights.name,
        "force_quick_gelu": bool(found.model.get("quick_gelu")),
    }


def _in_words(backbone: Mapping[str, Any]) -> str:
    """A backbone of bundle.json for a message: architecture and digests."""
    architecture = str(backbone["open_clip"].get("model_name", ""))
    if not architecture or architecture.startswith("local-dir:"):
        architecture = "an open_clip folder"
    files = [f"{name} {_short(digest)}" for name, digest in sorted(backbone["files"].items())]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{architecture} ({', '.join(files[:SHOWN])}{more})"


def _difference(wanted: Mapping[str, Any], found: ClipFolder | ClipFile) -> str:
    """The first thing by which two backbones differ; empty: none."""
    then, now = wanted["files"], _digests(found)
    for name in sorted({*then, *now}):
        one, other = then.get(name), now.get(name)
        if one != other:
            return f"{name} is {_short(other)} here and {_short(one)} there"
    if wanted["settings"] != _settings(found):
        return "the same file, but another architecture or preprocessing"
    return ""


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}" if digest else "missing"


# ---------------------------------------------------------------- writing


def write_bundle(
    folder: Path,
    said: Mapping[str, Any],
    arrays: Arrays,
    replace: bool,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> None:
    """A bundle, there whole or not at all; the same bytes for the same content.

    Args:
        said: all of bundle.json but format and digests.
        arrays: as `checks.check_contents` wants them.
        replace: put it in the place of another bundle.
        check: sees it before it is published, and raises where it must not be.

    Raises:
        ValueError: something else is there, or a bundle must not have such contents.
    """
    check_free(folder, replace)
    try:
        check_contents(said, arrays)
    except ValueError as problem:
        raise ValueError(f"{folder} would be no bundle: {problem}") from None
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        for name, of in arrays.items():
            assert name in FILES
            (work / name).write_bytes(
                save({key: np.asarray(a, order="C") for key, a in of.items()})
            )
        digests = {name: _file_digest(work / name) for name in sorted(arrays)}
        (work / MANIFEST).write_bytes(_sealed({**said, "format": FORMAT, "files": digests}))
        check(read_bundle(work))
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
    """A bundle can be written here.

    Raises:
        ValueError: something else is there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is there already, and is no bundle; give another folder")
    if not replace:
        raise ValueError(f"{folder} is a bundle already; give another folder, or --force")


def _sealed(said: Mapping[str, Any]) -> bytes:
    """JSON for people, the digest of its own bytes without it among it."""
    bare = json.dumps(said, indent=1, sort_keys=True, allow_nan=False).encode()
    digest = hashlib.sha256(bare).hexdigest()
    return json.dumps({**said, "digest": digest}, indent=1, sort_keys=True).encode() + b"\n"


# ---------------------------------------------------------------- reading


def read_bundle(folder: str | Path) -> Manifest:
    """A bundle, every byte and every value of it checked.

    Raises:
        ValueError: there is none, another version made it, a file of it was changed, or its
            contents are not those of a bundle.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        what = f"has no {MANIFEST}" if folder.is_dir() else "is not there, or no folder"
        raise ValueError(f"{folder} {what}: not a bundle; {MAKE}")
    said = _read_manifest(folder / MANIFEST)
    try:
        _check_files(said.get("files"))
        arrays = {name: _read_arrays(folder / name, said["files"][name]) for name in said["files"]}
        check_contents(said, arrays)
    except _Changed:
        raise
    except ValueError as problem:
        raise ValueError(f"{folder} is not a bundle: {problem}; export it again") from None
    return Manifest(folder, said, arrays)


class _Changed(ValueError):
    """Bytes are not those that were exported."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            f"{file} is not as it was exported, so {file.parent} is not a bundle: bytes were "
            "changed; export it again"
        )


def _read_manifest(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        said = json.loads(data)
        known = isinstance(said, dict) and _sealed({k: said[k] for k in said if k != "digest"})
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        raise _Changed(file) from None
    if known != data:
        raise _Changed(file)
    if said.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {said.get('format')!r}, and this version reads {FORMAT}; use the "
            "airsweep that made it, or export it again"
        )
    return dict(said)


def _check_files(files: Any) -> None:
    check_digests(files, "files")
    for name in files:
        if name not in FILES:
            raise ValueError(f"it names the file {name!r}; allowed: {', '.join(FILES)}")


def _read_arrays(file: Path, digest: str) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise _Changed(file)
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, TypeError, ValueError):  # KeyError: of a type numpy lacks
        raise ValueError(f"{file.name} is no safetensors file that can be read") from None


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
