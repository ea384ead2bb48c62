"""Random keys and values with the statistics of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kv_prefix import KVPrefix
from .corpus_tokens import encode_corpus
from .text_tokens import random_tokens, sampled_chunks

# Tokens that are enough to estimate a mean and a spread.
_READ = 512


def random_vectors(
    model: nn.Module,
    processing_class: Any,
    text: str | None,
    *,
    num_tokens: int,
    chat_template: bool,
    seed: int = 0,
) -> KVPrefix:
    """Draws keys and values whose mean and spread in every dimension of every head are those of tokens that the model
    reads, chunks of `text` or else random tokens. The first token is a real one, on which models lean as an attention
    sink. The paper (arXiv 2506.06266) found random vectors to train worst; unmatched ones do worse still.

    Args:
        seed: Of the draw.
    """
    options: dict[str, Any] = {"chat_template": chat_template, "seed": seed}
    if text is None:
        read = random_tokens(model, processing_class, None, num_tokens=_READ, **options)
    else:
        length = len(encode_corpus(processing_class, text, num_tokens=num_tokens, chat_template=chat_template))
        read = sampled_chunks(model, processing_class, text, num_tokens=min(_READ, length), **options)
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        rest = tensor[:, 1:].float()
        mean, spread = rest.mean(1, keepdim=True), rest.std(1, keepdim=True, correction=0)
        noise = torch.randn(len(tensor), num_tokens - 1, tensor.shape[2], generator=generator).to(tensor.device)
        return torch.cat([tensor[:, :1], (mean + spread * noise).to(tensor.dtype)], dim=1)

    return KVPrefix(tuple(map(draw, read.keys)), tuple(map(draw, read.values)))
