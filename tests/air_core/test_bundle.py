"""Bundles: integrity, binding to the backbone, and equality with plain open_clip."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from air_core.bundle import image_files, load_bundle, read_bundle
from air_core.bundle.checks import FUSED, PROMPT, TEXT
from air_core.bundle.manifest import MANIFEST, weights_description, write_bundle
from air_core.datasets import get_dataset
from air_core.datasets.digits import CLASSNAMES
from air_core.models.weights import tiny_folder
from air_core.tools.seal import sealed_json
from tests.helpers.bundles import text_logits, zero_shot

UNIT = np.eye(10, 128, dtype=np.float32)
DOC = Path(__file__).parents[2] / "docs" / "results_guide.md"


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    return list(get_dataset("digits").load(None).images[:24])


@pytest.fixture(scope="module")
def contents() -> tuple[dict[str, Any], dict[str, Any]]:
    return zero_shot()


@pytest.fixture
def folder(tmp_path, contents) -> Path:
    write_bundle(tmp_path / "bundle", *contents, replace=False)
    return tmp_path / "bundle"


def saved(images: list[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:03}.png")


# ---------------------------------------------------------------- image files


def test_folders_are_searched_recursively_and_patterns_expanded(tmp_path, digits, monkeypatch):
    saved(digits[:2], tmp_path / "new" / "deep" / "er")
    saved(digits[:1], tmp_path / "new")
    for name in ("notes.txt", ".hidden.png", "._000.png"):
        (tmp_path / "new" / name).write_text("x")
    saved(digits[:1], tmp_path / "new" / ".cache")
    (tmp_path / "new" / "a[1].png").write_bytes((tmp_path / "new" / "000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    deep = ["new/deep/er/000.png", "new/deep/er/001.png"]

    def listed(*paths: str) -> list[str]:
        return [str(file) for file in image_files(paths)]

    assert listed("new") == ["new/000.png", "new/a[1].png", *deep]
    assert listed("new/**/*.png") == ["new/000.png", "new/a[1].png", *deep]
    assert listed("new/a[1].png") == ["new/a[1].png"]
    assert listed("new/deep/er/001.png", "new/deep") == deep[::-1]
    assert listed("new/*") == ["new/000.png", "new/a[1].png", *deep, "new/notes.txt"]


# ---------------------------------------------------------------- rejected bundles


@pytest.mark.parametrize("name", [MANIFEST, TEXT])
def test_any_changed_byte_is_detected(folder, name):
    file = folder / name
    data = file.read_bytes()
    changed = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), 99)]
    for content in (*changed, data + b" "):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is not a bundle: {name} .*changed after the expo"):
            read_bundle(folder)
    file.unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        read_bundle(folder)


def test_a_folder_named_in_a_bundle_is_not_read(tmp_path, contents, monkeypatch, digits):
    """Even if the digests match, as in a bundle from an untrusted source."""
    content, arrays = contents
    folder, clip = tmp_path / "bundle", Path(shutil.copytree(tiny_folder(), tmp_path / "clip"))
    monkeypatch.chdir(tmp_path)
    for name in ("clip", str(clip), "./clip", "bundle/../clip", None):
        backbone = {**content["backbone"], "name": name}
        write_bundle(folder, {**content, "backbone": backbone}, arrays, replace=True)
        with pytest.raises(ValueError, match=r"trained with an open_clip folder .* give --weights"):
            load_bundle(folder)
        assert text_logits(load_bundle(folder, weights=str(clip)), digits[:1]).shape == (1, 10)
    # Nor is a folder that is named like published weights.
    shutil.copytree(clip, tmp_path / "ViT-B-32" / "openai")
    monkeypatch.setenv("HOME", str(tmp_path))  # has no downloaded weights
    backbone = {**content["backbone"], "name": "ViT-B-32/openai"}
    write_bundle(folder, {**content, "backbone": backbone}, arrays, replace=True)
    with pytest.raises(ValueError, match=r"backbone ViT-B-32/openai: its weights are not on this"):
        load_bundle(folder)


def test_another_backbone_is_rejected_and_a_copy_of_the_same_accepted(folder, tmp_path, digits):
    copy = Path(shutil.copytree(tiny_folder(), tmp_path / "clip"))
    same = load_bundle(folder, weights=str(copy))
    assert torch.equal(text_logits(same, digits), text_logits(load_bundle(folder), digits))
    file = copy / "open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"was trained with .* preprocessing of '{copy}' differ"):
        load_bundle(folder, weights=str(copy))


def test_the_same_file_under_another_architecture_is_another_backbone(contents, tmp_path):
    content, arrays = contents
    file = tmp_path / "w.safetensors"
    save_file({"one": torch.ones(1)}, file)
    of = {**weights_description(f"ViT-B-32@{file}"), "precision": "fp32"}
    assert of["open_clip"]["pretrained"] == "w.safetensors"  # without the folder
    write_bundle(tmp_path / "b", {**content, "backbone": of}, arrays, replace=False)
    read_bundle(tmp_path / "b").backbone(f"ViT-B-32@{file}")
    with pytest.raises(ValueError, match=r"was trained with ViT-B-32 \(w.safetensors .* differ"):
        read_bundle(tmp_path / "b").backbone(f"ViT-B-32-quickgelu@{file}")


def test_a_missing_device_is_named(folder):
    with pytest.raises(ValueError, match=r"device 'npu' cannot be used .*; cpu always works"):
        load_bundle(folder, device="npu")


# ---------------------------------------------------------------- invalid content, valid digests


def write_any(folder: Path, content: dict[str, Any], arrays: Any) -> None:
    """Write a bundle with any content, correct digests and a seal."""
    files = {name: safetensors.numpy.save(of) for name, of in arrays.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / MANIFEST).write_bytes(sealed_json({"format": 1, "files": digests, **content}))


@pytest.fixture(scope="module")
def valid(tmp_path_factory, contents) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder for bundles, and the contents of a valid bundle with a prompt."""
    content, arrays = contents
    content = {**content, "prompt": {"length": 2}, "classifier": "auxiliary"}
    bank = {
        "weight": np.array(0.5),
        "auxiliary.bank": UNIT,
        "auxiliary.labels": np.arange(10),
        "auxiliary.center": np.zeros(128, np.float32),
        "auxiliary.nearest": np.array(1),
        "auxiliary.sharpness": np.array(5.0),
    }
    arrays = {**arrays, PROMPT: {"prompt": np.ones((2, 8), np.float32)}, FUSED: bank}
    folder = tmp_path_factory.mktemp("made") / "b"
    write_bundle(folder, content, arrays, replace=False)
    return folder, content, arrays


