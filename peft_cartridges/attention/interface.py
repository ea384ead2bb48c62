"""The attention function that transformers' modules call while a prefix is due to them.

It is registered in transformers' `AttentionInterface` under `SHARED_PREFIX`. The masks are still made by the model, for the
implementation that the user chose; which prefixes are due, and where the tokens stand, is asked of the module's host
(`delivery.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from .config_view import model_config
from .masks import additive_mask, flash_mask
from .plain_attention import Scoring
from .probe import UnsupportedModelError
from .shared_prefix_attention import (
    Prefix,
    PrefixPart,
    RowGroups,
    RowPrefixes,
    concatenated_attention,
    shared_prefix_attention,
)

SHARED_PREFIX = "shared_prefix"

AttentionPath = Literal["auto", "merged", "concatenated"]
WindowReading = Literal["windowed", "pinned"]


@dataclass(frozen=True)
class LayerPrefix:
    """A prefix as one attention layer gets it: one for all rows of a batch, one for some, or one for each.

    Args:
        key, value: `[num_key_value_heads, num_tokens, key_dim | value_dim]`, or `[num_prefixes, num_key_value_heads,
            num_tokens, key_dim | value_dim]` where rows have prefixes of their own, the shorter ones padded with zeros; in
            the dtype of the queries; what is attended to, where that is not what is cached.
        path: How attention to it is computed; `auto` merges where it can and concatenates where it must (dropout on
            attention weights, attention weights asked for).
        window: What a sliding-window layer makes of it: `windowed`, prefix tokens leave the window as any token does
            (what `past_key_values` would do); `pinned`, they stay visible for ever.
        lengths: Of prefixes of rows, how many tokens each has, `[num_prefixes]`.
        index: Of prefixes of rows, which each row has, `[batch]`, -1 for none; `None` where row i has prefix i.
        group: Of one prefix, which rows have it (see `PrefixPart`); `None` for all.
    """

    key: Tensor
    value: Tensor
    path: AttentionPath = "auto"
    window: WindowReading = "windowed"
    lengths: Tensor | None = None
    index: Tensor | None = None
    group: tuple[RowGroups, int] | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention with prefixes due, before it is computed.

    Args:
        layer: The layer's number among those that hold a prefix; modules that read an earlier layer's keys have its.
        query: `[batch, num_heads, q_len, key_dim]`.
        key, value: The rows' own, `[batch, num_key_value_heads, kv_len, key_dim | value_dim]`.
        parts: The prefixes, with what each query sees of them.
        mask: Additive mask of the rows' own part, or `None`.
        sinks: Learned scores `[num_heads]` that carry no value, or `None`.
        scoring: How scores are made, and whether the rows' own part is causal.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    parts: Sequence[Prefix]
    mask: Tensor | None
    sinks: Tensor | None
    scoring: Scoring


AttentionObserver = Callable[[AttentionCall], Sequence[Prefix]]

_OBSERVER: ContextVar[AttentionObserver | None] = ContextVar("kv_prefix_observer", default=None)


@contextlib.contextmanager
def observed_attention(observer: AttentionObserver) -> Iterator[None]:
    """Shows `observer` each attention with prefixes due in this thread or task, and attends to the parts that it returns.
    Compiled graphs show nothing."""
    held = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(held)


def shared_prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As every function of transformers' `AttentionInterface`: query `[batch, num_heads, q_len, head_dim]`, key and
    value `[batch, num_key_value_heads, kv_len, head_dim]`; gives `[batch, q_len, num_heads, head_dim]` and weights."""
    place: Any = module._kv_prefix_place
    host, layer, number = place
    forward = host.current_forward()
    prefixes: list[LayerPrefix] = []
    starts: list[int | Tensor] = []  # where each prefix begins
    num_tokens: int | Tensor = 0
    for due in forward.due:
        parts_due = due.parts(layer, module, query)
        prefixes.extend(parts_due)
        starts.extend([num_tokens] * len(parts_due))
        num_tokens = num_tokens + due.num_tokens
    if not torch.compiler.is_compiling():
        forward.taken.add(number)
    if forward.positions is not None:
        position_ids = forward.positions
    flash = "flash" in str(model_config(module.config)._attn_implementation)
    if (paged_cache := kwargs.pop("cache", None)) is not None:  # continuous batching (`generate_batch`)
        if flash:
            raise UnsupportedModelError(
                "Continuous batching with flash attention reads its paged cache inside the kernel, where a prefix "
                'cannot join. Load the model with `attn_implementation="sdpa"`.'
            )
        key, value = paged_cache.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            kwargs={"position_ids": position_ids, **kwargs},
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a bias of relative positions to its scores, which a prefix has none of."
        )
    q_len = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if flash:
        assert not isinstance(attention_mask, BlockMask)
        if attention_mask is not None:  # may be shorter than a static cache, whose rest is not written yet
            key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
        attention_mask = flash_mask(
            attention_mask,
            query,
            key.shape[2],
            causal=bool(is_causal),
            sliding_window=sliding_window,
            position_ids=position_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        )
    causal = q_len > 1 and attention_mask is None and bool(is_causal)
    if causal and key.shape[2] > q_len:  # a static cache's first forward: what is behind q_len is not written yet
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    mask = additive_mask(attention_mask, query, key.shape[2])
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, causal)
    # Behind a single prefix, so few tokens are all inside any window of that size.
    num_seen = key.shape[2] + prefixes[0].key.shape[-2] if len(prefixes) == 1 and len(forward.due) == 1 else None
    window = None if num_seen is not None and num_seen <= (sliding_window or 0) else sliding_window
    parts: Sequence[Prefix] = [
        _part(prefix, start, query, window, position_ids) for prefix, start in zip(prefixes, starts, strict=True)
    ]
    _check_shapes(module, parts, key, value)
    if not torch.compiler.is_compiling() and (observer := _OBSERVER.get()) is not None:
        parts = observer(AttentionCall(layer, query, key, value, parts, mask, s_aux, scoring))
    paths = {prefix.path for prefix in prefixes}
    if "concatenated" in paths or dropout > 0 or kwargs.get("output_attentions"):
        if "merged" in paths and dropout > 0:
            raise ValueError(
                f'The attention path "merged" cannot apply dropout to attention weights ({dropout} in '
                f'{type(module).__name__}): use "auto", or set the model\'s attention dropout to 0.'
            )
        output, weights = concatenated_attention(
            query, key, value, parts, mask=mask, sinks=s_aux, scoring=scoring, dropout=dropout
        )
        return output.transpose(1, 2).contiguous(), weights
    output = shared_prefix_attention(query, key, value, parts, mask=mask, sinks=s_aux, scoring=scoring)
    return output.transpose(1, 2).contiguous(), None


