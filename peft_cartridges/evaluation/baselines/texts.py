"""Nothing in context, all of the text, its first tokens, or the model's own summary of it."""

from __future__ import annotations

import time

from ...kv_prefix import KVPrefix
from ...model_cost import forward_flops
from ..answers import generate_answers
from ..system import NotApplicable, System, bare, bare_system, prefix_system
from .bench import Bench

_SUMMARIZE = (
    "Write a summary of the whole text above, with all facts, names and numbers that a reader may ask about, in at most "
    "{words} words."
)


def no_context(bench: Bench) -> System:
    """The model as it is."""
    return bare_system(bench.model, bench.codec)


def full_text(bench: Bench) -> System:
    """All of the text in the system message, prefilled once.

    Raises:
        NotApplicable: it does not fit into the model's window.
    """
    bench.check_window()
    return _of_ids(bench, "full text", bench.text_ids)


def first_tokens(bench: Bench) -> System:
    """As many first tokens of the text as the cartridge has."""
    return _of_ids(bench, "first tokens", bench.text_ids[: bench.num_tokens])


def summary(bench: Bench) -> System:
    """The model's own summary of the text, of at most as many tokens, in the system message.

    Raises:
        NotApplicable: the text does not fit into the model's window, or the model writes nothing.
    """
    bench.check_window()
    start = time.perf_counter()
    request = _SUMMARIZE.format(words=max(10, bench.num_tokens * 2 // 3))
    whole = full_text(bench)
    ids = generate_answers(whole, [request], max_new_tokens=bench.num_tokens)[0]
    text = bench.codec.decode(ids)
    if not text.strip():
        raise NotApplicable("the model writes no summary")
    with bare(bench.model) as model:
        prefix = KVPrefix.from_text(model, bench.codec, text, max_tokens=bench.num_tokens)
    flops = (whole.flops or 0) + forward_flops(model.config, len(ids), len(bench.text_ids))
    seconds = time.perf_counter() - start
    return prefix_system(
        "summary", bench.model, bench.codec, prefix, seconds=seconds, flops=flops, tokens_to_read=prefix.num_tokens
    )


def _of_ids(bench: Bench, name: str, ids: list[int]) -> System:
    start = time.perf_counter()
    with bare(bench.model) as model:
        prefix = KVPrefix.from_input_ids(model, ids)
        flops = forward_flops(model.config, len(ids))
    seconds = time.perf_counter() - start
    return prefix_system(name, bench.model, bench.codec, prefix, seconds=seconds, flops=flops, tokens_to_read=len(ids))
