"""Residual attention blocks of CLIP, computed only for the tokens whose output is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

# B sequences, T tokens, K kept tokens, W width.


def is_plain(transformer: Any) -> bool:
    """Whether a transformer consists of OpenAI's CLIP blocks, which `run_blocks` supports."""
    blocks = getattr(transformer, "resblocks", ())
    return len(blocks) > 0 and all(
        isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks
    )


def weights_dtype(tower: Any) -> torch.dtype:
    """The dtype in which a tower's blocks compute; norms and embeddings can be wider."""
    dtypes: set[torch.dtype] = {weights.dtype for weights in tower.parameters()}
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def run_blocks(
    blocks: Sequence[Any],
    parts: Sequence[Tensor],
    keep: Tensor | slice | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """States of the kept tokens after the last block: (B, K, W). See `run_block` for arguments."""
    *body, last = blocks
    for block in body:
        parts = (run_block(block, parts, mask=mask),)
    return run_block(last, parts, keep, mask)


def run_block(
    block: Any,
    parts: Sequence[Tensor],
    keep: Tensor | slice | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute a block's output for the kept tokens; all tokens serve as keys and values.

    A part that is the same for the whole batch has a batch size of 1 and is projected once. A part
    that needs no gradient is not in the backward pass.

    Args:
        parts: (B, T, W) or (1, T, W) each; concatenated they form the sequence.
        keep: the tokens to compute; None: all. Other tokens get neither a query nor an MLP.
        mask: (T, T), added to the attention logits of a token (row) to another (column).

    Returns:
        (B, K, W).
    """
    attention = block.attn
    width = attention.embed_dim
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    states, normed = _joined(parts), [block.ln_1(part) for part in parts]
    if keep is None:
        projected = _joined([linear(part, weight, bias) for part in normed])
        query, key, value = projected.chunk(3, dim=-1)
    else:
        query = linear(_joined(normed)[:, keep], weight[:width], bias[:width])
        projected = _joined([linear(part, weight[width:], bias[width:]) for part in normed])
        key, value = projected.chunk(2, dim=-1)
        states = states[:, keep]
        mask = None if mask is None else mask[keep]
    query, key, value = (_heads(x, attention.num_heads) for x in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    states = states + block.ls_1(attention.out_proj(mixed.transpose(1, 2).flatten(2)))
    kept: Tensor = states + block.ls_2(block.mlp(block.ln_2(states)))
    return kept


def _joined(parts: Sequence[Tensor]) -> Tensor:  # (B, T, W)
    if len(parts) == 1:
        return parts[0]
    batch = max(part.shape[0] for part in parts)  # torch.export takes len() for a constant
    return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)


def _heads(states: Tensor, heads: int) -> Tensor:  # (B, T, W) -> (B, heads, T, W / heads)
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)
