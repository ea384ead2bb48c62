"""Holding a forward behind a shared prefix against the plain way: each row by itself, the prefix as its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kv_prefix import KVPrefix
from .probe import UnsupportedModelError, cache_parameter, get_text_config

# Of the norm; in half precision rounding leaves more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Unverified:
    """A forward that is to be verified.

    Args:
        context: What asked for it.
        tokens: `input_ids` `[batch, q_len]` or `inputs_embeds` `[batch, q_len, hidden_size]`.
        real: Which tokens are no padding, `[batch, q_len]`.
    """

    context: Any
    tokens: Tensor
    real: Tensor


def find_unverified(due: Sequence[Any], inputs: dict[str, Any], tokens: Tensor, cache: Any) -> Unverified | None:
    """The forward, if a prefix that is due to it asks for verification.

    Args:
        due: The prefixes.
        inputs: The decoder's arguments by name.
        tokens: `input_ids` or `inputs_embeds`.
        cache: The cache among the arguments, or `None`.

    Raises:
        ValueError: the forward cannot be compared.
    """
    contexts = [prefix for prefix in due if getattr(prefix, "unverified", None) is not None]
    if not contexts:
        return None
    mask = inputs.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2])
    if len(due) > 1 or not plain or (cache is not None and _goes_on(cache)):
        raise ValueError(
            "`verify=True` is for a first forward of rows behind one prefix alone, with an attention mask `[batch, q_len]` "
            "or none: disable cartridges, close other contexts, and do not go on from a cache."
        )
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask != 0
    return Unverified(contexts[0], tokens, real)


def _goes_on(cache: Any) -> bool:
    """Whether a cache holds tokens."""
    if any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return bool(cache.get_seq_length() > 0)
    return any(any(layer.has_previous_state.values()) for layer in cache.layers)


@torch.no_grad()
def verify_rows(decoder: Any, prefix: KVPrefix, forward: Unverified, found: Tensor, *, by_token: bool = False) -> None:
    """Compares final hidden states `found` `[batch, q_len, hidden_size]`; no prefix is due meanwhile. `by_token`, of a model
    that goes on from its cache one token at a time only.

    Raises:
        UnsupportedModelError: they differ.
    """
    for tokens, real, states in zip(forward.tokens, forward.real, found, strict=True):
        name = "input_ids" if tokens.ndim == 1 else "inputs_embeds"
        given = {cache_parameter(decoder): prefix.to_cache(1, config=get_text_config(decoder)), "use_cache": True}
        pieces = tokens[real].split(1) if by_token else (tokens[real],)
        expected = torch.cat([decoder(**{name: piece[None]}, **given).last_hidden_state[0] for piece in pieces])
        difference = ((states[real] - expected).float().norm() / expected.float().norm()).item()
        if not difference < _TOLERANCE.get(found.dtype, _HALF_TOLERANCE):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} gives other hidden states behind the shared prefix than with it as "
                f"`past_key_values` (they differ by {difference:.1%} of their norm): please report this model."
            )
