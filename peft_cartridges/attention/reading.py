"""Reading a text once: the prefix that it leaves."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..kv_prefix import KVPrefix, evaluating
from ..recurrent.own_memory import OwnMemory, find_own_memory
from .contexts import positions_from
from .delivery import prefix_is_due
from .probe import (
    base_model,
    cache_parameter,
    execution_device,
    find_attention_layers,
    find_recurrent_layers,
    get_text_config,
)

# Rotary embeddings whose angles are the same however long the text is, so that it can be read in pieces.
_SAME_AT_ANY_LENGTH = {"default", "linear", "llama3", "yarn", "proportional"}


@torch.no_grad()
def read_prefix(
    model: nn.Module, input_ids: Sequence[int] | Tensor, *, prefill_chunk_size: int = 2048, position: int = 0
) -> KVPrefix:
    """The prefix of a sequence of token ids (`[num_tokens]` or `[1, num_tokens]`), by one prefill of `model`.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        input_ids: The text's tokens.
        prefill_chunk_size: Tokens per forward, so that activations stay flat however long the text is. A model whose
            rotary angles go by the length of the text (dynamic NTK, LongRoPE), or whose layers begin every forward of
            several tokens from zero (Mamba), reads it whole.
        position: Where the first token stands.

    Raises:
        ValueError: there is no token, or a prefix is due to the model: the text would be read behind it.
        UnsupportedModelError: the model has no layer that a text leaves something in.
    """
    recurrent = find_recurrent_layers(model, skip_unsupported=True)
    attending = find_attention_layers(model, skip_unsupported=True)
    ids = torch.as_tensor(input_ids, device=execution_device(base_model(model).get_input_embeddings())).reshape(1, -1)
    if ids.shape[1] == 0:
        raise ValueError("`input_ids` is empty: a prefix needs at least one token.")
    if prefix_is_due(model):
        raise ValueError(
            "`model` has an active cartridge or is inside `shared_prefix`, behind which the text would be read. Read it "
            "with the cartridge off (`with model.disable_adapter():`), or outside of the context."
        )
    if (own := find_own_memory(base_model(model))) is not None:
        return _read_own_memory(model, ids.split(prefill_chunk_size, dim=1), own[0], len(recurrent))
    cache = _cache_that_keeps_all(model)
    keep_one_logit = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base_model(model).forward).parameters else {}
    )
    in_pieces = _reads_in_pieces(model) and not any(getattr(layer.memory, "aid", None) for layer in recurrent)
    pieces = ids.split(prefill_chunk_size, dim=1) if in_pieces else (ids,)
    moved = positions_from(model, position) if position else contextlib.nullcontext()
    with evaluating(model), moved:
        for piece in pieces:
            model(input_ids=piece, use_cache=True, **{cache_parameter(base_model(model)): cache}, **keep_one_logit)
    indices = {layer.layer_idx for layer in attending} | {layer.layer_idx for layer in recurrent}
    indices = {layer.layer_idx for layer in attending} | {layer.layer_idx for layer in recurrent}
    cache.layers = [cache.layers[index] for index in sorted(indices)]
    return KVPrefix.from_cache(cache, num_tokens=ids.shape[1])


def _read_own_memory(model: Any, pieces: Sequence[Tensor], memory: OwnMemory, num_layers: int) -> KVPrefix:
    """Of a model with a memory of its own, where a position is nothing that it knows of."""
    output: Any = {}
    with evaluating(model):
        for piece in pieces:
            seen = {memory.parameter: output[memory.parameter]} if output else {}
            output = model(input_ids=piece, use_cache=True, **seen)
    states = [{name: t[0].clone() for name, t in state.items()} for state in memory.of_output(output, num_layers)]
    return KVPrefix(states=tuple(states), num_tokens=sum(piece.shape[1] for piece in pieces))


def _cache_that_keeps_all(model: Any) -> DynamicCache:
    """A cache that keeps every token, also in sliding-window layers: which of them a later token still sees is decided
    when the prefix is used."""
    cache = DynamicCache(config=get_text_config(base_model(model)))
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def _reads_in_pieces(model: Any) -> bool:
    parameters = getattr(get_text_config(base_model(model)), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind} <= _SAME_AT_ANY_LENGTH