def _part(
    prefix: LayerPrefix,
    start: int | Tensor,
    query: Tensor,
    sliding_window: int | None,
    positions: Tensor | None,
) -> Prefix:
    """`start` tokens of other prefixes (one number, or one for each row) stand in front of this one."""
    of_rows = prefix.key.ndim == 4
    num_tokens = prefix.key.shape[-2]
    key, value, mask = prefix.key, prefix.value, None
    if sliding_window and prefix.window == "windowed":
        if positions is None:
            raise ValueError(
                "A sliding-window layer was called without `position_ids`, so it cannot tell which prefix tokens are "
                'still in its window. Read the prefix as `pinned` (`sliding_window="pinned"`).'
            )
        # A prefix token j is seen from position i while i - j < sliding_window; from the first real token on, at
        # i = num_tokens, all but the last sliding_window - 1 are out of sight.
        first = 0 if of_rows else max(0, num_tokens - sliding_window + 1)
        # Models with several position axes tell the text's first; some drop the queries whose logits nobody asks for.
        positions = (positions[0] if positions.ndim == 3 else positions)[..., -query.shape[2] :]
        if isinstance(start, Tensor):
            start = start.to(positions.device)[:, None]
        stands = (positions - start).expand(len(query), -1)
        if prefix.group is not None:
            stands = stands[prefix.group[0].rows(prefix.group[1]).to(stands.device)]
        distance = stands[..., None] - torch.arange(first, num_tokens, device=positions.device)
        mask = torch.zeros(distance.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(distance >= sliding_window, torch.finfo(query.dtype).min)
        key, value = key[..., first:, :], value[..., first:, :]
    if of_rows:
        return RowPrefixes(key, value, prefix.lengths, prefix.index, mask)
    return PrefixPart(key, value, mask, prefix.group)


def expand_tokens(module: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Latent attention (MLA) caches compressed keys and values, which the module expands to what is attended to."""
    key, value = module.expand_kv(key[None], value[None])
    return key[0], value[0]


def _check_shapes(module: nn.Module, parts: Sequence[Prefix], key: Tensor, value: Tensor) -> None:
    for part in parts:
        have = (part.key.shape[-3], part.key.shape[-1], part.value.shape[-1])
        want = (key.shape[1], key.shape[3], value.shape[3])
        if have != want:
            raise ValueError(
                f"Layer {module.layer_idx} ({type(module).__name__}) has (num_key_value_heads, key_dim, value_dim) = "
                f"{want}, its prefix {have}: the prefix was made for another model."
            )


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention_forward)
