"""Bundles: integrity, binding to the backbone, and equality with plain open_clip."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from air_core.bundle import image_files, load_bundle, read_bundle
from air_core.bundle.checks import FUSED, PROMPT, TEXT
from air_core.bundle.manifest import MANIFEST, weights_description, write_bundle
from air_core.datasets import get_dataset
from air_core.datasets.digits import CLASSNAMES
from air_core.models.weights import tiny_folder
from air_core.tools.seal import BLANK, sealed, sealed_json
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


def write_any(folder: Path, content: dict[str, Any], arrays: Any, **more: bytes) -> None:
    """Write a bundle with any content, correct digests and a seal.

    Args:
        more: content of files, by the name before `.safetensors`.
    """
    files = {name: safetensors.numpy.save(of) for name, of in arrays.items()}
    files |= {f"{name}.safetensors": data for name, data in more.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (folder / MANIFEST).write_bytes(sealed_json({"format": 1, "files": digests, **content}))


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
        ("modality", "smell", "modality is 'smell': Value error, this version has no"),
        ("backbone.files", {"a": "../b"}, "backbone.files.a is '../b': String should match"),
        ("code", "import os", "code is 'import os': Extra inputs are not permitted"),
        ("unseen", [10], "unseen is neither"),
        ("unseen", [1, 1], "unseen is neither"),
        ("unseen", [1], FUSED),  # has an auxiliary classifier of 10 classes
        ("classifier", "auxilliary", "Input should be 'text', 'auxiliary' or 'fused'"),
        ("prompt", None, "other files than an export writes"),
        ("files", {}, "other files than an export writes"),
        ("files", {"../secret.safetensors": "0" * 64}, "files.../secret.safetensors.[key]"),
        ("files", {"/etc/passwd": "0" * 64}, f"Input should be '{TEXT}', '{PROMPT}'"),
        ("format", 2, "its format is 2: Input should be 1"),
    ],
)
def test_an_invalid_setting_is_rejected(path, value, message, valid):
    folder, content, arrays = valid
    write_any(folder, content, arrays)
    read_bundle(folder)
    write_any(folder, with_value(content, path, value), arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_bundle(folder)
    assert str(error.value).startswith(f"{folder} is not a bundle: ")


SHORT = np.where(np.arange(10)[:, None] == 3, 0.5 * UNIT, UNIT)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        (TEXT, "text_features", UNIT[:9]),
        (TEXT, "text_features", UNIT.astype(np.float64)),
        (TEXT, "text_features", SHORT),
        (TEXT, "logit_scale", np.array(-1, np.float32)),
        (PROMPT, "prompt", np.ones((1, 1, 1, 8), np.float32)),
        (PROMPT, "prompt", np.full((2, 8), np.inf, np.float32)),
        (PROMPT, "prompt", np.ones((0, 8), np.float32)),
        (FUSED, "weight", np.array(1.5)),
        (FUSED, "auxiliary.bank", UNIT[:, :9]),
        (FUSED, "auxiliary.labels", np.int64([0] * 10)),
        (FUSED, "auxiliary.labels", np.int64([*range(9), 2**62])),
        (FUSED, "mixture.means", UNIT),
    ],
)
def test_an_invalid_array_is_rejected(file, name, value, valid):
    folder, content, arrays = valid
    arrays = {**arrays, file: {**arrays[file], name: np.asarray(value, order="C")}}
    write_any(folder, content, arrays)
    with pytest.raises(ValueError, match=f"is not a bundle: {file} has ") as error:
        read_bundle(folder)
    assert str(error.value).startswith(str(folder))


def test_a_classifier_that_a_bundle_lacks_and_vectors_of_another_width_are_rejected(
    tmp_path, contents
):
    content, arrays = contents
    write_any(tmp_path, {**content, "classifier": "fused"}, arrays)
    with pytest.raises(ValueError, match="its classifier is fused; it has text"):
        read_bundle(tmp_path)
    narrow = {**arrays[TEXT], "text_features": np.eye(10, 30, dtype=np.float32)}
    write_any(tmp_path, content, {TEXT: narrow})
    with pytest.raises(ValueError, match="its class vectors have width 30, but image features 128"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", safetensors.torch.save({"prompt": torch.ones(2, 8, dtype=torch.bfloat16)})]
)
def test_an_invalid_tensor_file_with_the_right_digest_is_rejected(data, valid):
    folder, content, arrays = valid
    write_any(folder, content, arrays, prompt=data)
    with pytest.raises(ValueError, match=r"is not a bundle: prompt.safetensors is not a readable"):
        read_bundle(folder)


@pytest.mark.parametrize("text", [f'["{BLANK}"]', '{"a":' * 10**5 + BLANK, f"\xff{BLANK}"])
def test_a_manifest_that_is_not_a_json_object_is_rejected_also_with_a_seal(text, valid):
    folder, _, _ = valid
    (folder / MANIFEST).write_bytes(sealed(text.encode("latin-1")))
    with pytest.raises(ValueError, match="is not a bundle: "):
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
        file = data.draw(st.sampled_from([TEXT, PROMPT, FUSED]))
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
    write_any(folder, content, arrays, **files)
    try:
        manifest = read_bundle(folder)
        manifest.backbone()
    except ValueError:
        return
    assert np.isfinite(manifest.arrays[TEXT]["text_features"]).all()
    assert len(set(manifest.classnames)) == len(manifest.arrays[TEXT]["text_features"])


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
