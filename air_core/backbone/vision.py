"""Encodes images with a frozen vision transformer and learned tokens beside the patches.

VPT (arXiv:2203.12119) in the variant of CPL (arXiv:2406.10502): learned tokens have no position and
enter before the first normalisation, which treats each token separately. Image tokens before the
first block therefore do not depend on the prompt, and can be stored. Learned tokens are not pooled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from air_core.backbone.blocks import is_plain, run_block, run_blocks

# B images, T tokens of an image, P learned tokens, V token width, D feature width.

CLS = slice(0, 1)  # the token whose output is the image feature


def vision_tower(tower: Any) -> VisionTower:
    """The tower of a model as this module uses it.

    Raises:
        ValueError: it is no vision transformer.
    """
    if hasattr(tower, "class_embedding"):
        is_clip = (
            is_plain(tower.transformer)
            and isinstance(tower.ln_pre, nn.LayerNorm)
            and tower.pool_type == "tok"
            and tower.attn_pool is None
            and not tower.final_ln_after_pool
        )
        return ClipTower(tower) if is_clip else OpenClipTower(tower)
    if hasattr(tower, "trunk"):
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        if isinstance(tower.trunk, Eva | VisionTransformer):
            return TimmTower(tower)
    kind = type(getattr(tower, "trunk", tower)).__name__
    raise ValueError(
        f"visual prompts need a vision transformer, such as a ViT-B-32, but this tower is a "
        f"{kind}; set modality: text or use another backbone"
    )


class VisionTower(ABC):
    """A vision transformer: `layers` blocks on tokens of `width`; pooling may read all of them."""

    width: int
    layers: int
    blocks: Sequence[Any]

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, V): the image tokens that enter the first block."""

    def features(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """(B, D), not normalised; see Backbone.encode_tokens."""
        count, length = tokens.shape[:2]
        layers = prompt if prompt.dim() == 3 else prompt[None]
        for number, block in enumerate(self.blocks):
            if number < len(layers):  # in place of those before the block
                learned = layers[number] if number else self._enter(layers[0])
                learned = learned.expand(count, *learned.shape)
                tokens = torch.cat([tokens[:, :length], learned], dim=1)
            tokens = self._run(block, tokens, length)
        return self._pooled(tokens[:, :length])

    @abstractmethod
    def _enter(self, learned: Tensor) -> Tensor:
        """Learned tokens after the normalisation before the first block."""

    def _run(self, block: Any, tokens: Tensor, length: int) -> Tensor:
        """The output of a block for tokens of which `length` are of the image."""
        tokens = block(tokens)
        return tokens

    @abstractmethod
    def _pooled(self, tokens: Tensor) -> Tensor:
        """Features (B, D) from the last image tokens."""


class OpenClipTower(VisionTower):
    """A vision transformer of open_clip with another normalisation or pooling, such as CLIPA's."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.blocks = tower, tower.transformer.resblocks
        self.width, self.layers = int(tower.class_embedding.shape[0]), len(self.blocks)

    def tokens(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.tower._embeds(pixels)
        return tokens

    def _enter(self, learned: Tensor) -> Tensor:
        entered: Tensor = self.tower.ln_pre(learned)
        return entered

    def _pooled(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.tower._pool(tokens)[0]
        return pooled if self.tower.proj is None else pooled @ self.tower.proj


class ClipTower(OpenClipTower):
    """A tower with a [CLS] token, of OpenAI and LAION; computes only what its output needs."""

    def features(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        tower = self.tower
        # Without a mask attention does not depend on the order, so learned tokens can be last.
        if prompt.dim() == 2:
            states = run_blocks(self.blocks, (tokens, tower.ln_pre(prompt)[None]), CLS)
        else:
            images = slice(0, tokens.shape[1])
            layers = [tower.ln_pre(prompt[0]), *prompt[1:]]
            for block, layer in zip(self.blocks[:-1], layers[:-1], strict=True):
                # New learned tokens replace the output for those before the block.
                tokens = run_block(block, (tokens, layer[None]), images)
            states = run_block(self.blocks[-1], (tokens, layers[-1][None]), CLS)
        features: Tensor = tower.ln_post(states[:, 0])
        return features if tower.proj is None else features @ tower.proj


class TimmTower(VisionTower):
    """A vision transformer of timm: EVA, SigLIP, MobileCLIP-B, Perception Encoder."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.trunk = tower, tower.trunk
        self.blocks = self.trunk.blocks
        self.width, self.layers = int(self.trunk.embed_dim), len(self.blocks)

    def tokens(self, pixels: Tensor) -> Tensor:
        trunk = self.trunk
        placed = trunk._pos_embed(trunk.patch_embed(pixels))
        # EVA's also returns the rotations of attention, which are the same for all images.
        tokens: Tensor = trunk.norm_pre(placed[0] if isinstance(placed, tuple) else placed)
        return tokens

    def _enter(self, learned: Tensor) -> Tensor:
        entered: Tensor = self.trunk.norm_pre(learned)
        return entered

    def _run(self, block: Any, tokens: Tensor, length: int) -> Tensor:
        rope = getattr(self.trunk, "rope", None)
        if rope is None:
            return super()._run(block, tokens, length)
        rotations = rope.get_embed()  # (patches, sines and cosines)
        none = torch.zeros_like(rotations[:1])
        none[:, none.shape[1] // 2 :] = 1  # learned tokens have no position
        rotations = torch.cat([rotations, none.expand(tokens.shape[1] - length, -1)])
        states: Tensor = block(tokens, rope=rotations)
        return states

    def _pooled(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.tower.head(self.trunk.forward_head(self.trunk.norm(tokens)))
        return pooled
