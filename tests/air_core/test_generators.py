"""Image generators: seeds, blocks, LoRA, errors, untrusted folders, and folders of images."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from air_core.datasets.images import ImageFiles
from air_core.diffusion import FLAT, rejected
from air_core.diffusion.folder import FolderGenerator
from air_core.diffusion.lora import add_adapters, save_adapters
from air_core.diffusion.pipeline import PipelineGenerator, load_pipeline
from air_core.models.weights import generator_files, generator_folder
from air_core.settings import GenerationSettings
from benchmarks import device
from tests.helpers import pipelines

MODEL = generator_folder("tiny")
QUICK = GenerationSettings(
    guidance_scale=4.0, num_inference_steps=4, size=32, block=4, precision="fp32"
)


@pytest.fixture(scope="module")
def generator() -> PipelineGenerator:
    return PipelineGenerator(MODEL, QUICK)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with random weights, which changes images."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = load_pipeline(MODEL)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in add_adapters(pipeline, rank=2):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
    save_adapters(pipeline, folder)
    return folder


def draw(generator: Any, indices: range, attempt: int = 0, name: str = "digit three") -> Any:
    return generator.generate(name, indices, [attempt] * len(indices))


# ---------------------------------------------------------------- a diffusion model


def test_an_image_does_not_depend_on_how_many_are_drawn(generator):
    block = draw(generator, range(4))
    generator.report, steps = lambda done, total: steps.append((done, total)), []
    draw(generator, range(4, 8))
    assert steps == [(step, 4) for step in range(1, 5)]
    assert torch.equal(block, draw(generator, range(4)))
    alone = draw(generator, range(2, 3))[0]  # another batch: equal up to rounding
    assert (block[2].int() - alone.int()).abs().max() <= 1


def test_several_prompts_take_turns_over_the_images():
    one, other = QUICK.template, "a drawing of a {}"
    several, first, second = (
        draw(PipelineGenerator(MODEL, replace(QUICK, template=template)), range(4)).float()
        for template in ((one, other), one, other)
    )
    assert not torch.equal(first, second)
    expected = torch.stack([first[0], second[1], first[2], second[3]])
    assert (several - expected).abs().max() <= 1  # of 256 levels


def test_index_attempt_class_and_seed_each_change_the_image(generator):
    image = draw(generator, range(1))
    others = [
        draw(generator, range(1, 2)),
        draw(generator, range(1), attempt=1),
        draw(generator, range(1), name="digit eight"),
        draw(PipelineGenerator(MODEL, replace(QUICK, seed=1)), range(1)),
    ]
    assert all((image.int() - other.int()).abs().float().mean() > 1 for other in others)


def test_a_lora_is_exchanged_without_a_trace_of_the_one_before(adapter, monkeypatch):
    loaded = []
    load = load_pipeline
    monkeypatch.setattr(
        "air_core.diffusion.pipeline.load_pipeline", lambda *all: loaded.append(all) or load(*all)
    )
    settings = replace(QUICK, precision="bf16", num_inference_steps=1)  # no process has it loaded
    scales = (1.0, None, 0.5, 1.0, None)
    images = [
        draw(PipelineGenerator(MODEL, settings, adapter=scale and adapter, scale=scale or 1.0), [0])
        for scale in scales
    ]
    assert len(loaded) == 1
    for scale in (1.0, None):
        first, again = (image for image, each in zip(images, scales, strict=True) if each == scale)
        assert torch.equal(first, again)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_pass_of_the_unet_casts_no_weight_and_calls_few_kernels(tmp_path):
    arguments = SimpleNamespace(device="cpu", precision="bf16")
    model, adapter = tmp_path / "model", tmp_path / "lora"
    size = device.random_pipeline(model)
    device.lora(model, adapter, size, arguments)
    for stage in (device.draw, device.evidence):
        found = stage(model, adapter, size, arguments)
        assert found["kernels"] <= 900
        assert found["casts"] == found["host"] == 0


def test_bf16_draws_nearly_the_same_image():
    settings = replace(QUICK, num_inference_steps=2)
    exact = draw(PipelineGenerator(MODEL, settings), range(1))
    rough = draw(PipelineGenerator(MODEL, replace(settings, precision="bf16")), range(1))
    assert (exact.int() - rough.int()).abs().float().mean() < 8


def test_a_few_nan_pixels_reject_their_image_and_do_not_affect_the_others(generator):
    decoded = []

    def spoil_the_first(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        decoded.append(len(output))
        if len(decoded) == 1:
            output[0, :, :4, :4] = torch.nan
        return output

    whole = draw(generator, range(2))
    hook = generator.pipeline.vae.decoder.register_forward_hook(spoil_the_first)
    try:
        spoilt = draw(generator, range(2))
    finally:
        hook.remove()
    assert decoded == [1, 1]  # one by one, whatever the memory of the device
    assert rejected(spoilt).tolist() == [True, False]
    assert torch.equal(spoilt[1], whole[1])
    assert not rejected(whole).any()


def test_loading_and_drawing_print_nothing(capfd):
    draw(PipelineGenerator(MODEL, replace(QUICK, num_inference_steps=1)), range(1))
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_distilled_model_keeps_its_sampler_and_other_models_do_not(tmp_path, sampler):
    model = pipelines.stable_diffusion_1(tmp_path)
    index, config = model / "model_index.json", model / "scheduler" / "scheduler_config.json"
    index.write_text(index.read_text().replace("PNDMScheduler", sampler))
    scheduler = json.loads(config.read_text()) | {"_class_name": sampler}
    for spacing, expected in (("trailing", sampler), ("leading", "DPMSolverMultistepScheduler")):
        config.write_text(json.dumps(scheduler | {"timestep_spacing": spacing}))
        pipeline = PipelineGenerator(model, QUICK).pipeline
        assert type(pipeline.scheduler).__name__ == expected


# ---------------------------------------------------------------- names


def test_a_generator_is_tiny_a_folder_or_a_snapshot_of_the_hub(tmp_path, monkeypatch):
    assert generator_folder("tiny") == MODEL
    assert generator_folder(str(MODEL)) == MODEL
    assert generator_files(MODEL) == sorted(path for path in MODEL.rglob("*") if path.is_file())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"lacks its model_index\.json; .* `hf download some/model --incl"
    ):
        generator_folder("some/model")
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot = pipelines.stable_diffusion_1(repo / "snapshots" / "abc")  # without safety checker
    (snapshot / "model.ckpt").write_text("the same weights in another format")
    assert generator_folder("some/model") == snapshot
    digested = {path.relative_to(snapshot).parts[0] for path in generator_files(snapshot)}
    assert digested == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"
    }  # fmt: skip
    assert draw(
        PipelineGenerator(snapshot, replace(QUICK, size=64, num_inference_steps=1)), range(1)
    ).shape == (1, 64, 64, 3)
    (snapshot / "unet").rename(snapshot / "elsewhere")
    with pytest.raises(ValueError, match="has no folder unet"):
        generator_files(snapshot)


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c"])
def test_the_error_for_an_unknown_name_lists_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"allowed: tiny, a folder with model_index\.json"):
        generator_folder(name)


# ---------------------------------------------------------------- untrusted folders

EVIL = """
open({marker!r}, "w").close()
class Evil: pass
"""
INDEX = "model_index.json"


def changed(folder: Path, file: str, **values: object) -> Path:
    """A copy of the tiny pipeline with other values in one of its files."""
    shutil.copytree(MODEL, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))
    return folder


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (INDEX, {"_class_name": ["evil", "Evil"]}, "_class_name.* is .*'evil'.* allowed: a class"),
        (INDEX, {"_class_name": "AutoModel"}, "AutoModel, which is not a pipeline of diffusers"),
        (INDEX, {"_class_name": "KandinskyV22CombinedPipeline"}, "second model that its README"),
        (INDEX, {"unet": ["evil", "Evil"]}, "'unet' is .*'evil'.* of diffusers or transformers"),
        (INDEX, {"unet": ["diffusers", "StableDiffusionPipeline"]}, "not a model or scheduler"),
        (INDEX, {"unet": ["diffusers", {}]}, "'unet' is .*; allowed: a class"),
        (INDEX, {"../up": ["diffusers", "UNet2DModel"]}, "'../up' is .*; allowed: a class"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "has auto_map"),
        ("tokenizer/tokenizer_config.json", {"x": [{"auto_map": "evil.Evil"}]}, "has auto_map"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "cannot be read"),
    ],
)
def test_a_pipeline_that_names_code_or_another_model_is_rejected(file, values, message, tmp_path):
    model, marker = changed(tmp_path / "model", file, **values), tmp_path / "ran"
    for folder in ("", "unet", "text_encoder", "tokenizer"):
        (model / folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    with pytest.raises(ValueError, match=rf"{model}.*{message}"):
        load_pipeline(model)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["None.py", "pipeline.py", "unet/diffusers.py", "unet/unet.py"])
def test_python_files_beside_the_parts_are_not_run(name, tmp_path):
    model, marker = Path(shutil.copytree(MODEL, tmp_path / "model")), tmp_path / "ran"
    (model / name).write_text(EVIL.format(marker=str(marker)))
    with suppress(ValueError):  # diffusers treats some of them as code of the model
        load_pipeline(model)
    assert not marker.exists()


def test_a_part_that_is_an_adapter_of_another_model_is_rejected(tmp_path):
    elsewhere = Path(shutil.copytree(MODEL / "text_encoder", tmp_path / "elsewhere"))
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "text_encoder" / "config.json").unlink()
    names = {"base_model_name_or_path": str(elsewhere), "peft_type": "LORA"}
    (model / "text_encoder" / "adapter_config.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"adapter_config\.json names another model"):
        load_pipeline(model)


# ---------------------------------------------------------------- rejection


def test_blank_and_nearly_blank_images_are_rejected_and_drawings_are_not():
    noise = np.random.default_rng(0).normal(0, FLAT / 2, (8, 8, 3))
    red = np.full((8, 8, 3), (250, 20, 20), dtype=np.uint8)
    drawing = red.copy()
    drawing[3:5, 3:5] = 0
    images = np.stack([red, (100 + noise).astype(np.uint8), drawing])
    assert rejected(torch.from_numpy(images)).tolist() == [True, True, False]


# ---------------------------------------------------------------- folders of images


def paint(folder: Path, name: str, level: int, size: tuple[int, int] = (16, 16)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 41, (size[1], size[0], 3)) + level
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "red fox", "b.png", 100)
    paint(tmp_path / "red fox", "a.png", 50, size=(40, 20))
    (tmp_path / "red fox" / "c.jpg").write_bytes(b"no image")
    (tmp_path / "red fox" / "notes.txt").write_text("not an image either")
    paint(tmp_path / "tree_frog", "x.png", 200)
    return tmp_path


def test_a_folder_gives_the_images_of_a_class_sorted_by_name(folder):
    generator = FolderGenerator(folder, ("red fox", "tree frog"), 16)
    foxes = generator.generate("red fox", [1, 0], [0, 0])
    assert foxes.shape == (2, 16, 16, 3)
    assert foxes.dtype == torch.uint8
    assert foxes.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([120, 70], abs=5)
    frog = generator.generate("tree frog", [0], [2])  # underscores can replace spaces
    assert frog.float().mean() == pytest.approx(220, abs=5)


def test_unreadable_files_are_rejected_and_missing_files_are_errors(folder):
    """Rejecting a missing file would hide the problem."""
    foxes = FolderGenerator(folder, ["red fox"], 16)
    assert rejected(foxes.generate("red fox", [1, 2, 5], [0, 0, 0])).tolist() == [False, True, True]
    (folder / "red fox" / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        foxes.generate("red fox", [0], [0])
    with pytest.raises(ValueError, match=r"no folder for 'red panda', 'newt'"):
        FolderGenerator(folder, ["red panda", "red fox", "newt"], 16)


def test_an_image_has_the_same_pixels_in_a_generator_and_a_dataset(tmp_path):
    (tmp_path / "cat").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    Image.fromarray(noise).save(tmp_path / "cat" / "a.png", exif=exif)
    [drawn] = FolderGenerator(tmp_path, ["cat"], 8).generate("cat", [0], [0])
    image = ImageFiles((tmp_path / "cat" / "a.png",))[0]
    fitted = ImageOps.fit(image, (8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(drawn.numpy(), np.asarray(fitted))
