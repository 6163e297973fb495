"""`airsweep check`; plans refuse incomplete weights."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from air_core.datasets import DATASETS
from air_core.datasets.dataset import Counts
from air_core.models.weights import generator_folder, tiny_folder
from orchestrator.cluster.input_checks import check_dataset
from tests.helpers.dataset_trees import draw, small_root
from tests.helpers.sweeps import write_sweep

CLIP = "open_clip_model.safetensors"


def test_missing_images_are_reported_for_their_class():
    difference = "resisc45: class 'airplane' has 10 images, published 700"
    assert check_dataset("resisc45", small_root("resisc45"))[1] == difference


def test_unreadable_images_of_a_published_dataset_are_a_difference(tmp_path, monkeypatch):
    shutil.copytree(small_root("dtd"), tmp_path, dirs_exist_ok=True)
    counts = Counts(dict.fromkeys(("train", "val", "test"), 94))  # of the small copy
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], published=counts))
    for image in sorted((tmp_path / "dtd/dtd/images/lined").iterdir())[:2]:
        image.write_bytes(b"")
    difference = check_dataset("dtd", tmp_path)[1]
    assert "2 of 282 images cannot be read, at most 0 are allowed; the first: " in str(difference)


def test_a_few_unreadable_images_of_a_user_s_folder_are_allowed_but_not_many(tmp_path):
    for name in ("cat", "dog"):
        for i in range(100):
            draw(tmp_path / name / f"{i:02}.png", size=4)
    for i, allowed in enumerate((True, True, False)):
        (tmp_path / "dog" / f"{i:02}.png").write_bytes(b"no image")
        lines, difference = check_dataset(f"folder:{tmp_path}", None)
        assert f"unreadable  {i + 1}" in lines
        assert (difference is None) == allowed


def test_check_prints_counts_and_exits_with_the_first_difference(command):
    code, out, err = command("check", "digits")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "digits: 1,797 images of 10 classes",
        "classes     digit zero, digit one, digit two, digit three, digit four and 5 more",
        "template    a photo of a {}",
        "parts       val 180   free 1,617",
        "unreadable  0",
    ]
    code, out, err = command("check", "eurosat", "--data-root", small_root("eurosat"))
    assert code == 2
    assert "parts       train 71   val 10   test 19\n" in out
    assert err.startswith("airsweep: eurosat: train+val has 81 images, published 22,000")


# ---------------------------------------------------------------- models


def test_the_line_for_the_sweep_file_is_printed(tmp_path, command):
    clip = shutil.copytree(tiny_folder(), tmp_path / "clip")
    sd = shutil.copytree(generator_folder("tiny"), tmp_path / "sd")
    for role, model in (("backbone", clip), ("generator", sd), ("backbone", "tiny")):
        code, out, err = command("check", model)
        assert code == 0, err
        assert f"in the sweep file, under fixed:  {role}: {model}" in out


def test_what_is_no_model_is_refused(tmp_path, command):
    clip = tiny_folder()
    for model, message in (
        (f"ViT-S-32-alt@{clip / CLIP}", f"{CLIP} cannot be loaded as ViT-S-32-alt"),
        (tmp_path, f"for a folder of images, write folder:{tmp_path}"),
        (clip / CLIP, f"write <architecture>@{clip / CLIP}"),
        (tmp_path / "nothing", "there is no folder"),
        ("digitz", "unknown dataset or model 'digitz'; datasets: cub, digits"),
    ):
        code, out, err = command("check", model)
        assert (code, out) == (2, ""), model
        assert message in err


UNET = "unet/diffusion_pytorch_model.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"


def cut(file: str) -> Callable[[Path], object]:
    return lambda model: os.truncate(model / file, (model / file).stat().st_size - 10)


def renamed(file: str, to: str) -> Callable[[Path], object]:
    return lambda model: (model / file).rename(model / to)


def zipped(model: Path) -> None:
    shutil.rmtree(model)
    with ZipFile(model, "w") as archive:
        archive.writestr("model_index.json", "{}")


def pickled(model: Path) -> None:
    """Replace the weights by an archive as of torch.save that is cut off."""
    (model / CLIP).unlink()
    file = model / "open_clip_pytorch_model.bin"
    with ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"pickled")
    os.truncate(file, file.stat().st_size - 30)


@pytest.mark.parametrize(
    ("role", "harm", "message"),
    [
        ("generator", renamed("vae", "other"), "it has no folder vae"),
        ("generator", cut(UNET), f"{UNET} cannot be read: .*download or copy it again"),
        ("generator", lambda m: (m / UNET).unlink(), "unet has no diffusion_pytorch_model.safet"),
        ("generator", renamed(UNET, "unet/a.bin"), "other weights are not .* pickles can run code"),
        ("generator", cut("vae/config.json"), "vae/config.json cannot be read"),
        ("generator", renamed(TOKENIZER, "tokenizer/a"), "it has no vocabulary"),
        ("backbone", zipped, "no folder .*model; allowed: tiny|model is not a model"),
        ("backbone", cut(CLIP), f"{CLIP} cannot be read: .*download or copy it again"),
        ("backbone", renamed(CLIP, "other"), "contains no weights"),
        ("backbone", pickled, "model.bin cannot be read: File is not a zip file"),
    ],
)
def test_check_and_plan_refuse_a_damaged_model(role, harm, message, tmp_path, command):
    source = tiny_folder() if role == "backbone" else generator_folder("tiny")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    harm(folder)
    sweep = write_sweep(tmp_path, "half", f"fixed: {{method: air, {role}: {folder}}}\n")
    plan = ("plan", sweep, "--store", tmp_path / "runs")
    for words in (("check", folder), plan):
        code, out, err = command(*words)
        assert (code, out) == (2, ""), words
        assert re.search(message, err), err
