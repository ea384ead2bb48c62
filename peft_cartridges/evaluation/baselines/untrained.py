"""Cartridges that nothing has trained: what each initialization is worth by itself."""

from __future__ import annotations

import random
import time

import torch

from ...initialization.registry import get_strategy
from ...kv_prefix import KVPrefix
from ..system import NotApplicable, System, bare, prefix_system
from .bench import Bench


def by_strategy(strategy: str, bench: Bench) -> System:
    """The prefix that an initialization strategy of this package makes.

    Raises:
        ValueError: there is no such strategy.
    """
    start = time.perf_counter()
    with bare(bench.model) as model:
        prefix = get_strategy(strategy)(model, bench.codec, bench.text, num_tokens=bench.num_tokens, chat_template=True)
    return _system(bench, f"untrained: {strategy}", prefix, start)


def random_vectors(bench: Bench) -> System:
    """`random_vectors_prefix` as a system."""
    start = time.perf_counter()
    return _system(bench, "untrained: random vectors", random_vectors_prefix(bench), start)


def random_vectors_prefix(bench: Bench) -> KVPrefix:
    """Normal keys and values, each layer with the mean and spread of its own on the text's first tokens: the paper's
    worst start (arXiv 2506.06266)."""
    with bare(bench.model) as model:
        like = KVPrefix.from_input_ids(model, bench.text_ids[: bench.num_tokens])
    generator = torch.Generator().manual_seed(bench.seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        return (noise * tensor.float().std() + tensor.float().mean()).to(tensor.dtype)

    return KVPrefix(tuple(map(draw, like.keys)), tuple(map(draw, like.values)))


def unrelated_text(bench: Bench) -> System:
    """`unrelated_text_prefix` as a system.

    Raises:
        NotApplicable: there is no other text, or it is too short.
    """
    start = time.perf_counter()
    return _system(bench, "untrained: unrelated text", unrelated_text_prefix(bench), start)


def unrelated_text_prefix(bench: Bench) -> KVPrefix:
    """The first tokens of another text.

    Raises:
        NotApplicable: there is no other text, or it is too short.
    """
    if not bench.unrelated_text.strip():
        raise NotApplicable("no unrelated text is given")
    ids = bench.codec.encode_context(bench.unrelated_text)[: bench.num_tokens]
    if len(ids) < bench.num_tokens:
        raise NotApplicable(f"the unrelated text has {len(ids)} tokens, {bench.num_tokens} are needed")
    with bare(bench.model) as model:
        return KVPrefix.from_input_ids(model, ids)


def sampled_chunks(bench: Bench) -> System:
    """`sampled_chunks_prefix` as a system."""
    start = time.perf_counter()
    return _system(bench, "untrained: sampled chunks", sampled_chunks_prefix(bench), start)


def sampled_chunks_prefix(bench: Bench, chunk_tokens: int = 64) -> KVPrefix:
    """Chunks from random places of the text, read one behind the other as one short text (arXiv 2508.17032)."""
    ids, rng = bench.text_ids, random.Random(bench.seed)
    count = min(-(-bench.num_tokens // chunk_tokens), -(-len(ids) // chunk_tokens))
    places = sorted(rng.sample(range(0, len(ids), chunk_tokens), count))
    chosen = [ids[0], *(token for place in places for token in ids[max(1, place) : place + chunk_tokens])]
    if len(chosen) < bench.num_tokens:  # the text's last chunk, which may be short, was among them
        chosen += ids[len(chosen) - bench.num_tokens :]
    with bare(bench.model) as model:
        return KVPrefix.from_input_ids(model, chosen[: bench.num_tokens])


def _system(bench: Bench, name: str, prefix: KVPrefix, start: float) -> System:
    return prefix_system(name, bench.model, bench.codec, prefix, seconds=time.perf_counter() - start)
