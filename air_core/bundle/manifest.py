"""The folder of a bundle: safetensors, and `bundle.json` that says what they are.

    bundle.json                  classes, backbone, metrics, lineage; digests of the other files
    text_features.safetensors    text_features (C, D) of unit length, logit_scale ()
    prompt.safetensors           prompt: the learned vectors; not there where nothing was learned
    test.safetensors             index, predictions, labels (T,) of the images that it was tested on

Digests are SHA-256, by which weights are published too. `bundle.json` has its own, over itself
without it. Imports no torch and opens no image.
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
from safetensors.numpy import load, save

from air_core.weights import ClipFile, find_backbone, weights_files, weights_settings

FORMAT = 1
MANIFEST = "bundle.json"
TEXT, PROMPT, TEST = "text_features.safetensors", "prompt.safetensors", "test.safetensors"
FILES = (TEXT, PROMPT, TEST)  # no other name is ever opened
LICENCE = (
    "The backbone's weights are not in this folder and keep their own licence; what was learned "
    "here comes from images under the licences below."
)
WANTED = {
    "classnames": list,
    "template": str,
    "modality": str,
    "backbone": dict,
    "metrics": dict,
    "test": dict,
    "lineage": dict,
    "files": dict,
}
MAKE = "make one by `airsweep export TRIAL -o DIR`"

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # by file, then by name


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

    def backbone_name(self, weights: str | None) -> str:
        return weights or str(self.said["backbone"]["name"])

    def check_weights(self, weights: str | None = None) -> None:
        """The backbone of that name is on this machine, and is the one that was learned on.

        Raises:
            ValueError: it is another one, or is not here.
        """
        wanted, name = self.said["backbone"], self.backbone_name(weights)
        try:
            here = weights_said(name)
        except ValueError as problem:
            raise ValueError(
                f"{problem}; {self.folder} was learned on {wanted['name']!r}: --weights says where "
                "it lies here"
            ) from None
        difference = _difference(wanted, here)
        if difference:
            raise ValueError(
                f"{self.folder} was learned on another backbone than {name!r} here: {difference}; "
                "with these weights its prompt means nothing; --weights says where the others lie"
            )


# ---------------------------------------------------------------- backbones


def weights_said(name: str) -> dict[str, Any]:
    """What tells a backbone from all others, and how open_clip is asked for it.

    Raises:
        ValueError: it is not here.
    """
    found, files = find_backbone(name), weights_files(name)
    settings = weights_settings(name) if isinstance(found, ClipFile) else {}
    top = os.path.commonpath([path.parent for path in files])
    return {
        "name": name,
        "open_clip": _arguments(name),
        "architecture": _architecture(name),
        "files": {path.relative_to(top).as_posix(): _file_digest(path) for path in files},
        "settings": json.loads(json.dumps(settings)),  # lists, as they are read again
    }


def _architecture(name: str) -> dict[str, Any]:
    """open_clip's configuration of both towers."""
    found = find_backbone(name)
    if isinstance(found, ClipFile):
        return found.model
    config = json.loads((found.path / "open_clip_config.json").read_text())
    return dict(config.get("model_cfg", {}))


def _arguments(name: str) -> dict[str, Any]:
    """Of open_clip.create_model_and_transforms; paths without the folders of this machine."""
    found = find_backbone(name)
    if not isinstance(found, ClipFile):
        return {"model_name": f"local-dir:{found.path.name}"}
    _, slash, tag = name.partition("/")
    known = slash and "@" not in name
    return {
        "model_name": found.architecture,
        "pretrained": tag if known else found.weights.name,
        "force_quick_gelu": bool(found.model.get("quick_gelu")),
    }


def _difference(wanted: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first thing by which two backbones differ; empty: none."""
    then, now = wanted["files"], here["files"]
    for name in sorted({*then, *now}):
        one, other = then.get(name), now.get(name)
        if one != other:
            return f"{name} is {_short(other)} here and {_short(one)} there"
    if wanted["settings"] != here["settings"]:
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
        replace: put it in the place of another bundle.
        check: sees it before it is published, and raises where it must not be.

    Raises:
        ValueError: something else is there.
    """
    check_free(folder, replace)
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
    bare = json.dumps(said, indent=1, sort_keys=True).encode()
    digest = hashlib.sha256(bare).hexdigest()
    return json.dumps({**said, "digest": digest}, indent=1, sort_keys=True).encode() + b"\n"


# ---------------------------------------------------------------- reading


def read_bundle(folder: str | Path) -> Manifest:
    """A bundle, every byte of it checked.

    Raises:
        ValueError: there is none, another version made it, or a file of it was changed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        what = f"has no {MANIFEST}" if folder.is_dir() else "is not there, or no folder"
        raise ValueError(f"{folder} {what}: not a bundle; {MAKE}")
    said = _read_manifest(folder / MANIFEST)
    arrays = {name: _read_arrays(folder / name, said["files"][name]) for name in said["files"]}
    found = Manifest(folder, said, arrays)
    _check_shapes(found)
    return found


def _read_manifest(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        said = json.loads(data)
    except ValueError:
        raise _changed(file) from None
    if (
        not isinstance(said, dict)
        or _sealed({k: v for k, v in said.items() if k != "digest"}) != data
    ):
        raise _changed(file)
    if said.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {said.get('format')!r}, and this version reads {FORMAT}; use the "
            "airsweep that made it, or export it again"
        )
    for name, kind in WANTED.items():
        if not isinstance(said.get(name), kind):
            raise ValueError(f"{file} has no {name} that is a {kind.__name__}; export it again")
    for name in said["files"]:
        if name not in FILES:
            raise ValueError(f"{file} names the file {name!r}; allowed: {', '.join(FILES)}")
    return said


def _read_arrays(file: Path, digest: str) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; export the bundle again")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise _changed(file)
    return dict(load(data))


def _changed(file: Path) -> ValueError:
    return ValueError(f"{file} is not as it was exported: bytes were changed; export it again")


def _check_shapes(found: Manifest) -> None:
    """The arrays are those of as many classes as there are names."""
    missing = [name for name in (TEXT, TEST) if name not in found.arrays]
    if missing or found.text_features.shape[0] != len(found.classnames):
        what = f"without {missing[0]}" if missing else f"of {len(found.text_features)} classes"
        raise ValueError(
            f"{found.folder} is a bundle {what}, and {MANIFEST} names {len(found.classnames)} "
            "classes; export it again"
        )


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
