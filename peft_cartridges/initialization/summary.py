"""A cartridge of a summary that the model writes of the text."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..attention import shared_prefix
from ..attention.probe import base_model, execution_device
from ..chat import ChatCodec
from ..kv_prefix import KVPrefix, evaluating
from .corpus_tokens import encode_corpus, window_parts

_REQUEST = "Write a detailed summary of the text. Keep every name, number and date."


def summary(
    model: Any,
    processing_class: Any,
    text: str,
    *,
    num_tokens: int,
    chat_template: bool,
    request: str = _REQUEST,
) -> KVPrefix:
    """Keys and values of a summary of `num_tokens` tokens that the model writes with `text` in context, greedily, each
    part of a text beyond its window by itself. It costs `num_tokens` steps of decoding.

    Args:
        request: What asks for it.

    Raises:
        ValueError: `text` is empty or shorter than the cartridge.
    """
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=num_tokens, chat_template=chat_template)
    parts = window_parts(model, input_ids[1:])
    borders = [num_tokens * number // len(parts) for number in range(len(parts) + 1)]
    if chat_template and codec.has_template:
        asked = codec.encode_request([{"role": "user", "content": request}])
    else:
        asked = codec.tokenizer(f"\n\n{request}\n\n", add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([asked], device=execution_device(base_model(model).get_input_embeddings()))
    written = []
    with torch.no_grad(), evaluating(model):
        for part, (start, end) in zip(parts, itertools.pairwise(borders), strict=True):
            with shared_prefix(model, KVPrefix.from_input_ids(model, [input_ids[0], *part])):
                length = end - start
                output = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=length,
                    min_new_tokens=length,
                    do_sample=False,
                    pad_token_id=codec.tokenizer.pad_token_id or 0,
                )
            written.append(codec.decode(output[0, len(asked) :].tolist()).strip())
    # The text fills what is left where a summary has fewer tokens as a text than it had when it was written.
    whole = "\n\n".join([*filter(None, written), text])
    input_ids = encode_corpus(codec, whole, num_tokens=num_tokens, chat_template=chat_template)
    return KVPrefix.from_input_ids(model, input_ids[:num_tokens]).without_states()
