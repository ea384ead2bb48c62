"""The mask of a row's own keys, however the model states it, as the additive mask that our kernels take.

Models make masks for the attention implementation that the user chose: a boolean or additive `[batch, 1 | num_heads,
q_len, kv_len]` (sdpa, eager), a `BlockMask` (flex attention), or what flash attention's kernels take, which know of
causality and windows themselves: nothing, a padding mask `[batch, kv_len]`, or packed rows told by their positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask


def additive_mask(attention_mask: Tensor | BlockMask | None, query: Tensor, kv_len: int) -> Tensor | None:
    """The mask of eager, sdpa and flex attention, in the dtype of `query`.

    Args:
        attention_mask: As the model gives it; boolean ones are true where a key is seen.
        query: `[batch, num_heads, q_len, key_dim]`.
        kv_len: Number of keys; a mask for more is cut.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask):
        batch, heads = attention_mask.shape[:2]
        attention_mask = create_mask(
            attention_mask.mask_mod, batch, heads, query.shape[2], kv_len, device=str(query.device)
        )
    attention_mask = attention_mask[..., :kv_len]
    if attention_mask.dtype != torch.bool:
        return attention_mask.to(query.dtype)
    additive = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
    return additive.masked_fill(~attention_mask, torch.finfo(query.dtype).min)


def flash_mask(
    padding_mask: Tensor | None,
    query: Tensor,
    kv_len: int,
    *,
    causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> Tensor | None:
    """What a flash attention kernel would see, boolean `[batch | 1, 1, q_len, kv_len]`, or `None` where that is plain
    causal attention of as many queries as keys (or of one query to all keys).

    Args:
        padding_mask: `[batch, kv_len]`, true or 1 for real tokens.
        query: `[batch, num_heads, q_len, key_dim]`; its last query stands at the last key.
        kv_len: Number of keys.
        causal, sliding_window: As the kernel gets them.
        position_ids: `[batch, q_len]`; in a batch of one row, positions that restart tell packed sequences apart.
        cu_seq_lens: Where packed sequences begin and end, `[num_sequences + 1]`, if the data collator gives them.
    """
    q_len = query.shape[2]
    sequences = _packed_sequences(position_ids, cu_seq_lens, query) if q_len == kv_len else None
    windowed = bool(sliding_window) and kv_len > (sliding_window or 0)
    if padding_mask is None and sequences is None and not windowed and (q_len == 1 or q_len == kv_len or not causal):
        return None
    keys = torch.arange(kv_len, device=query.device)
    queries = (torch.arange(q_len, device=query.device) + kv_len - q_len)[:, None]
    seen = (keys <= queries) if causal else torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
    if windowed:
        assert sliding_window is not None
        seen = seen & (queries - keys < sliding_window)
    if sequences is not None:
        seen = seen & (sequences[:, None] == sequences)
    seen = seen[None, None]
    return seen if padding_mask is None else seen & padding_mask.bool()[:, None, None]


def _packed_sequences(position_ids: Tensor | None, cu_seq_lens: Tensor | None, query: Tensor) -> Tensor | None:
    """The number of the packed sequence that each token belongs to, `[q_len]`; `None` where nothing is packed."""
    batch, _, q_len, _ = query.shape
    if batch != 1:
        return None
    if cu_seq_lens is not None:
        tokens = torch.arange(q_len, device=query.device)
        return torch.searchsorted(cu_seq_lens.to(query.device, torch.long), tokens, right=True)
    if position_ids is None or position_ids.shape[-1] != q_len:
        return None
    positions = position_ids.reshape(-1, q_len)[0]  # the first axis where a model has several (Qwen's vision models)
    restarts = torch.diff(positions, prepend=positions[:1] - 1) != 1
    return restarts.cumsum(0) if bool(restarts.any()) else None
