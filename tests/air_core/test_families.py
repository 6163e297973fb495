"""Families of diffusion models: each draws, is fine-tuned and scores, on its real classes."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from air_core.diffusion import rejected
from air_core.diffusion.denoiser import denoiser_class, network, unpacked
from air_core.diffusion.denoising import DenoisingScorer
from air_core.diffusion.lora import train_lora
from air_core.diffusion.pipeline import PipelineGenerator, load_pipeline
from air_core.models.families import FAMILIES, check_denoiser
from air_core.settings import EvidenceScoring, GenerationSettings, LoraTraining
from tests.helpers import pipelines

SETTINGS = GenerationSettings(
    template="a photo of a {}", guidance_scale=4.0, num_inference_steps=2, size=pipelines.SIZE,
    block=2, precision="fp32",
)  # fmt: skip
BUILDS = [build for family in FAMILIES for build in pipelines.MODELS[family]]


@pytest.fixture(scope="module", params=BUILDS, ids=lambda build: build.__name__)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = request.param(tmp_path_factory.mktemp("model") / request.param.__name__)
    return folder


def draw(model: Path, settings: GenerationSettings = SETTINGS, **lora: Any) -> torch.Tensor:
    return PipelineGenerator(model, settings, **lora).generate("heart", [0, 1], [0, 0])


def test_a_family_draws_the_same_images_again(model):
    images = draw(model)
    assert images.shape == (2, pipelines.SIZE, pipelines.SIZE, 3)
    assert not rejected(images).any()
    assert torch.equal(images, draw(model))
    if "flux" not in model.name:  # which reads a guidance, or is trained to draw without
        assert not torch.equal(images, draw(model, replace(SETTINGS, guidance_scale=1.0)))


def test_lora_and_evidence_predict_what_the_pipeline_predicts(model):
    """The same latents, noise level and caption give the same prediction as in drawing."""
    guidance = 1.0 if "flux" in model.name else 4.0
    settings = replace(SETTINGS, guidance_scale=guidance)
    pipeline = PipelineGenerator(model, settings).pipeline
    denoiser = denoiser_class(pipeline)(pipeline, pipelines.SIZE)
    calls: list[tuple[Any, Any, Any]] = []
    hook = network(pipeline).register_forward_hook(
        lambda module, args, kwargs, found: calls.append((args, kwargs, found)), with_kwargs=True
    )
    with torch.no_grad():
        arguments = denoiser.arguments(settings, 1)
        pipeline(["a photo of a heart"], **arguments, output_type="latent")
        hook.remove()
        texts = denoiser.encode_captions(["a photo of a heart"])
        captioned, empty = (
            texts.conditions(torch.tensor([0]), torch.tensor([dropped]))
            for dropped in (False, True)
        )
        rows = 0
        for args, kwargs, found in calls[: 2 if "qwen" in model.name else 1]:
            hidden = args[0] if args else kwargs["hidden_states"]
            drawn = getattr(found, "sample", found[0])
            if hidden.ndim == 3:
                side = pipelines.SIZE // 8
                hidden, drawn = unpacked(hidden, side, side), unpacked(drawn, side, side)
            time = args[1] if len(args) > 1 else kwargs["timestep"]
            time = time.flatten()[0] * (1000 if "flux" in model.name or "qwen" in model.name else 1)
            level = (denoiser.noise.times - time).abs().argmin()
            for latents, expected in zip(hidden, drawn[:, : hidden.shape[1]], strict=True):
                possible = [
                    denoiser.predict(latents[None], level[None], conditions)[0]
                    for conditions in (captioned, empty)
                ]
                # Guidance needs both; the caption comes last in a pass of two, else first.
                is_empty = (rows == 0) if len(hidden) == 2 else (rows == 1)
                torch.testing.assert_close(possible[is_empty], expected, atol=1e-4, rtol=1e-4)
                rows += 1
    assert rows == (1 if guidance == 1.0 else 2)


def test_noise_of_the_right_prediction_removed_gives_the_image(model):
    """The levels are those of the sampler: from any level, one step with the target leads back."""
    pipeline = load_pipeline(model)
    denoiser = denoiser_class(pipeline)(pipeline, pipelines.SIZE)
    levels, generator = denoiser.noise, torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(2))
    t = levels.draw(4, generator)
    assert 0 <= int(t.min()) <= int(t.max()) < len(levels)
    noisy, target = levels.noisy(clean, noise, t), levels.target(clean, noise, t)
    signal, spread = (each[t].view(-1, 1, 1, 1) for each in (levels.signal, levels.spread))
    if pipeline.scheduler.config.get("prediction_type") == "v_prediction":
        restored = signal * noisy - spread * target
    elif "beta_start" in pipeline.scheduler.config and "sana" not in model.name:
        restored = (noisy - spread * target) / signal
    else:
        restored = noisy - levels.times[t].view(-1, 1, 1, 1) / 1000 * target
    torch.testing.assert_close(restored, clean, atol=1e-3, rtol=1e-3)


def test_a_lora_learns_its_caption_and_moves_pixels_by_its_scale(model, tmp_path):
    lines = torch.arange(pipelines.SIZE) // 16 % 2 * 255
    image = lines[None, :, None, None].expand(1, -1, pipelines.SIZE, 3).to(torch.uint8)
    captions, margins = ["a b " * 6, "x z " * 6], []
    batch = 2 if "flux" in model.name else 4  # a step of FLUX takes longest, and 2 suffice
    training = LoraTraining(rank=8, steps=10, batch=batch, learning_rate=4e-2, precision="fp32")
    scoring = EvidenceScoring(template="{}", precision="fp32", low=0.2, high=0.9)

    def errors(**lora: Any) -> torch.Tensor:
        scorer = DenoisingScorer(model, scoring, captions, pipelines.SIZE, **lora)
        latents, both = scorer.latents(image), torch.ones(1, 2, dtype=torch.bool)
        found = [scorer.errors(latents, [0], draw, both) for draw in range(8)]
        return torch.cat(found).mean(dim=0)

    untrained = errors()
    for c, caption in enumerate(captions):
        adapter = tmp_path / str(c)
        result = train_lora(image, [caption], model, training, pipelines.SIZE, adapter)
        assert math.isfinite(result["loss_last"])
        trained = errors(adapter=adapter)
        assert trained[c] < untrained[c]  # with the same noise; losses of steps vary much
        margins.append(float(trained[1] - trained[0]))
    # Evidence: a LoRA prefers the caption that it was trained with, by more than the other LoRA.
    assert margins[0] > margins[1]
    # The adapter is read again, and moves pixels by its scale.
    base, half, whole = (
        draw(model, adapter=adapter, scale=scale).int() for scale in (0.0, 0.5, 1.0)
    )
    assert torch.equal(base, draw(model).int())
    moved = [(images - base).abs().float().mean().item() for images in (half, whole)]
    assert 0 < moved[0] < moved[1]


def test_a_tokenizer_that_is_a_sentencepiece_model_is_read(tmp_path):
    """As published with PixArt-Sigma: `spiece.model` without `tokenizer.json`."""
    pipelines.pixart_sigma(tmp_path)
    words, model = ["a photo of a heart", "a photo of a spade"] * 20, io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=15, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    tokenizer = load_pipeline(tmp_path).tokenizer
    assert tokenizer.decode(tokenizer("a heart").input_ids, skip_special_tokens=True) == "a heart"


# ---------------------------------------------------------------- other models


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (SCHEDULER, "beta_start", "sigma_min", "whose noise levels .* flow .*; set lora: null"),
        (SCHEDULER, "epsilon", "sample", "predicts 'sample'; LoRA and evidence know epsilon, v_p"),
        ("model_index.json", "StableDiffusionP", "KolorsP", "Kolors.* can only draw; .*Qwen-Image"),
    ],
)
def test_a_model_that_lora_and_evidence_do_not_know_is_refused(file, old, new, message, tmp_path):
    changed = pipelines.stable_diffusion_1(tmp_path) / file
    changed.write_text(changed.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        check_denoiser(tmp_path, "set lora: null")
