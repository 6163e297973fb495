"""Resolving names: equal content has equal digests, at any path."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from air_core.datasets import Dataset, get_dataset
from air_core.models.weights import tiny_folder
from orchestrator.planning import Resolver, plan_of
from orchestrator.planning.requests import location_for, read_request
from orchestrator.spec import SpecError, presets
from orchestrator.stages.inputs import images_folder
from tests.helpers.dataset_trees import draw
from tests.helpers.golden import check_sweeps


@pytest.fixture
def fresh(tmp_path) -> Resolver:
    return Resolver(tmp_path / "digests.json", None)


def another(resolver: Resolver) -> Resolver:
    """A resolver of a new process with the same cache."""
    return Resolver(resolver.cache, resolver.data_root)


@pytest.fixture
def clip(tmp_path) -> Path:
    folder = tmp_path / "clip"
    folder.mkdir()
    model = '{"model_cfg": {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}}'
    (folder / "open_clip_config.json").write_text(model)
    save_file({"one": np.ones(1)}, folder / "open_clip_model.safetensors")
    (folder / "weights").write_text("1 2 3")
    return folder


# ---------------------------------------------------------------- folders


def test_a_changed_byte_or_file_name_changes_the_digest_and_a_copy_does_not(fresh, clip, tmp_path):
    copy = shutil.copytree(clip, tmp_path / "elsewhere" / "copy")
    one, two = (fresh.weights("backbone", str(folder)) for folder in (clip, copy))
    assert (one.name, two.name, two.digest) == (str(clip), str(copy), one.digest)
    digests = [one.digest]
    (clip / "weights").write_text("1 2 4")
    digests.append(another(fresh).weights("backbone", str(clip)).digest)
    (clip / "weights").rename(clip / "heavier weights")
    digests.append(another(fresh).weights("backbone", str(clip)).digest)
    (clip / "deeper").mkdir()
    (clip / "deeper" / "more").write_text("")
    digests.append(another(fresh).weights("backbone", str(clip)).digest)
    assert len(set(digests)) == 4


def test_the_digest_of_a_generator_covers_the_files_that_are_read(fresh, tmp_path):
    model = shutil.copytree(images_folder("tiny"), tmp_path / "model")
    ref = fresh.weights("generator", str(model))
    assert ref.kind == "StableDiffusionPipeline"
    for unread in ("README.md", "unet/README.md", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (model / unread).write_text("nothing that a pipeline reads")
    assert another(fresh).weights("generator", str(model)).digest == ref.digest
    for read in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        before = another(fresh).weights("generator", str(model)).digest
        (model / read).write_text((model / read).read_text() + " ")
        assert another(fresh).weights("generator", str(model)).digest != before


def test_a_folder_of_ready_images_needs_no_model(fresh, tmp_path):
    (tmp_path / "pictures" / "digit one").mkdir(parents=True)
    (tmp_path / "pictures" / "digit one" / "0.png").write_bytes(b"no image")
    ref = fresh.weights("generator", f"folder:{tmp_path / 'pictures'}")
    (tmp_path / "pictures" / "digit one" / "1.png").write_bytes(b"more")
    assert another(fresh).weights("generator", ref.name).digest != ref.digest


def test_a_relative_model_gets_the_absolute_path_of_the_run(fresh, monkeypatch, tmp_path):
    shutil.copytree(tiny_folder(), tmp_path / "clip")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    refs = {name: fresh.weights("backbone", name) for name in ("./clip", "tiny")}
    assert [ref.name for ref in refs.values()] == [str(tmp_path / "clip"), "tiny"]


# ---------------------------------------------------------------- datasets


def some_dataset(*files: str, **changes: object) -> Dataset:
    """The digits dataset with other files, relative to the data root."""
    return replace(
        get_dataset("digits"), files=lambda root: sorted(root / f for f in files), **changes
    )


def test_the_digest_of_a_dataset_covers_files_paths_names_template_and_recipe(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second):
        for folder, text in [("a", "images"), ("b", "images"), ("c", "pictures")]:
            (root / folder).mkdir(parents=True)
            (root / folder / "x").write_text(text)

    def digest(root: Path, *files: str, **changes: object) -> str:
        resolver = Resolver(tmp_path / "digests.json", root)
        return resolver.dataset(some_dataset(*files, **changes)).digest

    assert digest(first, "a/x", "c/x") == digest(second, "a/x", "c/x")
    others = [
        digest(first, "b/x", "c/x"),  # a folder name may be the class
        digest(first, "a/x"),
        digest(first, "a/x", "b/x", "c/x"),
        digest(first, "a/x", "c/x", classnames=("0", "1")),
        digest(first, "a/x", "c/x", template="a drawing of a {}"),
        digest(first, "a/x", "c/x", recipe=2),
    ]
    assert len({digest(first, "a/x", "c/x"), *others}) == 7


# ---------------------------------------------------------------- cached digests


def test_a_file_is_read_again_only_if_its_size_or_mtime_changed(fresh, clip):
    weights = clip / "weights"
    first = fresh.weights("backbone", str(clip)).digest
    fresh.save()
    stamp = weights.stat()
    weights.write_text("9 9 9")
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert another(fresh).weights("backbone", str(clip)).digest == first  # from the cache
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert another(fresh).weights("backbone", str(clip)).digest != first


@pytest.mark.parametrize(
    "content", ["[]", "", '{"a": 1', '{"/x": 3}', '{"seal": "blake2b-seal(0)blake2b-seal"}', "\x00"]
)
def test_a_damaged_cache_of_digests_is_rebuilt_with_a_warning(fresh, clip, caplog, content):
    digest = fresh.weights("backbone", str(clip)).digest
    fresh.save()
    fresh.cache.write_text(content)
    again = another(fresh)
    assert again.weights("backbone", str(clip)).digest == digest
    assert "digests.json is damaged and is computed again" in caplog.text
    again.save()
    assert another(fresh).weights("backbone", str(clip)).digest == digest


# ---------------------------------------------------------------- messages


def test_messages_about_inputs_equal_the_golden_ones(tmp_path, drawn_digits, monkeypatch):
    """Also of class names that are too long, and of settings that do not fit their inputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    save_file({"one": np.ones(1)}, "some.safetensors")
    Path("drawn").symlink_to(drawn_digits)  # 16 images per class
    for name in ("cat", "dog"):
        for i in range(6):
            draw(tmp_path / "pets" / name / f"{i}.png")
    Path("pets/classnames.txt").write_text(f"dog = {' '.join(['dog'] * 20)}\n")

    def message(text: str) -> str:
        Path("x.yaml").write_text(text)
        request = read_request("x.yaml")
        with pytest.raises(SpecError) as caught:
            plan_of(request.spec, location_for(request, tmp_path / "runs", None))
        return str(caught.value).replace(str(tmp_path), "<folder>")

    check_sweeps("messages/inputs.txt", message)


@pytest.mark.parametrize(
    "changes",
    [
        {"images_per_class": 16},
        {"paradigm": "ssl", "shots": 100},
        {"prompt.length": 8},
        {"modality": "visual", "prompt.length": 64},
    ],
)
def test_the_largest_settings_that_fit_their_inputs_are_accepted(resolver, drawn_digits, changes):
    settings = {**presets.defaults("air", changes), "generator": f"folder:{drawn_digits}"}
    assert resolver.trial({**settings, "images_per_class": 1, **changes, "seed": 1})
