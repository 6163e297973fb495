"""Plugins for tests: the strategy of docs/extending.md, a learner, a dataset and models."""

from __future__ import annotations

from tests.helpers.documents import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"
MARGIN = next(block.text for block in blocks(PAGE) if block.file == "margin.py")

TIP_ADAPTER = '''"""Tip-Adapter-F: a learned cache of image features (Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import Parameter

from air_core.classifiers import class_texts
from air_core.components import LEARNERS, setting


@dataclass(frozen=True)
class TipAdapter:
    keys: int = setting(8, "images of each class in the cache", ge=1)
    weight: float = setting(1.0, "of the cache, beside the text of the classes", ge=0)
    sharpness: float = setting(5.5, "of the similarity to a key", gt=0)


@LEARNERS.add("tip_adapter", settings=TipAdapter, summary="a learned cache of image features")
class TipAdapterLearner:
    def __init__(self, settings, backbone, classnames, template, seed):
        self.settings, self.scale = settings, backbone.logit_scale
        self.texts = class_texts(backbone, classnames, template).cpu()  # (C, D)
        self.keys = Parameter(self.texts[:, None].repeat(1, settings.keys, 1))  # (C, K, D)

    def start_from(self, batch, targets):
        for keys, target in zip(self.keys.data, targets.T):
            best = target.topk(min(len(keys), int((target > 0).sum()))).indices
            keys[: len(best)] = batch.features[best]

    def logits(self, batch):
        similarity = torch.einsum("nd,ckd->nck", batch.features, self.keys)
        cache = (self.settings.sharpness * (similarity - 1)).exp().mean(dim=-1)  # (N, C)
        return self.scale * (batch.features @ self.texts.T + self.settings.weight * cache)

    @property
    def prompt(self):
        return self.keys
'''

SHAPES = '''"""Squares and discs of 24 pixels, from a file with a line for each image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from air_core.components import DATASETS
from air_core.datasets import Dataset, Examples

NAMES = ("square", "disc")
FILE = Path({file!r})


def drawn(line):
    shape, left, top = line.split()
    image = Image.new("RGB", (24, 24))
    box = (int(left), int(top), int(left) + 10, int(top) + 10)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)(box, fill="white")
    return image


def load(root):
    lines = FILE.read_text().splitlines()
    labels = np.array([NAMES.index(line.split()[0]) for line in lines])
    return Examples([drawn(line) for line in lines], labels, np.full(len(lines), "free"))


@DATASETS.add("shapes", summary="squares and discs")
def shapes():
    return Dataset(
        name="shapes",
        about="squares and discs",
        classnames=NAMES,
        template="a drawing of a {{}}",
        recipe=1,
        source="drawn",
        licence="none",
        files=lambda root: [FILE],
        load=load,
    )
'''

MODELS = '''"""A backbone and a generator: the tiny CLIP, and noise of one colour for each class."""

from __future__ import annotations

import torch

from air_core.backbone.loading import load_backbone
from air_core.components import BACKBONES, GENERATORS
from air_core.diffusion import image_seed
from air_core.models.weights import tiny_folder


@BACKBONES.add("my_clip", summary="the tiny CLIP")
class MyClip:
    def __new__(cls, device, precision):
        return load_backbone(tiny_folder(), device, precision)

    @staticmethod
    def files():
        return [tiny_folder() / "open_clip_model.safetensors"]


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

SEARCH = '''"""A sampler and a pruning rule."""

import optuna

from orchestrator.components import PRUNING_RULES, SAMPLERS


class Mine(optuna.samplers.RandomSampler):
    """A sampler that differs from that of the package by its type alone."""


@SAMPLERS.add("mine", summary="random values")
def mine(search, seed):
    return Mine(seed=seed)


@PRUNING_RULES.add("above_earlier", summary="points better than all earlier ones")
def above_earlier(pruning, values, earlier):
    return [number for number, value in values.items() if value > max(earlier, default=0)]
'''
