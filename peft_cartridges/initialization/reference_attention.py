"""What reference texts ask of a prefix, layer by layer, as the model reads them behind it.

The only place of the initializations that looks into how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.contexts import shared_prefix
from ..attention.interface import AttentionCall, observed_attention
from ..attention.plain_attention import Part, Scoring, attend_plainly
from ..attention.probe import AttentionLayer, base_model, execution_device, find_attention_layers, get_decoder
from ..attention.shared_prefix_attention import Prefix, PrefixPart
from ..hidden_states import pad_right
from ..kv_prefix import KVPrefix, evaluating


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
        scoring: How scores are made of `query @ key`.
        is_latent: Whether keys and values are expanded from what the prefix holds.
    """

    index: int
    key: Tensor
    value: Tensor
    query: Tensor
    mask: Tensor | None
    own_lse: Tensor
    own_output: Tensor
    scoring: Scoring
    is_latent: bool

    def scores(self, head: int, asked: Tensor | None = None) -> Tensor:
        """Scores of one key head, `[group * num_queries, in_sight]`, float32; of some queries if `asked` has their
        indices."""
        query = self.query[head] if asked is None else self.query[head, asked]
        scores = (query.float() * self.scoring.scale) @ self.key[head].float().T
        if (softcap := self.scoring.softcap) is not None:
            scores = softcap * torch.tanh(scores / softcap)
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
            key_dim | value_dim]` that the layer attends to in place of the prefix's, all of them in sight, so that the
            layers above see what comes of it.

    Raises:
        UnsupportedModelError: not all layers have attention.
    """
    observer = _Observer(find_attention_layers(model), rows, observe)
    device = execution_device(base_model(model).get_input_embeddings())
    with (
        evaluating(model),
        torch.compiler.set_stance("force_eager"),  # compiled layers would show nothing
        shared_prefix(model, prefix),
        observed_attention(observer),
    ):
        # No token sees padding behind it, so no mask is needed; without the head: nobody asks for logits.
        get_decoder(model)(input_ids=pad_right(rows).to(device), use_cache=False)


class _Observer:
    """Shows each layer's reading, and keeps what it and the modules that share its keys attend to."""

    def __init__(self, layers: Sequence[AttentionLayer], rows: Sequence[Sequence[int]], observe: Observer) -> None:
        self.layers, self.observe = layers, observe
        self.real = pad_right([[1] * len(row) for row in rows]) != 0
        self.made: dict[int, PrefixPart] = {}

    def __call__(self, call: AttentionCall) -> Sequence[Prefix]:
        (part,) = call.parts
        assert isinstance(part, PrefixPart)
        part = self.made.get(call.layer, part)
        own, lse = attend_plainly(Part(call.query, call.key, call.value, call.mask, call.scoring))
        own, lse = own.float(), lse.float()
        if call.sinks is not None:
            with_sinks = torch.logaddexp(lse, call.sinks.float()[None, :, None])
            own, lse = own * (lse - with_sinks).exp()[..., None], with_sinks
        heads = part.key.shape[0]
        in_window = None
        if part.mask is not None:
            real = self.real.to(part.mask.device)
            masks = part.mask.expand(len(real), *part.mask.shape[1:])[real].float()
            in_window = masks.repeat(call.query.shape[1] // heads, 1)
        made = self.observe(
            LayerReading(
                call.layer,
                part.key,
                part.value,
                self._by_head(call.query, heads),
                in_window,
                self._by_head(lse[..., None], heads)[..., 0],
                self._by_head(own, heads),
                call.scoring,
                self.layers[call.layer].expands,
            )
        )
        if made is not None:
            part = self.made[call.layer] = PrefixPart(made[0].to(call.query), made[1].to(call.query))
        return [part]

    def _by_head(self, tensor: Tensor, heads: int) -> Tensor:
        """Of `[batch, num_heads, q_len, dim]` the real tokens, `[num_key_value_heads, group * num_queries, dim]`."""
        tokens = tensor.transpose(1, 2)[self.real.to(tensor.device)].transpose(0, 1)
        return tokens.reshape(heads, -1, tensor.shape[-1])
