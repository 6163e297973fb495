"""A frozen CLIP behind a few verbs. Knows nothing of prompts that are learned or of datasets.

Text towers of CLIP are causal, which `encode_context` relies on (CoOp, arXiv:2109.01134).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

# R prompts, B images, C classes, D feature width, W token width, L context length, T tokens.

PACK = 128  # classes that share one pass of the text tower
ENCODE_BATCH = 256


class Backbone:
    """A frozen CLIP. All features have unit length.

    Args:
        model: an open_clip CLIP with a plain causal text tower.
        preprocess: PIL image -> (3, H, W).
        tokenizer: open_clip's SimpleTokenizer with the model's vocabulary.
    """

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model.eval()
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.exp())
        self._packs = lru_cache(maxsize=16)(self._pack)

    @property
    def token_width(self) -> int:
        return int(self.model.token_embedding.weight.shape[1])

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.token_embedding.weight.device)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """(B, D) on the CPU, in the order given."""
        features = []
        for start in range(0, len(images), ENCODE_BATCH):
            pixels = torch.stack(
                [self.preprocess(image) for image in images[start : start + ENCODE_BATCH]]
            )
            features.append(normalize(self.model.encode_image(pixels.to(self.device))).cpu())
        return torch.cat(features).clone()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(C, D), one per text."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return normalize(self.model.encode_text(tokens))

    def encode_context(self, context: Tensor, classnames: Sequence[str]) -> Tensor:
        """Text features of `[SOS] context classname [EOT]` for every class.

        The tower is causal, so all classes share the states of [SOS] and the context; their few
        own tokens lie side by side in one sequence and see the context and themselves only.
        This equals one sequence a class up to rounding, at a fraction of the tokens.

        Args:
            context: (..., L, W) learned vectors.
            classnames: C names.

        Returns:
            (..., C, D), differentiable in `context`.

        Raises:
            ValueError: a name does not fit behind the context.
        """
        lead, (length, width) = context.shape[:-2], context.shape[-2:]
        prompts = context.reshape(-1, length, width)  # (R, L, W)
        names = tuple(classnames)
        features = torch.cat(
            [
                self._encode_pack(prompts, names[start : start + PACK])
                for start in range(0, len(names), PACK)
            ],
            dim=1,
        )
        return features.reshape(*lead, len(names), -1)

    def _encode_pack(self, prompts: Tensor, classnames: tuple[str, ...]) -> Tensor:
        start, names, position, mask, ends = self._packs(classnames, prompts.shape[1])
        count = len(prompts)
        tokens = torch.cat(
            [start.expand(count, -1, -1), prompts, names.expand(count, -1, -1)], dim=1
        )
        states = self.model.transformer(tokens + position, attn_mask=mask)  # (R, T, W)
        ended = self.model.ln_final(states[:, ends])  # (R, C, W)
        return normalize(ended @ self.model.text_projection, dim=-1)

    @torch.no_grad()
    def _pack(self, classnames: tuple[str, ...], length: int) -> tuple[Tensor, ...]:
        """The fixed parts: start and name embeddings, positions, mask, index of each [EOT]."""
        encoded = [
            [*self.tokenizer.encode(name.replace("_", " ")), self.tokenizer.eot_token_id]
            for name in classnames
        ]
        prefix = 1 + length
        longest = max(range(len(encoded)), key=lambda c: len(encoded[c]))
        room = len(self.model.positional_embedding) - prefix
        if len(encoded[longest]) > room:
            raise ValueError(
                f"class name {classnames[longest]!r} takes {len(encoded[longest])} tokens, but "
                f"{room} are left after a context of {length}; shorten the name or prompt.length"
            )
        # Tokens of one owner see the prefix (owner -1) and earlier tokens of the same owner.
        owner = torch.tensor([-1] * prefix + [c for c, ids in enumerate(encoded) for _ in ids])
        place = torch.tensor(
            list(range(prefix)) + [prefix + i for ids in encoded for i in range(len(ids))]
        )
        sees = (owner[None, :] == owner[:, None]) | (owner[None, :] == -1)
        sees &= place[None, :] <= place[:, None]
        mask = torch.zeros(len(owner), len(owner)).masked_fill(~sees, -math.inf)
        ends = prefix - 1 + torch.tensor([len(ids) for ids in encoded]).cumsum(0)
        embed = self.model.token_embedding
        start = embed(torch.tensor([self.tokenizer.sot_token_id], device=self.device))
        names = embed(torch.tensor([i for ids in encoded for i in ids], device=self.device))
        position = self.model.positional_embedding[place.to(self.device)]
        return start, names, position, mask.to(self.device), ends.to(self.device)


def tiny_folder() -> Path:
    """The embedded CLIP, an open_clip folder."""
    return Path(str(files("air_core") / "tiny" / "weights" / "clip"))


def load_backbone(folder: Path, device: str = "cpu") -> Backbone:
    """A CLIP from an open_clip folder (open_clip_config.json, safetensors weights).

    The folder may hold `merges.txt.gz`, its own byte-pair merges; else it is CLIP's vocabulary.

    Raises:
        ValueError: the folder is not such a folder, or its towers are built in another way.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{folder} has no open_clip_config.json: not an open_clip folder")
    # Without require_pretrained, missing weights are a warning and a chance-level CLIP.
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", precision="fp32", device=device, require_pretrained=True
    )
    text = model
    if not hasattr(text, "token_embedding") or getattr(text, "text_pool_type", "") != "argmax":
        raise ValueError(f"{folder}: this text tower is not CLIP's causal one, which prompts need")
    if getattr(text, "attn_mask", None) is None:
        raise ValueError(f"{folder}: this text tower has no causal mask, which prompts need")
    merges = folder / "merges.txt.gz"
    length = len(model.positional_embedding)
    tokenizer = (
        SimpleTokenizer(bpe_path=str(merges), context_length=length)
        if merges.is_file()
        else SimpleTokenizer(context_length=length)
    )
    return Backbone(model, preprocess, tokenizer)
