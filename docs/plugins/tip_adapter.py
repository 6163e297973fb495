"""Tip-Adapter-F (Zhang et al. 2022, arXiv:2111.03930): a learned cache of image features."""

from dataclasses import dataclass

import torch
from torch.nn import Parameter

from air_core.classifiers import class_texts
from air_core.settings.components import LEARNERS, setting


@dataclass(frozen=True)
class TipAdapter:
    keys: int = setting(16, "images of each class in the cache", ge=1)
    weight: float = setting(1.0, "of the cache, beside the text of the classes", ge=0)
    sharpness: float = setting(5.5, "of the similarity to a key", gt=0)


@LEARNERS.add("tip_adapter", settings=TipAdapter, summary="a learned cache of image features")
class TipAdapterLearner:
    def __init__(self, settings, backbone, classnames, template, seed):
        self.settings, self.scale = settings, backbone.logit_scale
        self.texts = class_texts(backbone, classnames, template)  # (C, D)
        self.keys = Parameter(self.texts[:, None].repeat(1, settings.keys, 1))  # (C, K, D)

    def start_from(self, batch, targets):  # targets: (M, C)
        for keys, target in zip(self.keys.data, targets.T):
            best = target.topk(min(len(keys), int((target > 0).sum()))).indices
            keys[: len(best)] = batch.features[best]

    def logits(self, batch):
        features = batch.features  # (N, D)
        keys, texts = self.keys.to(features.device), self.texts.to(features.device)
        similarity = torch.einsum("nd,ckd->nck", features, keys)
        cache = (self.settings.sharpness * (similarity - 1)).exp().sum(dim=-1)  # (N, C)
        return self.scale * features @ texts.T + self.settings.weight * cache

    @property
    def prompt(self):
        return self.keys
