"""Encodes prompts with a frozen text tower: learned vectors followed by a class name.

CLIP's text towers are causal: a token does not attend to later tokens, and no token attends to the
padding after [EOT]. Therefore all classes share the computation of [SOS] and the learned vectors.
Towers without a causal mask (SigLIP) compute one complete sequence per class.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from air_core.backbone.blocks import is_plain, run_blocks, weights_dtype

# R prompts, C classes, D feature width, W token width, L context length, T tokens, N longest text.

PACK = 128  # texts per pass of the text tower; with a shared context, classes


def context_encoder(tower: Any, tokenizer: Any) -> SharedContext | WholeTexts:
    """The fastest encoder that is exact for a text tower.

    Raises:
        ValueError: the tower accepts no embeddings.
    """
    if not hasattr(tower, "token_embedding") or getattr(tower, "cls_emb", None) is not None:
        raise ValueError(
            f"a {type(tower).__name__} accepts no learned vectors; prompts need the text tower of "
            "CLIP or SigLIP"
        )
    causal = getattr(tower, "attn_mask", None) is not None
    simple = hasattr(tokenizer, "eot_token_id")  # CLIP's tokenizer, with its two special tokens
    if causal and simple and _pool_type(tower) == "argmax" and is_plain(tower.transformer):
        return SharedContext(tower, tokenizer)
    return WholeTexts(tower, tokenizer)


class SharedContext:
    """Encodes `[SOS] context classname [EOT]` with a causal tower; all classes share the context.

    One sequence contains the context and then the tokens of all names. A mask restricts each token
    to the context and to earlier tokens of the same name. The last block is computed for [EOT]
    only, since no other output is used. Up to rounding the result equals that of one padded
    sequence per class.
    """

    def __init__(self, tower: Any, tokenizer: Any) -> None:
        self.tower = tower
        # Of a function, since a method would keep this encoder alive.
        self._fixed = lru_cache(maxsize=16)(partial(_fixed_parts, tower, tokenizer))

    def encode(self, prompts: Tensor, classnames: tuple[str, ...]) -> Tensor:
        """(R, L, W) -> (R, C, D), not normalised, differentiable in `prompts`.

        Raises:
            ValueError: a name is too long for the space after the context.
        """
        packs = [classnames[at : at + PACK] for at in range(0, len(classnames), PACK)]
        return torch.cat([self._encode_pack(prompts, pack) for pack in packs], dim=1)

    def _encode_pack(self, prompts: Tensor, classnames: tuple[str, ...]) -> Tensor:
        start, position, names, mask, ends = self._fixed(classnames, prompts.shape[1])
        context = (prompts + position).to(names.dtype)
        parts = (start, context, names)  # (1, 1, W), (R, L, W), (1, T - 1 - L, W)
        states = run_blocks(self.tower.transformer.resblocks, parts, ends, mask)  # (R, C, W)
        return _projected(self.tower, self.tower.ln_final(states))


class WholeTexts:
    """Encodes one complete padded sequence per class, with any text tower.

    The context is before the name, after the start token if the tokenizer has one. Activations of
    one pack of texts are in memory at a time: a text of SigLIP's ViT-B/16 takes 23 MB.
    """

    def __init__(self, tower: Any, tokenizer: Any) -> None:
        self.tower = tower
        self._ids = lru_cache(maxsize=16)(partial(_name_ids, tower, tokenizer))

    def encode(self, prompts: Tensor, classnames: tuple[str, ...]) -> Tensor:
        """See SharedContext."""
        ids, lead = self._ids(classnames, prompts.shape[1])  # (C, N), 0 at the context
        packs = torch.split(ids, max(1, PACK // len(prompts)))
        if len(packs) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._encode_pack(prompts, pack, lead) for pack in packs], dim=1)
        # Computed again for the gradient.
        encoded: list[Tensor] = [
            checkpoint(self._encode_pack, prompts, pack, lead, use_reentrant=False)
            for pack in packs
        ]
        return torch.cat(encoded, dim=1)

    def _encode_pack(self, prompts: Tensor, ids: Tensor, lead: int) -> Tensor:
        from open_clip.transformer import text_global_pool

        tower, (count, length, _) = self.tower, prompts.shape
        with torch.no_grad():
            embedded = tower.token_embedding(ids)
        texts = embedded.expand(count, -1, -1, -1)  # (R, C, N, W)
        context = prompts[:, None].expand(-1, len(ids), -1, -1)
        before, behind = texts[:, :, :lead], texts[:, :, lead + length :]
        states = torch.cat([before, context, behind], dim=2).flatten(0, 1)
        states = (states + tower.positional_embedding).to(weights_dtype(tower))
        states = tower.ln_final(tower.transformer(states, attn_mask=tower.attn_mask))
        end = getattr(tower, "eos_id", getattr(tower, "text_eos_id", None))
        pooled = text_global_pool(states, ids.repeat(count, 1), _pool_type(tower), end)
        return _projected(tower, pooled).view(count, len(ids), -1)


@torch.no_grad()
def _fixed_parts(
    tower: Any, tokenizer: Any, classnames: tuple[str, ...], length: int
) -> tuple[Tensor, ...]:
    """Embeddings of [SOS] and the names, positions of the context, mask, indices of [EOT]."""
    words = [name.replace("_", " ") for name in classnames]
    encoded = [[*tokenizer.encode(text), tokenizer.eot_token_id] for text in words]
    positions = tower.positional_embedding
    prefix = 1 + length
    room = len(positions) - prefix
    _check_fits(words, [len(ids) <= room for ids in encoded], room)
    # Tokens attend to the prefix (owner -1) and to earlier tokens of the same owner.
    owner = torch.tensor([-1] * prefix + [c for c, ids in enumerate(encoded) for _ in ids])
    place = torch.tensor(
        list(range(prefix)) + [prefix + i for ids in encoded for i in range(len(ids))]
    )
    sees = (owner[None, :] == owner[:, None]) | (owner[None, :] == -1)
    sees &= place[None, :] <= place[:, None]
    mask = torch.zeros(len(owner), len(owner)).masked_fill(~sees, -math.inf)
    ends = prefix - 1 + torch.tensor([len(ids) for ids in encoded]).cumsum(0)
    ids = torch.tensor([tokenizer.sot_token_id, *(i for ids in encoded for i in ids)])
    embedded = tower.token_embedding(ids.to(positions.device))
    here = place.to(positions.device)
    names = embedded[1:] + positions[here[prefix:]]
    dtype = weights_dtype(tower)
    return (
        (embedded[:1] + positions[:1])[None].to(dtype),
        positions[1:prefix],
        names[None].to(dtype),
        mask.to(positions.device, dtype),
        ends.to(positions.device),
    )


def _name_ids(
    tower: Any, tokenizer: Any, classnames: tuple[str, ...], length: int
) -> tuple[Tensor, int]:
    """Token ids with a gap for the context, and the index of the gap."""
    size = len(tower.positional_embedding)
    room = size - length
    words = [name.replace("_", " ") for name in classnames]
    ids = tokenizer(words, context_length=room)
    # The last token of a text that was cut off differs from that of the complete text.
    whole = tokenizer(words, context_length=2 * size)[:, :room]
    _check_fits(words, (ids == whole).all(dim=1).tolist(), room)
    # Some tokenizers start a text with a token of its own.
    inner = getattr(tokenizer, "tokenizer", None)
    starts = (inner.bos_token_id, inner.cls_token_id) if inner else (tokenizer.sot_token_id,)
    lead = int(int(ids[0, 0]) in starts)
    gap = torch.zeros(len(ids), length, dtype=ids.dtype)
    ids = torch.cat([ids[:, :lead], gap, ids[:, lead:]], dim=1)
    return ids.to(tower.positional_embedding.device), lead


def _check_fits(names: list[str], fits: list[bool], room: int) -> None:
    if not all(fits):
        raise ValueError(
            f"class name {names[fits.index(False)]!r} does not fit into the {room} tokens that "
            "remain after the context; shorten the name or prompt.length"
        )


def _pool_type(tower: Any) -> str:
    return str(getattr(tower, "pool_type", getattr(tower, "text_pool_type", "")))


def _projected(tower: Any, states: Tensor) -> Tensor:  # (..., W) -> (..., D)
    projection = tower.text_projection
    if projection is None:
        return states
    projected: Tensor = (
        projection(states) if isinstance(projection, nn.Linear) else states @ projection
    )
    return projected
