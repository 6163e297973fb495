"""LoRA: trains adapters only, on any Stable Diffusion folder, and comes back from its file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from air_core.diffusion import rejected
from air_core.diffusion.lora import add_adapters, save_adapters, train_lora
from air_core.diffusion.pipeline import LORA_FILE, PipelineGenerator, load_pipeline
from air_core.specs import GenerationSettings, LoraTraining
from air_core.tiny import WEIGHTS
from air_core.tiny.scores import DIGIT_NAMES, handwritten

MODEL = WEIGHTS / "diffusion"
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


def draw(model: Path, **lora: Any) -> torch.Tensor:
    return PipelineGenerator(model, QUICK, **lora).generate("digit four", [0, 1], [0, 0])


def test_training_reports_every_step_and_finite_losses(tmp_path, digits):
    seen = []
    result = train_lora(
        *digits, MODEL, TRAINING, 32, tmp_path, report=lambda *step: seen.append(step)
    )
    assert [(done, steps) for done, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert set(result) == {"loss_first", "loss_last", "seconds"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert result["loss_first"] == seen[0][2]


def test_training_lowers_the_loss_on_its_image(tmp_path, digits):
    images, captions = digits
    training = replace(TRAINING, steps=40, batch=8)
    result = train_lora(images[:1], captions[:1], MODEL, training, 32, tmp_path)
    assert result["loss_last"] < result["loss_first"]


def test_the_same_seed_trains_the_same_lora_and_another_seed_another(tmp_path, digits, trained):
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        with safe_open(folder / LORA_FILE, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    train_lora(*digits, MODEL, TRAINING, 32, tmp_path / "again")
    train_lora(*digits, MODEL, TRAINING, 32, tmp_path / "other", seed=1)
    first, again = weights(trained[0]), weights(tmp_path / "again")
    other = weights(tmp_path / "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_random_numbers_of_others_alone(tmp_path, digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_lora(*digits, MODEL, replace(TRAINING, steps=1), 32, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_only_adapters_receive_gradients():
    unet = load_pipeline(MODEL).unet
    base = {name: p.detach().clone() for name, p in unet.named_parameters()}
    parameters = add_adapters(unet, rank=4, seed=0)
    unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 24, 128)).sample.sum().backward()
    with_gradient = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert len(with_gradient) == len(parameters)
    assert all("lora_" in name for name in with_gradient)
    assert not with_gradient & set(base)


def test_an_untrained_lora_changes_nothing(tmp_path):
    pipeline = load_pipeline(MODEL)
    add_adapters(pipeline.unet, rank=4, seed=0)
    save_adapters(pipeline, tmp_path)
    assert torch.equal(draw(MODEL), draw(MODEL, adapter=tmp_path))


def test_a_saved_lora_draws_what_the_trained_one_drew(tmp_path, digits, monkeypatch):
    kept: list[Any] = []
    from air_core.diffusion import lora

    save = lora.save_adapters
    monkeypatch.setattr(
        lora, "save_adapters", lambda pipeline, out: (kept.append(pipeline), save(pipeline, out))
    )
    train_lora(*digits, MODEL, TRAINING, 32, tmp_path)
    generator = PipelineGenerator(MODEL, QUICK)
    generator.pipeline.unet = kept[0].unet.eval()
    in_memory = generator.generate("digit four", [0, 1], [0, 0])
    assert torch.equal(in_memory, draw(MODEL, adapter=tmp_path))
    assert not torch.equal(in_memory, draw(MODEL))


def test_the_file_remembers_its_rank_and_alpha(trained):
    with safe_open(trained[0] / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 4


def test_images_and_captions_must_match(tmp_path, digits):
    images, captions = digits
    with pytest.raises(ValueError, match="a caption each: 40, 39"):
        train_lora(images, captions[:-1], MODEL, TRAINING, 32, tmp_path)
    with pytest.raises(ValueError, match="LoRA needs images"):
        train_lora(images[:0], [], MODEL, TRAINING, 32, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, digits):
    wild = replace(TRAINING, steps=50, learning_rate=1e20)
    with pytest.raises(FloatingPointError, match=r"lower lora\.learning_rate"):
        train_lora(*digits, MODEL, wild, 32, tmp_path)
    assert not (tmp_path / LORA_FILE).exists()


# ---------------------------------------------------------------- the shape of Stable Diffusion


def stable_diffusion(folder: Path, prediction: str) -> Path:
    """A pipeline of random weights with the parts of Stable Diffusion, but small."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer", local_files_only=True)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2014, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=2012,
            eos_token_id=2013, pad_token_id=0,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_stable_diffusion_folder_is_trained_and_drawn_from(tmp_path, digits, prediction):
    model = stable_diffusion(tmp_path / "model", prediction)
    images, captions = digits
    wide = torch.cat([images, images], dim=2)  # not square, and not of the model's size
    result = train_lora(wide, captions, model, replace(TRAINING, rank=2), 48, tmp_path / "lora")
    assert math.isfinite(result["loss_last"])
    base, adapted = draw(model), draw(model, adapter=tmp_path / "lora")
    assert adapted.shape == (2, 32, 32, 3)
    assert not rejected(adapted).any()
    assert not torch.equal(base, adapted)


def test_a_model_that_predicts_something_else_is_refused(tmp_path, digits):
    model = stable_diffusion(tmp_path / "model", "sample")
    with pytest.raises(ValueError, match="predicts 'sample'; LoRA knows epsilon and v_prediction"):
        train_lora(*digits, model, TRAINING, 32, tmp_path / "lora")
