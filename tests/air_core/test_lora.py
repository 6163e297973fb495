"""LoRA training: adapters only, read as needed, the same with less memory.

`tests/stages/test_labels.py` stops a training, which then continues."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from air_core.diffusion import lora
from air_core.diffusion.denoiser import denoiser_class
from air_core.diffusion.lora import add_adapters, save_adapters, train_lora
from air_core.diffusion.pipeline import LORA_FILE, PipelineGenerator, load_pipeline
from air_core.models.weights import generator_folder
from air_core.settings import GenerationSettings, LoraTraining
from tools.tiny_world.scores import DIGIT_NAMES, handwritten

MODEL = generator_folder("tiny")
TRAINING = LoraTraining(rank=4, steps=3, batch=4, learning_rate=2e-3, precision="fp32")
QUICK = GenerationSettings(
    guidance_scale=4.0, num_inference_steps=3, size=32, block=2, precision="fp32"
)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, list[str]]:
    images, labels = handwritten()
    captions = [f"a photo of a {DIGIT_NAMES[label]}" for label in labels[:40]]
    return torch.from_numpy(images[:40]), captions


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("lora")
    return out, train_lora(*digits, MODEL, TRAINING, 32, out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / LORA_FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def draw(model: Path, **lora: Any) -> torch.Tensor:
    return PipelineGenerator(model, QUICK, **lora).generate("digit four", [0, 1], [0, 0])


def test_training_reports_every_step_and_keeps_the_global_random_state(tmp_path, digits):
    images, captions = digits
    training = replace(TRAINING, steps=99, passes=2)  # 2 x 5 images in batches of 4: 3 steps
    seen = []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def report(done: int, steps: int, state: Any) -> None:
        seen.append((done, steps, *state().losses))

    of = images[:5], captions[:5]
    result = train_lora(*of, MODEL, training, 32, tmp_path, report=report)
    losses = seen[-1][2:]
    assert seen == [(done, 3, *losses[:done]) for done in (1, 2, 3)]
    # The tiny model predicts the noise, of variance 1; with the wrong sign the loss is about 4.
    assert all(0 < loss < 1 for loss in losses)
    assert result.keys() == {"loss_first", "loss_last", "seconds"}
    assert (result["loss_first"], result["loss_last"]) == (losses[0], losses[-1])
    assert torch.equal(torch.rand(3), expected)


def test_a_flip_shows_the_mirrored_image_with_the_caption_of_the_image(digits, monkeypatch):
    images, pipeline = digits[0][:3], load_pipeline(MODEL)
    denoiser = denoiser_class(pipeline)(pipeline, 32)
    views = torch.cat([images, images.flip(2)])
    expected = torch.cat([denoiser.encode_images(view[None]).mean for view in views])
    training = replace(TRAINING, batch=8, flip=True)
    for kept in (lora.KEPT, 2):  # latents do not depend on how many stay in memory
        monkeypatch.setattr(lora, "KEPT", kept)
        latents = lora.TrainingLatents(denoiser, images)
        draws = torch.Generator().manual_seed(0)
        steps = [*islice(lora._random_steps(training, draws, 3, latents, denoiser.noise), 6)]
        for step, encoded in latents.read(iter(steps)):
            assert torch.equal(step.views % 3, step.batch)
            assert torch.equal(encoded.mean, expected[step.views])
        assert {*torch.cat([step.views for step in steps]).tolist()} == {*range(6)}


def test_images_are_read_when_a_step_needs_them(tmp_path, digits):
    """A pool does not fit into memory."""
    images, captions = digits
    read = []

    class Images(list[torch.Tensor]):
        def __getitem__(self, at: Any) -> Any:
            read.append(at)
            return super().__getitem__(at)

    train_lora(Images(images), captions, MODEL, TRAINING, 32, tmp_path)
    assert len(read) <= 1 + TRAINING.steps * TRAINING.batch


def test_less_memory_gives_the_same_lora_up_to_rounding(tmp_path, digits, trained):
    for thrift in (1, 2):
        out = tmp_path / str(thrift)
        train_lora(*digits, MODEL, TRAINING, 32, out, thrift=thrift)
        whole, saved = weights(trained[0]), weights(out)
        assert all(torch.allclose(whole[name], saved[name], atol=2e-3) for name in whole)
        moved = max((whole[name] - saved[name]).abs().mean() for name in whole)
        assert moved < 1e-4


def test_an_untrained_lora_has_no_effect_and_its_file_has_rank_and_alpha(tmp_path):
    pipeline = load_pipeline(MODEL)
    parameters = add_adapters(pipeline, rank=4)
    save_adapters(pipeline, tmp_path)
    assert len(parameters) == len(weights(tmp_path))  # nothing else is trained
    assert torch.equal(draw(MODEL), draw(MODEL, adapter=tmp_path))
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 4


def test_an_infinite_loss_is_an_error_and_writes_no_file(tmp_path, digits):
    wild = replace(TRAINING, steps=50, learning_rate=1e20)
    with pytest.raises(FloatingPointError, match=r"lower lora\.learning_rate"):
        train_lora(*digits, MODEL, wild, 32, tmp_path)
    assert not (tmp_path / LORA_FILE).exists()
