"""Encodes images with a frozen vision transformer and learned tokens beside the patches.

VPT (arXiv:2203.12119) in the variant of CPL (arXiv:2406.10502): learned tokens have no position and
enter before the first normalisation, which treats each token separately. Image tokens before the
first block therefore do not depend on the prompt, and can be stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from air_core.backbone.blocks import is_plain, run_block, run_blocks

# B images, T tokens of an image, P learned tokens, V token width, D feature width.

CLS = slice(0, 1)  # the token whose output is the image feature


def check_vision(tower: Any) -> None:
    """Check that a tower accepts learned tokens.

    Raises:
        ValueError: it has no [CLS] token or no normalisation before the first block.
    """
    fits = (
        hasattr(tower, "class_embedding")
        and isinstance(getattr(tower, "ln_pre", None), nn.LayerNorm)
        and getattr(tower, "pool_type", "") == "tok"
        and getattr(tower, "attn_pool", None) is None
        and is_plain(tower.transformer)
    )
    if not fits:
        raise ValueError(
            "visual prompts need a ViT with a [CLS] token and ln_pre, such as OpenAI's or LAION's "
            f"ViT-B-32, B-16 or L-14, but this vision tower is a {type(tower).__name__}; set "
            "modality: text or use another backbone"
        )


def patch_tokens(tower: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, T, V): [CLS] and patches with their positions, normalised."""
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    batch = patches.shape[0]  # torch.export takes len() for a constant
    start = tower.class_embedding.to(patches.dtype).expand(batch, 1, -1)
    placed = torch.cat([start, patches], dim=1) + tower.positional_embedding.to(patches.dtype)
    tokens: Tensor = tower.ln_pre(placed)
    return tokens


def prompted_features(tower: Any, tokens: Tensor, prompt: Tensor) -> Tensor:
    """(B, D), not normalised; see Backbone.encode_tokens."""
    blocks = tower.transformer.resblocks
    # Without a mask attention does not depend on the order, so learned tokens can be last.
    if prompt.dim() == 2:
        states = run_blocks(blocks, (tokens, tower.ln_pre(prompt)[None]), CLS)
    else:
        images = slice(0, tokens.shape[1])
        layers = [tower.ln_pre(prompt[0]), *prompt[1:]]
        for block, layer in zip(blocks[:-1], layers[:-1], strict=True):
            # New learned tokens replace the output for those before the block.
            tokens = run_block(block, (tokens, layer[None]), images)
        states = run_block(blocks[-1], (tokens, layers[-1][None]), CLS)
    features: Tensor = tower.ln_post(states[:, 0])
    return features if tower.proj is None else features @ tower.proj
