"""Where tokens stand behind a prefix: the first real token after `p` prefix tokens sits at position `p`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What is added to a score to hide a key: at most this, in any dtype (-1e4, -1e9, the lowest number, -inf).
_HIDDEN = -1e4


def positions_behind(inputs: dict[str, Any], tokens: Tensor, num_prefix_tokens: int | Tensor) -> Tensor:
    """The `position_ids` of a decoder's forward behind a prefix.

    Args:
        inputs: The decoder's arguments by name. Positions that are given are moved; otherwise they are those of the real
            tokens, by attention mask and cache, so that padding in front of a row takes none.
        tokens: `input_ids` `[batch, q_len]` or `inputs_embeds` `[batch, q_len, hidden_size]`.
        num_prefix_tokens: One number, or one for each row (`[batch]`).

    Returns:
        `[batch | 1, q_len]`, or `[axes, batch, q_len]` where a model has several axes of positions.
    """
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _positions_of_tokens(inputs, tokens)
    if isinstance(num_prefix_tokens, Tensor):
        num_prefix_tokens = num_prefix_tokens.to(positions.device)[:, None]
    return positions + num_prefix_tokens


def _positions_of_tokens(inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    q_len = tokens.shape[1]
    cache = inputs.get("past_key_values")
    seen = cache.get_seq_length() if cache is not None else 0
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):  # one for each kind of layer, as `generate` makes them
        mask = mask.get("full_attention")
    if (cu_seq_lens := inputs.get("cu_seq_lens_q")) is not None:  # packed rows: each begins anew
        index = torch.arange(q_len, device=tokens.device)
        starts = cu_seq_lens.to(tokens.device, torch.long)
        return (index - starts[torch.searchsorted(starts, index, right=True) - 1])[None]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        positions = (mask != 0).long().cumsum(-1) - 1
        if mask.shape[1] == q_len:  # the mask of the new tokens alone
            return (positions + seen).clamp(min=0)
        # It may reach beyond the tokens, to the end of a static cache.
        if isinstance(seen, Tensor):
            index = torch.arange(q_len, device=positions.device) + seen.to(positions.device)
            return positions.index_select(1, index.clamp(max=mask.shape[1] - 1)).clamp(min=0)
        end = min(seen + q_len, mask.shape[1])
        return positions[:, end - q_len : end].clamp(min=0)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen_keys = mask if mask.dtype == torch.bool else mask > _HIDDEN
        return (seen_keys[:, 0].sum(-1) - 1).clamp(min=0)  # a token stands behind as many as it sees
    return (torch.arange(q_len, device=tokens.device) + seen)[None]
