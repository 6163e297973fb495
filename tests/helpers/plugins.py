"""Plugins for tests: those of docs/extending.md and docs/plugins, a generator and a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.helpers.documents import ROOT, blocks

EXAMPLES = {file.name: file.read_text() for file in (ROOT / "docs" / "plugins").glob("*.py")}
TIP_ADAPTER = EXAMPLES["tip_adapter.py"]
MARGIN = next(
    block.text for block in blocks(ROOT / "docs" / "extending.md") if block.file == "margin.py"
)


def saved_dataset(folder: Path, places: Sequence[tuple[int, int]]) -> str:
    """The example of a dataset, which reads squares and discs at these places from a folder."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as images
    from PIL import ImageDraw

    drawn = []
    for left, top in places:
        for label, shape in enumerate(("rectangle", "ellipse")):
            image = images.new("RGB", (24, 24))
            box = (left, top, left + 10, top + 10)
            getattr(ImageDraw.Draw(image), shape)(box, fill="white")
            drawn.append({"image": image, "label": label})
    names = ClassLabel(names=["square", "disc"])
    features = Features({"image": Image(), "label": names})
    splits = {"train": drawn[:-12], "validation": drawn[-12:-8], "test": drawn[-8:]}
    saved = {name: Dataset.from_list(rows, features) for name, rows in splits.items()}
    DatasetDict(saved).save_to_disk(folder)
    return EXAMPLES["saved_dataset.py"].replace("/shared/data/pets", str(folder))


def saved_clip(folder: Path) -> str:
    """The example of a backbone, which reads a small random CLIP from a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    from tests.helpers.pipelines import text_config, tokenizer

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=24, patch_size=8,
    )  # fmt: skip
    config = CLIPConfig(text_config=text_config(16), vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return EXAMPLES["saved_clip.py"].replace("/shared/models/clip-vit-base-patch32", str(folder))


NOISE = '''"""A generator of noise."""

from __future__ import annotations

import torch

from air_core.settings.components import GENERATORS
from air_core.diffusion import image_seed


@GENERATORS.add("noise", summary="noise")
class Noise:
    def __init__(self, settings, device):
        self.settings = settings

    @staticmethod
    def files():
        return []

    def generate(self, classname, indices, attempts):
        shape, images = (self.settings.size, self.settings.size, 3), []
        for index, attempt in zip(indices, attempts):
            seed = image_seed(self.settings.seed, classname, index, attempt)
            drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
            images.append(drawn.to(torch.uint8))
        return torch.stack(images)
'''

SEARCH = '''"""A sampler."""

import optuna

from orchestrator.components import SAMPLERS


class Mine(optuna.samplers.RandomSampler):
    """Suggests the lower end of each range."""

    def sample_independent(self, study, trial, name, distribution):
        return distribution.low


@SAMPLERS.add("mine", summary="lower ends")
def mine(search, seed):
    return Mine(seed=seed)
'''
