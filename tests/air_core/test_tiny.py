"""The tiny models: checksums and scores of the shipped weights, and training them again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from air_core.diffusion.pipeline import PipelineGenerator
from air_core.settings import GenerationSettings
from tools.tiny_world import CHECKSUMS, WEIGHTS, checksums, scores
from tools.tiny_world.pretrain_clip import ClipTraining, load_tokenizer, pretrain
from tools.tiny_world.pretrain_diffusion import (
    UnetTraining,
    VaeTraining,
    pretrain_unet,
    pretrain_vae,
)
from tools.tiny_world.render import chunk

SHORT = 600  # source images of a short run


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return load_tokenizer(WEIGHTS / "clip" / "merges.txt.gz")


def clip_of(folder: Path) -> CLIP:
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)


# ---------------------------------------------------------------- shipped weights


def test_shipped_files_are_those_of_the_checksum_list():
    listed = json.loads((WEIGHTS / CHECKSUMS).read_text())
    assert listed == checksums(WEIGHTS)
    size = sum((WEIGHTS / name).stat().st_size for name in listed)
    assert size < 16e6


def test_clip_has_the_scores_of_its_model_card_on_handwritten_digits(tokenizer):
    clip = clip_of(WEIGHTS / "clip")
    accuracy = scores.zero_shot(clip, tokenizer, *scores.handwritten())
    assert accuracy == pytest.approx(0.476, abs=0.02)
    assert scores.linear_probe(clip) > 0.93


def test_clip_classifies_generated_digits_as_their_prompt(tokenizer):
    settings = GenerationSettings(
        guidance_scale=4.0, num_inference_steps=10, size=32, precision="fp32"
    )
    generator = PipelineGenerator(WEIGHTS / "diffusion", settings)
    found = scores.sample_scores(clip_of(WEIGHTS / "clip"), tokenizer, generator, per_class=4)
    assert found["sample_agreement"] > 0.8
    assert found["samples_rejected"] == 0


# ---------------------------------------------------------------- training


def test_the_complete_training_gives_models_with_scores(tmp_path, monkeypatch):
    images, labels = scores.handwritten()
    monkeypatch.setattr(scores, "handwritten", lambda: (images[:100], labels[:100]))
    work, out = tmp_path / "work", tmp_path / "out"
    pretrain(work, out, SHORT, ClipTraining(steps=2, shipped=1, batch=8, warmup=1))
    pretrain_vae(work, SHORT, VaeTraining(steps=2, batch=4))
    pretrain_unet(work, out, SHORT, UnetTraining(steps=2, batch=4, warmup=1))
    assert sorted(checksums(out)) == sorted(checksums(WEIGHTS))
    assert not [f for f in out.rglob("*.json") if str(tmp_path) in f.read_text()]
    found = scores.all_scores(out, per_class=1, held_out=chunk(0, 40))
    assert all(np.isfinite(value) for value in found.values())
