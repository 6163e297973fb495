"""Bundles: integrity, binding to the backbone, and equality with plain open_clip."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from air_core.bundle import image_files, load_bundle, read_bundle
from air_core.bundle.checks import FUSED, PROMPT, TEXT
from air_core.bundle.manifest import FILES, MANIFEST, weights_description, write_bundle
from air_core.datasets import get_dataset
from air_core.datasets.digits import CLASSNAMES
from air_core.models.weights import tiny_folder
from air_core.tools import seal
from air_core.tools.seal import BLANK, sealed_json
from tests.helpers.bundles import text_logits, zero_shot

ROOT = Path(__file__).parents[2]
UNIT = np.eye(10, 128, dtype=np.float32)
DOC = ROOT / "docs" / "results_guide.md"


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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("one") / "bundle"
    write_bundle(folder, *contents, replace=False)
    return load_bundle(folder)


def saved(images: list[Image.Image], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.png" for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


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
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("empty", "empty and its subfolders contain no image; images end in ."),
        ("new/*.jpg", "no file matches 'new/*.jpg'"),
        ("no.png", "no.png does not exist"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            image_files([path])


# ---------------------------------------------------------------- rejected bundles


@pytest.mark.parametrize("name", [MANIFEST, TEXT])
def test_any_changed_byte_is_detected(folder, name):
    file = folder / name
    data = file.read_bytes()
    changed = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), 99)]
    for content in (*changed, data + b" "):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{file} was changed after the export")):
            read_bundle(folder)
    file.unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        read_bundle(folder)


def rewritten(folder: Path, **changes: Any) -> None:
    """Replace content of bundle.json and its seal."""
    content = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_bytes(sealed_json(content))


def test_files_outside_the_folder_and_later_formats_are_rejected(folder):
    for changes, message in (
        ({"files": {"../secret.safetensors": "0" * 64}}, "files.../secret.safetensors.[key]"),
        ({"files": {"/etc/passwd": "0" * 64}}, f"Input should be '{FILES[0]}', '{FILES[1]}'"),
        ({"files": {}}, f"{TEXT} is missing"),
        ({"classifier": "fused"}, "its classifier is fused; it has text"),
        ({"format": 2}, "its format is 2: Input should be 1"),
    ):
        before = (folder / MANIFEST).read_bytes()
        rewritten(folder, **changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_bundle(folder)
        (folder / MANIFEST).write_bytes(before)
    with pytest.raises(ValueError, match=r"device 'npu' cannot be used .*; cpu always works"):
        load_bundle(folder, device="npu")


def test_a_folder_named_in_a_bundle_is_not_read(folder, monkeypatch, digits):
    """Even if the digests match, as in a bundle from an untrusted source."""
    clip = Path(shutil.copytree(tiny_folder(), folder / "clip"))
    backbone = json.loads((folder / MANIFEST).read_text())["backbone"]
    monkeypatch.chdir(folder)
    for name in ("clip", str(clip), "./clip", "../bundle/clip", None):
        rewritten(folder, backbone={**backbone, "name": name})
        with pytest.raises(ValueError, match=r"trained with an open_clip folder .* give --weights"):
            load_bundle(folder)
        assert text_logits(load_bundle(folder, weights=str(clip)), digits[:1]).shape == (1, 10)


def test_a_folder_is_not_accepted_as_published_weights(folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder(), tmp_path / "ViT-B-32" / "openai")
    backbone = json.loads((folder / MANIFEST).read_text())["backbone"]
    rewritten(folder, backbone={**backbone, "name": "ViT-B-32/openai"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # has no downloaded weights
    with pytest.raises(ValueError, match=r"backbone ViT-B-32/openai: its weights are not on this"):
        load_bundle(folder)


# ---------------------------------------------------------------- invalid content, valid digests


def sealed(folder: Path, content: dict[str, Any], arrays: Any, **more: bytes) -> None:
    """Write a bundle with any content and correct digests.

    Args:
        more: content of files, by the name before `.safetensors`.
    """
    files = {name: safetensors.numpy.save(of) for name, of in arrays.items()}
    files |= {f"{name}.safetensors": data for name, data in more.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / MANIFEST).write_bytes(sealed_json({**content, "format": 1, "files": digests}))


@pytest.fixture(scope="module")
def valid(tmp_path_factory, contents) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder for bundles, and the contents of a valid bundle with a prompt."""
    content, arrays = contents
    content = {**content, "prompt": {"length": 2}}
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


