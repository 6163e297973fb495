"""A small bundle for tests."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from air_core.backbone.loading import load_backbone
from air_core.bundle.checks import TEXT
from air_core.bundle.classifier import Bundle
from air_core.bundle.manifest import weights_description
from air_core.classifiers import class_texts
from air_core.datasets import get_dataset
from air_core.models.weights import tiny_folder


def shallow_clip(folder: Path, layers: int) -> str:
    """Write the tiny CLIP with the first of its four image layers, exported in less time."""
    shutil.copytree(tiny_folder(), folder)
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    content = json.loads(config.read_text())
    content["model_cfg"]["vision_cfg"]["layers"] = layers
    config.write_text(json.dumps(content))
    left_out = re.compile(rf"visual\.transformer\.resblocks\.[{layers}-3]\.")
    save_file({k: a for k, a in load_file(weights).items() if not left_out.match(k)}, weights)
    return str(folder)


def zero_shot(name: str = "tiny") -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `write_bundle` for the zero-shot classifier of a backbone on the digits."""
    digits, backbone = get_dataset("digits"), load_backbone(name)
    about = {
        "classnames": list(digits.classnames),
        "template": digits.template,
        "modality": "text",
        "prompt": None,
        "classifier": "text",
        "space": "probability",
        "temperatures": {},
        "backbone": {**weights_description(name), "precision": "fp32"},
        "unseen": None,
        "metrics": {},
        "lineage": {},
    }
    texts = class_texts(backbone, digits.classnames, digits.template).numpy()
    scale = np.array(backbone.logit_scale, dtype=np.float32)
    return about, {TEXT: {"text_features": texts, "logit_scale": scale}}


def text_logits(bundle: Bundle, images: Sequence[Image.Image]) -> Tensor:
    """Logits (N, C) of the text classifier."""
    return bundle.logits_of(bundle.encode(images), "text")
