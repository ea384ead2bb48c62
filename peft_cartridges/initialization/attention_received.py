"""How much attention each token of a prefix receives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.delivery import shared_prefix
from ..attention.probe import find_attention_layers, get_decoder
from ..kv_prefix import KVPrefix, evaluating


@torch.no_grad()
def attention_received(model: nn.Module, prefix: KVPrefix, rows: Iterable[Sequence[int]]) -> list[Tensor]:
    """The largest weight that any token of `rows` (token ids) gives each token of `prefix` as it is read behind it.

    Returns:
        One `[num_key_value_heads, num_tokens]` per layer, of all query heads of a group and of the later layers that
        share the keys.
    """
    layers = find_attention_layers(model)
    scores = [key.new_zeros(key.shape[:2], dtype=torch.float32) for key in prefix.keys]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(shared_prefix(model, prefix, attention="concatenated"))
        for layer, score in zip(layers, scores, strict=True):
            for module in layer.modules:
                stack.callback(module.register_forward_hook(_Collect(score)).remove)
        decoder = get_decoder(model)  # without the head: nobody asks for logits
        device = next(model.parameters()).device
        for row in rows:
            decoder(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    return scores


class _Collect:
    """Keeps the largest weights and lets go of the rest, layer by layer."""

    def __init__(self, score: Tensor) -> None:
        self.score = score

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        weights: Tensor = output[1]  # [1, num_heads, q_len, prefix tokens in sight + q_len]
        in_sight = weights.shape[-1] - weights.shape[-2]
        heads = weights[0, ..., :in_sight].amax(1)
        # Where all heads share one compressed key, its weight is the largest of theirs.
        groups = heads.unflatten(0, (self.score.shape[0], -1)).amax(1).float()
        seen = self.score[:, self.score.shape[1] - in_sight :]
        torch.maximum(seen, groups.to(seen.device), out=seen)
        return (output[0], None, *output[2:])