def with_value(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy with another value at a path such as `a.b`, or `a.0` in a list."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    at: Any = values
    for name in parents:
        at = at[name]
    at[int(last) if isinstance(at, list) else last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("classnames.0", "a\x1b[2Jb", "classnames.0 is 'a\\x1b[2Jb': Value error, a class name"),
        ("classnames.0", CLASSNAMES[1], "class names are different texts"),
        ("template", "{} {0.__class__}", "with {} once"),
        ("modality", "smell", "modality is 'smell': Value error, allowed are text, visual"),
        ("prompt", None, f"it has no prompt, but contains {PROMPT}"),
        ("backbone.files", {"a": "../b"}, "backbone.files.a is '../b': String should match"),
        ("code", "import os", "code is 'import os': Extra inputs are not permitted"),
        ("unseen", [10], "unseen is neither"),
        ("unseen", [1, 1], "unseen is neither"),
        ("unseen", [1], "U 1"),  # classes of the auxiliary classifier
    ],
)
def test_an_invalid_setting_is_rejected_by_name(path, value, message, valid):
    folder, content, arrays = valid
    sealed(folder, content, arrays)
    read_bundle(folder)
    sealed(folder, with_value(content, path, value), arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_bundle(folder)
    assert str(error.value).startswith(f"{folder} is not a bundle: ")


SHORT = np.where(np.arange(10)[:, None] == 3, 0.5 * UNIT, UNIT)


@pytest.mark.parametrize(
    ("file", "name", "value", "message"),
    [
        (TEXT, "text_features", UNIT[:9], "is float32 (9, 128)"),
        (TEXT, "text_features", UNIT.astype(np.float64), "allowed: finite float32 (C, D)"),
        (TEXT, "text_features", SHORT, "length is not 1"),
        (TEXT, "logit_scale", np.array(-1, np.float32), "values out of range"),
        (PROMPT, "prompt", np.ones(8, np.float32), "is float32 (8,)"),
        (PROMPT, "prompt", np.full((2, 8), np.inf, np.float32), "values out of range"),
        (PROMPT, "prompt", np.ones((0, 8), np.float32), "prompt of prompt.safetensors is empty"),
        (FUSED, "weight", np.array(1.5), "from 0 to 1"),
        (FUSED, "auxiliary.bank", UNIT[:, :9], "of fused.safetensors is float32"),
        (FUSED, "auxiliary.labels", np.int64([0] * 10), "fewer images of a class"),
        (FUSED, "auxiliary.labels", np.arange(1, 11), "values out of range"),
        (FUSED, "mixture.means", UNIT, "must contain exactly"),
    ],
)
def test_an_invalid_array_is_rejected(file, name, value, message, valid):
    folder, content, arrays = valid
    arrays = {**arrays, file: {**arrays[file], name: np.asarray(value, order="C")}}
    sealed(folder, content, arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_bundle(folder)
    assert str(error.value).startswith(f"{folder} is not a bundle: ")


def headed(of: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with the given header."""
    head = json.dumps(of).encode()
    return len(head).to_bytes(8, "little") + head + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        headed({"prompt": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]}}, b"12"),
        headed({"prompt": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 4]}}, b"1234"),
    ],
)
def test_an_invalid_tensor_file_with_the_right_digest_is_rejected(data, valid):
    folder, content, arrays = valid
    sealed(folder, content, arrays, prompt=data)
    with pytest.raises(ValueError, match="is not a bundle: "):
        read_bundle(folder)


@pytest.mark.parametrize("text", ["[]", '{"a":' * 10**5, "\xff"])
def test_a_manifest_that_is_not_a_json_object_is_rejected(text, valid):
    folder, _, _ = valid
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not a valid bundle"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"unseen": null', '"unseen": null,\n "unseen": null'),  # twice
        ('"lineage": {}', '"lineage": {"x": Infinity}'),
        ('"lineage": {}', '"lineage":  {}'),
    ],
)
def test_another_text_of_a_manifest_is_rejected_also_with_a_seal(old, new, valid):
    folder, content, arrays = valid
    sealed(folder, {**content, "bank_images": 0}, arrays)
    read_bundle(folder)
    values = json.loads((folder / MANIFEST).read_text()) | {"seal": BLANK}
    text = json.dumps(values, indent=1, sort_keys=True)
    assert old in text
    (folder / MANIFEST).write_bytes(seal.sealed(text.replace(old, new).encode()))
    with pytest.raises(ValueError, match="was changed after the export"):
        read_bundle(folder)


def paths_in(values: Any, before: str = "") -> list[str]:
    """The paths of all values in nested dicts and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    paths = []
    for name, value in pairs:
        paths.append(f"{before}{name}")
        if isinstance(value, dict | list):
            paths += paths_in(value, f"{before}{name}.")
    return [path for path in paths if path.count(".") < 3]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
DTYPES = ("float32", "float64", "float16", "int32", "int64", "uint8", "bool")


@given(data=st.data())
def test_any_content_is_read_or_rejected_with_a_value_error(data, valid):
    folder, content, arrays = valid
    files = {}
    if data.draw(st.booleans()):
        paths = [p for p in paths_in(content) if not p.startswith("backbone.files.")]
        content = with_value(content, data.draw(st.sampled_from(paths)), data.draw(JSON))
    else:
        file = data.draw(st.sampled_from(FILES))
        name = data.draw(st.sampled_from([*arrays[file], "other"]))
        shape = data.draw(st.lists(st.integers(0, 11), max_size=3))
        dtype = data.draw(st.sampled_from(DTYPES))
        bits = data.draw(st.sampled_from([0, 1, 127, 255]))
        array = np.frombuffer(
            bytes([bits]) * (np.dtype(dtype).itemsize * int(np.prod(shape))), dtype
        )
        of = {**arrays[file], name: array.reshape(shape)}
        good = safetensors.numpy.save(of)
        at = data.draw(st.integers(0, len(good) - 1)) if data.draw(st.booleans()) else None
        stem = file.removesuffix(".safetensors")
        files[stem] = good if at is None else good[:at] + bytes([bits]) + good[at + 1 :]
    sealed(folder, content, arrays, **files)
    try:
        manifest = read_bundle(folder)
        manifest.backbone()
    except ValueError:
        return
    assert np.isfinite(manifest.text_features).all()
    assert len(set(manifest.classnames)) == len(manifest.text_features)


def test_another_backbone_is_rejected_and_a_copy_of_the_same_accepted(folder, tmp_path, digits):
    copy = Path(shutil.copytree(tiny_folder(), tmp_path / "clip"))
    same = load_bundle(folder, weights=str(copy))
    assert torch.equal(text_logits(same, digits), text_logits(load_bundle(folder), digits))
    file = copy / "open_clip_model.safetensors"
    tensors = load_file(file)
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"another backbone .* open_clip_model.safetensors is sha"):
        load_bundle(folder, weights=str(copy))


def test_the_same_file_under_another_architecture_is_another_backbone(contents, tmp_path):
    content, arrays = contents
    file = tmp_path / "w.safetensors"
    save_file({"one": torch.ones(1)}, file)
    of = {**weights_description(f"ViT-B-32@{file}"), "precision": "fp32"}
    assert of["open_clip"]["pretrained"] == "w.safetensors"  # without the folder
    write_bundle(tmp_path / "b", {**content, "backbone": of}, arrays, replace=False)
    read_bundle(tmp_path / "b").backbone(f"ViT-B-32@{file}")
    with pytest.raises(
        ValueError, match="the file is the same, but architecture or preprocessing differ"
    ):
        read_bundle(tmp_path / "b").backbone(f"ViT-B-32-quickgelu@{file}")


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


def code_of_the_guide() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)


@pytest.fixture
def as_in_the_guide(folder, digits, monkeypatch) -> Path:
    saved(digits[:3], folder.parent / "new")
    (folder.parent / "new" / "000.png").rename(folder.parent / "new" / "0001.png")
    (folder.parent / "clip").symlink_to(tiny_folder())
    monkeypatch.chdir(folder.parent)
    return folder.parent


def test_the_three_lines_of_the_guide(as_in_the_guide):
    three, _ = code_of_the_guide()
    assert len([line for line in three.splitlines() if line]) == 3
    names: dict[str, Any] = {}
    exec(three, names)
    found = [result.image for result in names["results"]]
    assert found == ["new/0001.png", "new/001.png", "new/002.png"]
    assert all(result.classname in CLASSNAMES for result in names["results"])


def test_the_lines_for_plain_open_clip_in_the_guide_give_the_same_logits(
    as_in_the_guide, bundle, digits, capsys
):
    _, plain = code_of_the_guide()
    assert "air_core" not in plain
    names: dict[str, Any] = {}
    exec(plain, names)
    expected = text_logits(bundle, digits[:1])
    assert torch.allclose(names["logits"].detach(), expected, rtol=0, atol=1e-5)
    assert capsys.readouterr().out.strip() == CLASSNAMES[int(expected.argmax())]
