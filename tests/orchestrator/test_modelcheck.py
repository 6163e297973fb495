"""`airsweep models check`, and that a plan refuses weights that are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from air_core.weights import generator_folder, tiny_folder
from orchestrator.modelcheck import check_model
from tests.sweeps import write_sweep

CLIP = "open_clip_model.safetensors"


def test_a_model_is_named_as_a_sweep_file_takes_it(tmp_path, command):
    clip = shutil.copytree(tiny_folder(), tmp_path / "clip")
    sd = shutil.copytree(generator_folder("tiny"), tmp_path / "sd")
    for role, place in (("backbone", clip), ("generator", sd), ("backbone", "tiny")):
        code, out, err = command("models", "check", place)
        assert code == 0, err
        assert f"in the sweep file, below fixed:  {role}: {place}" in out
        found = json.loads(command("models", "check", place, "--json")[1])
        assert found["use"] == {role: str(place)}
    assert found["width"] == 128


def test_weights_of_one_file_are_checked_under_their_architecture(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    state = open_clip.create_model("ViT-B-32", pretrained=None).state_dict()
    small = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    save_file(small, tmp_path / "clip.safetensors")
    place = f"ViT-B-32-quickgelu@{tmp_path / 'clip.safetensors'}"
    assert check_model(place, "ViT-B-32/openai")["is"] == "backbone"
    with pytest.raises(ValueError, match="quick_gelu is True there"):
        check_model(place, "ViT-B-32/laion2b_s34b_b79k")


def test_another_model_than_the_name_says_is_refused(tmp_path, command):
    clip, sd = tiny_folder(), generator_folder("tiny")
    for name, place, why in (
        ("ViT-B-32/openai", clip, "embed_dim is 128 there and 512"),
        ("ViT-B-32/opnai", clip, "open_clip knows no weights 'opnai' of ViT-B-32"),
        ("", f"ViT-B-32@{clip / CLIP}", "text_projection is (128, 128)"),
        ("ViT-B-32/openai", sd, "is a diffusers folder"),
        ("stable-diffusion-v1-5", sd, "cross_attention_dim of its U-Net is 128"),
        ("", tmp_path, "is no model"),
        ("", clip / CLIP, f"write <architecture>@{clip / CLIP}"),
        ("", tmp_path / "nothing", "is not there"),
    ):
        code, out, err = command("models", "check", place, "--name", name)
        assert (code, out) == (2, ""), name
        assert why in err


def without(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def cut(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-10])


def pointer(folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def renamed(folder: Path, file: str, to: str) -> None:
    (folder / file).rename(folder / to)


def edited(folder: Path, file: str, old: str, new: str) -> None:
    (folder / file).write_text((folder / file).read_text().replace(old, new))


UNET = "unet/diffusion_pytorch_model.safetensors"
PICKLE = "unet/diffusion_pytorch_model.bin"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.mark.parametrize(
    ("harm", "arguments", "why"),
    [
        (without, ("vae",), "names vae, and there is no such folder"),
        (cut, (UNET,), "was it fetched to its end"),
        (pointer, (UNET,), "a pointer of Git LFS"),
        (renamed, (UNET, PICKLE), "a pickle"),
        (renamed, (UNET, HALF), "no diffusion_pytorch_model.safetensors"),
        (renamed, ("vae/config.json", "vae/other.json"), "it has none of config.json"),
        (edited, ("model_index.json", '"diffusers"', '"their_code"'), "is of their_code"),
        (edited, ("model_index.json", "}", ""), "model_index.json cannot be read"),
    ],
)
def test_a_diffusers_folder_that_is_not_whole_is_refused(harm, arguments, why, tmp_path):
    shutil.copytree(generator_folder("tiny"), tmp_path / "sd")
    harm(tmp_path / "sd", *arguments)
    with pytest.raises(ValueError, match=why):
        check_model(str(tmp_path / "sd"))


@pytest.mark.parametrize(("role", "file"), [("backbone", CLIP), ("generator", UNET)])
def test_a_plan_with_weights_that_were_copied_in_part_is_refused(role, file, tmp_path, command):
    source = tiny_folder() if role == "backbone" else generator_folder("tiny")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    cut(folder, file)
    sweep = write_sweep(tmp_path, "half", f"fixed: {{method: air, {role}: {folder}}}\n")
    code, _, err = command("plan", sweep, "--store", tmp_path / "runs")
    assert code == 2
    assert f"{folder / file} cannot be read" in err
    assert "was it fetched to its end?" in err


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": []}'])
def test_a_plan_with_a_backbone_whose_configuration_is_damaged_is_refused(text, tmp_path, command):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "clip"))
    (folder / "open_clip_config.json").write_text(text)
    sweep = write_sweep(tmp_path, "bad", f"fixed: {{method: zero_shot, backbone: {folder}}}\n")
    code, _, err = command("plan", sweep, "--store", tmp_path / "runs")
    assert code == 2
    assert f"{folder}/open_clip_config.json" in err
    assert "Traceback" not in err
