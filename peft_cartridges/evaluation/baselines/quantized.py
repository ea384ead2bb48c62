"""The whole text in a quantized cache of transformers: the class of KVQuant and KIVI."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import QuantizedCache

from ...kv_prefix import KVPrefix, evaluating
from ..system import NotApplicable, System, bare, prefix_system
from .bench import Bench


def quantized_cache(bits: int, bench: Bench) -> System:
    """Keys and values of all of the text, quantized and dequantized by transformers' `QuantizedCache` (quanto, groups of
    64), as its next forward would read them.

    Raises:
        NotApplicable: the text does not fit the window, or optimum-quanto is not installed or refuses.
    """
    bench.check_window()
    start = time.perf_counter()
    with bare(bench.model) as model:
        try:
            prefix = read_quantized(model, bench.text_ids, bits)
        except (ImportError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotApplicable(f"transformers' quantized cache: {reason}") from error
    # Two 16-bit numbers (scale and zero point) for each group of 64.
    stored = sum(t.numel() for t in (*prefix.keys, *prefix.values)) * (bits / 8 + 4 / 64)
    return prefix_system(
        f"full text, {bits}-bit cache", bench.model, bench.codec, prefix, kv_bytes=int(stored),
        seconds=time.perf_counter() - start, tokens_to_read=prefix.num_tokens,
    )  # fmt: skip


@torch.no_grad()
def read_quantized(model: Any, ids: list[int], bits: int) -> KVPrefix:
    """The prefix of token ids as a quantized cache gives it back."""
    cache = QuantizedCache(backend="quanto", config=model.config, nbits=bits)
    with evaluating(model):
        model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return KVPrefix(
        tuple(layer._dequantize(layer._quantized_keys)[0] for layer in layers),
        tuple(layer._dequantize(layer._quantized_values)[0] for layer in layers),
    )