OTHERS = [*CLASSNAMES[1:]]
BACKBONE = {"name": None, "settings": {}, "open_clip": {}, "precision": "fp32"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "classnames",
            ["a\x1b[2Jb", *OTHERS],
            "classnames.0 is 'a\\x1b[2Jb': Value error, a class",
        ),
        ("classnames", [OTHERS[0], *OTHERS], "class names are different texts"),
        ("modality", "smell", "modality is 'smell': Value error, this version has no"),
        ("backbone", {**BACKBONE, "files": {"a": "../b"}}, "backbone.files.a is '../b': String"),
        ("code", "import os", "code is 'import os': Extra inputs are not permitted"),
        ("unseen", [*range(10)], "its classifier is auxiliary; it has text, fused"),
        ("prompt", None, "other files than an export writes"),
        ("files", {}, "other files than an export writes"),
        ("files", {"../secret.safetensors": "0" * 64}, "files.../secret.safetensors.[key]"),
        ("format", 2, "its format is 2: Input should be 1"),
    ],
)
def test_an_invalid_setting_is_rejected(name, value, message, valid):
    folder, content, arrays = valid
    write_any(folder, {**content, name: value}, arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_bundle(folder)
    assert str(error.value).startswith(f"{folder} is not a bundle: ")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        (TEXT, "text_features", UNIT[:9]),
        (TEXT, "text_features", UNIT.astype(np.float64)),
        (PROMPT, "prompt", np.ones((1, 1, 1, 8), np.float32)),
        (PROMPT, "prompt", np.full((2, 8), np.inf, np.float32)),
        (PROMPT, "prompt", np.ones((0, 8), np.float32)),
        (FUSED, "auxiliary.bank", np.ones((10, 9), np.float32)),
        (FUSED, "mixture.means", UNIT),
    ],
)
def test_an_invalid_array_is_rejected(file, name, value, valid):
    folder, content, arrays = valid
    write_any(folder, content, {**arrays, file: {**arrays[file], name: value}})
    with pytest.raises(ValueError, match=f"is not a bundle: {file} has "):
        read_bundle(folder)


# ---------------------------------------------------------------- writing


def test_a_bundle_is_written_atomically_and_replaces_only_a_bundle(tmp_path, contents):
    content, arrays = contents
    path = tmp_path / "bundle"
    path.mkdir()  # an empty folder can be used
    write_bundle(path, content, arrays, replace=False)
    bytes_of = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match=r"is already a bundle.*--force"):
        write_bundle(path, content, arrays, replace=False)

    def refused(manifest: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_bundle(path, {**content, "template": "{}"}, arrays, True, refused)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == bytes_of
    write_bundle(path, {**content, "template": "{}"}, arrays, replace=True)
    assert read_bundle(path).content.template == "{}"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="is not a bundle; give another folder"):
        write_bundle(tmp_path / "mine", content, arrays, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine"]


# ---------------------------------------------------------------- code in the guide


def test_the_code_of_the_guide_classifies_with_airsweep_and_with_plain_open_clip(
    folder, digits, monkeypatch, capsys
):
    saved(digits[:3], folder.parent / "new")
    (folder.parent / "new" / "000.png").rename(folder.parent / "new" / "0001.png")
    (folder.parent / "clip").symlink_to(tiny_folder())
    monkeypatch.chdir(folder.parent)
    ours, plain = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert "air_core" not in plain
    names: dict[str, Any] = {}
    exec(ours, names)
    found = {result.image: result.classname for result in names["results"]}
    assert list(found) == ["new/0001.png", "new/001.png", "new/002.png"]
    exec(plain, names)
    expected = text_logits(load_bundle("bundle"), digits[:1])
    assert torch.allclose(names["logits"].detach(), expected, rtol=0, atol=1e-5)
    assert capsys.readouterr().out.strip() == found["new/0001.png"]
