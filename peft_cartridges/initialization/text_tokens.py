"""A cartridge of tokens that the model just reads: the text's first ones, some from all over it, or any at all."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from ..chat import ChatCodec
from ..kv_prefix import KVPrefix
from .corpus_tokens import encode_corpus


def first_tokens(
    model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool
) -> KVPrefix:
    """Keys and values of the first `num_tokens` tokens of `text` as they stand in context, the paper's default (arXiv
    2506.06266). Only those are computed."""
    input_ids = encode_corpus(processing_class, text, num_tokens=num_tokens, chat_template=chat_template)
    return KVPrefix.from_input_ids(model, input_ids[:num_tokens]).without_states()


def sampled_chunks(
    model: nn.Module,
    processing_class: Any,
    text: str,
    *,
    num_tokens: int,
    chat_template: bool,
    chunk_tokens: int = 64,
    seed: int = 0,
) -> KVPrefix:
    """Keys and values of chunks from random places of `text`, joined in the order of the text and read as one text: sampled
    chunk initialization (arXiv 2508.17032). It is as cheap as `first_tokens`, however long the text is.

    Args:
        chunk_tokens: Tokens of a chunk. The first chunk begins where the text begins.
        seed: Of the draw.

    Raises:
        ValueError: `chunk_tokens` is below 1, or the text empty or shorter than the cartridge.
    """
    if chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}.")
    input_ids = encode_corpus(processing_class, text, num_tokens=num_tokens, chat_template=chat_template)
    number = -(-num_tokens // chunk_tokens)
    lengths = [len(chunk) for chunk in torch.arange(num_tokens).tensor_split(number)]
    # Where the tokens that are left out go: before, between and behind the chunks, all ways alike.
    left_out = len(input_ids) - num_tokens
    rng = random.Random(seed)
    gaps = sorted(rng.randint(0, left_out) for _ in lengths[1:])
    chosen: list[int] = []
    for length, gap in zip(lengths, [0, *gaps], strict=True):
        start = len(chosen) + gap
        chosen += input_ids[start : start + length]
    return KVPrefix.from_input_ids(model, chosen).without_states()


def random_tokens(
    model: nn.Module,
    processing_class: Any,
    text: str | None,
    *,
    num_tokens: int,
    chat_template: bool,
    seed: int = 0,
) -> KVPrefix:
    """Keys and values of random tokens of the vocabulary, none of them special, behind the first token of a text: what a
    cartridge begins with that knows nothing, states included. A baseline (arXiv 2506.06266 has it too); `text` is not looked at."""
    if processing_class is None:
        raise ValueError("`processing_class` is missing: pass the tokenizer of the base model.")
    codec = ChatCodec.of(model, processing_class)
    tokenizer = codec.tokenizer
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    first = encode_corpus(codec, text or "The", num_tokens=1, chat_template=chat_template)[:1]
    rng = random.Random(seed)
    return KVPrefix.from_input_ids(model, [*first, *rng.choices(ordinary, k=num_tokens - 1)])
