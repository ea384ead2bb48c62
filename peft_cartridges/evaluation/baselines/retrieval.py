"""Retrieval: for each question the passages that fit it best, as many tokens of them as the cartridge has."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...chat import get_tokenizer
from ...hidden_states import forward_hidden_states
from ...kv_prefix import KVPrefix, evaluating
from ..system import NotApplicable, System, bare, behind
from .bench import Bench

# Of a passage; a cartridge of a few hundred tokens then is several of them.
_PASSAGE_TOKENS = 96

# A question to passages' numbers, best first.
Ranking = Callable[[str], Sequence[int]]


def split_passages(tokenizer: Any, text: str, passage_tokens: int = _PASSAGE_TOKENS) -> list[str]:
    """The text in passages of as many tokens, without overlap, cut between words; together they are the text."""
    encoded = get_tokenizer(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [encoded["offset_mapping"][i][0] for i in range(0, len(encoded["input_ids"]), passage_tokens)]
    cuts = [0]
    for start in starts[1:]:
        space = text.rfind(" ", cuts[-1] + 1, start + 1)
        cuts.append(space if space > 0 else start)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if text[a:b].strip()]


def bm25(bench: Bench) -> System:
    """Passages by BM25 (Lucene's variant, English stop words), by the library `bm25s`.

    Raises:
        NotApplicable: `bm25s` is not installed.
    """
    try:
        bm25s: Any = importlib.import_module("bm25s")
    except ImportError as error:
        raise NotApplicable("bm25s is not installed: pip install 'peft-cartridges[eval]'") from error
    passages = split_passages(bench.codec, bench.text)
    start = time.perf_counter()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)

    def rank(question: str) -> Sequence[int]:
        query = bm25s.tokenize([question], stopwords="en", show_progress=False)
        found, _ = index.retrieve(query, k=len(passages), show_progress=False)
        return [int(number) for number in found[0]]

    return _retrieval(bench, "BM25 passages", passages, rank, time.perf_counter() - start)


def dense(bench: Bench) -> System:
    """Passages by the cosine of embeddings: of any `SentenceTransformer`, or of the model itself where none is given.

    Raises:
        NotApplicable: an encoder is named, and `sentence-transformers` is not installed or does not find it.
    """
    encoder, name = bench.encoder, "dense passages"
    if encoder is None:
        encoder, name = OwnStates(bench), "dense passages, the model's own states"
    elif isinstance(encoder, str):
        name = f"dense passages, {encoder.rstrip('/').split('/')[-1]}"
        try:
            encoder = importlib.import_module("sentence_transformers").SentenceTransformer(encoder)
        except ImportError as error:
            raise NotApplicable(
                "sentence-transformers is not installed: pip install 'peft-cartridges[baselines]'"
            ) from error
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NotApplicable(f"the encoder {bench.encoder!r} could not be loaded: {reason}") from error
    passages = split_passages(bench.codec, bench.text)
    start = time.perf_counter()
    vectors = _unit(encoder.encode(passages))

    def rank(question: str) -> Sequence[int]:
        order: list[int] = np.argsort(-(vectors @ _unit(encoder.encode([question]))[0]), kind="stable").tolist()
        return order

    return _retrieval(bench, name, passages, rank, time.perf_counter() - start)


class OwnStates:
    """Embeds texts by the mean of the base model's final hidden states (`SentenceTransformer`'s mean pooling). Nobody has
    trained the model to embed, so it is a weak retriever, but one that needs nothing beside the model."""

    def __init__(self, bench: Bench) -> None:
        self._model, self._tokenizer = bench.model, get_tokenizer(bench.processing_class)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """`[texts, hidden_size]`."""
        with bare(self._model) as model, evaluating(model):
            device = next(model.parameters()).device
            rows = [torch.tensor([self._tokenizer(text)["input_ids"]], device=device) for text in texts]
            means = [forward_hidden_states(model, input_ids=ids)[0].float().mean(0) for ids in rows]
        vectors: np.ndarray = torch.stack(means).cpu().numpy()
        return vectors


def choose_passages(passages: Sequence[str], ranking: Sequence[int], fits: Callable[[str], bool]) -> str:
    """The best passages, as many as fit, in the order of the text; the best one alone where not even that fits."""
    chosen: list[int] = []
    for number in ranking:
        if not fits("\n\n".join(passages[i].strip() for i in sorted([*chosen, number]))):
            break
        chosen.append(number)
    return "\n\n".join(passages[i].strip() for i in sorted(chosen or ranking[:1]))


def _retrieval(bench: Bench, name: str, passages: list[str], rank: Ranking, seconds: float) -> System:
    def fits(text: str) -> bool:
        return len(bench.codec.encode_context(text)) <= bench.num_tokens

    @contextlib.contextmanager
    def per_question(question: str) -> Iterator[nn.Module]:
        text = choose_passages(passages, rank(question), fits)
        with bare(bench.model) as model:
            prefix = KVPrefix.from_text(model, bench.codec, text, max_tokens=bench.num_tokens)
        with behind(bench.model, prefix) as model:
            yield model

    with bare(bench.model) as model:
        one = KVPrefix.from_input_ids(model, bench.text_ids[:1])
    return System(
        name, bench.model, bench.codec, per_question=per_question, num_tokens=bench.num_tokens,
        kv_bytes=one.nbytes * bench.num_tokens, seconds=seconds, tokens_to_read=bench.num_tokens,
        note="read anew for each question",
    )  # fmt: skip


def _unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors, dtype=np.float32)
    return array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-9)
