"""What reference texts ask of a prefix, layer by layer, as the model reads them behind it.

The only place of the initializations that reaches into how attention is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention.interface import (
    PREFIX_ARGUMENT,
    LayerPrefix,
    _part,
    shared_prefix_attention_forward,
    with_shared_prefix,
)
from ..attention.layers import find_attention_layers, find_decoder
from ..attention.masks import additive_mask
from ..attention.plain_attention import Scoring, attend_plainly
from ..attention.positions import PositionShift
from ..kv_prefix import KVPrefix, evaluating

_REFERENCE, _OBSERVER = "peft_cartridges_reference", "reference_observer"


@dataclass(frozen=True)
class LayerReading:
    """One attention layer as it reads reference texts behind a prefix.

    Args:
        index: Its number among the layers that hold a prefix; layers that share the keys of an earlier one have its.
        key, value: The prefix tokens in sight, `[num_key_value_heads, in_sight, key_dim | value_dim]`; the last ones of
            the prefix. Of latent attention, as they are expanded.
        query: `[num_key_value_heads, group * num_queries, key_dim]`: of the query heads that share a key, one after
            another, every token of the texts.
        mask: What a sliding window adds to the scores, `[group * num_queries, in_sight]`, or nothing.
        own_lse, own_output: Log-sum-exp `[num_key_value_heads, group * num_queries]` and output `[…, value_dim]` of
            the attention to the texts' own tokens (and to the layer's attention sinks), both float32.
        scale, softcap: How scores are made of `query @ key`.
        is_latent: Whether keys and values are expanded from what the prefix holds.
    """

    index: int
    key: Tensor
    value: Tensor
    query: Tensor
    mask: Tensor | None
    own_lse: Tensor
    own_output: Tensor
    scale: float
    softcap: float | None
    is_latent: bool

    def scores(self, head: int, asked: Tensor | None = None) -> Tensor:
        """Scores of one key head, `[group * num_queries, in_sight]`, float32; of some queries if `asked` has their
        indices."""
        query = self.query[head] if asked is None else self.query[head, asked]
        scores = (query.float() * self.scale) @ self.key[head].float().T
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is None:
            return scores
        return scores + (self.mask if asked is None else self.mask[asked])


Observer = Callable[[LayerReading], "tuple[Tensor, Tensor] | None"]


@torch.no_grad()
def read_behind(model: nn.Module, prefix: KVPrefix, rows: Sequence[Sequence[int]], observe: Observer) -> None:
    """Reads texts behind a prefix and shows each layer at work, in their order.

    Args:
        model: The model that made `prefix`, without an active cartridge.
        prefix: Keys and values in front of each text.
        rows: The texts, token ids, read in one batch.
        observe: Is called for each layer. It may return keys and values `[num_key_value_heads, any number of tokens,
            key_dim | value_dim]` that the layer attends to in place of the prefix's, so that the layers above see what
            comes of it.
    """
    layers = find_attention_layers(model)
    _, decoder = find_decoder(model, layers)
    device = next(model.parameters()).device
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=device)
    # No token sees padding behind it, so no mask is needed.
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    real = torch.arange(width, device=device) < lengths[:, None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        shift = PositionShift(decoder, lambda _: prefix.num_tokens)
        stack.callback(decoder.register_forward_pre_hook(shift, with_kwargs=True).remove)
        for index, layer in enumerate(layers):
            part = LayerPrefix(prefix.keys[index], prefix.values[index])
            observer = _LayerObserver(index, part, real, observe)
            for module in (layer.module, *(reader for _, reader in layer.readers)):
                stack.enter_context(_observed(module, observer))
        decoder(input_ids=ids, use_cache=False)  # without the head: nobody asks for logits


@contextlib.contextmanager
def _observed(module: Any, observer: _LayerObserver) -> Iterator[None]:
    config = module.config
    module.config = with_shared_prefix(config)
    module.config._attn_implementation_internal = _REFERENCE
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, _OBSERVER: observer}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()
        module.config = config


class _LayerObserver:
    """Shows a layer's reading, and keeps what the layers that share its keys attend to."""

    def __init__(self, index: int, prefix: LayerPrefix, real: Tensor, observe: Observer) -> None:
        self.index, self.prefix, self.real, self.observe = index, prefix, real, observe

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> LayerPrefix:
        part = _part(module, self.prefix, query, key, position_ids, sliding_window)
        mask = additive_mask(attention_mask, query, key.shape[2])
        scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, causal=mask is None)
        group = query.shape[1] // key.shape[1]
        own, lse = attend_plainly(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, scoring
        )
        own, lse = own.float(), lse.float()
        if s_aux is not None:
            with_sinks = torch.logaddexp(lse, s_aux.float()[None, :, None])
            own, lse = own * (lse - with_sinks).exp()[..., None], with_sinks
        heads = part.key.shape[0]
        in_window = None
        if part.mask is not None:
            masks = part.mask.expand(len(self.real), *part.mask.shape[1:])[self.real].float()
            in_window = masks.repeat(query.shape[1] // heads, 1)
        made = self.observe(
            LayerReading(
                self.index,
                part.key,
                part.value,
                self._by_head(query, heads),
                in_window,
                self._by_head(lse[..., None], heads)[..., 0],
                self._by_head(own, heads),
                scoring.scale,
                softcap,
                hasattr(module, "expand_kv"),
            )
        )
        if made is not None:
            self.prefix = LayerPrefix(*made)
        return self.prefix

    def _by_head(self, tensor: Tensor, heads: int) -> Tensor:
        """Of `[batch, num_heads, q_len, dim]` the real tokens, `[num_key_value_heads, group * num_queries, dim]`."""
        tokens = tensor.transpose(1, 2)[self.real].transpose(0, 1)
        return tokens.reshape(heads, -1, tensor.shape[-1])


def _reference_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    observer: _LayerObserver = kwargs.pop(_OBSERVER)
    prefix = observer(module, query, key, value, attention_mask, **kwargs)
    return shared_prefix_attention_forward(
        module, query, key, value, attention_mask, **{**kwargs, PREFIX_ARGUMENT: (prefix,)}
    )


AttentionInterface.register(_REFERENCE, _reference_forward)
