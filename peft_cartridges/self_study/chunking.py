"""Cutting a corpus into chunks: random token spans that together cover every document evenly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..chat import get_tokenizer


@dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Args:
        id: Names the document in chunk ids.
        text: The text.
        description: A sentence on what the text is; it is shown to the model in front of each chunk.
    """

    id: str
    text: str
    description: str = ""


@dataclass(frozen=True)
class Chunk:
    """A span of a document.

    Args:
        id: `document:start-end`.
        document_id: The document that it comes from.
        start, end: The span in tokens of the document, end excluded.
        text: The text of the span.
        description: The document's description.
    """

    id: str
    document_id: str
    start: int
    end: int
    text: str
    description: str = ""

    @property
    def context(self) -> str:
        """The chunk as it is put into the model's context, the description in front."""
        return f"{self.description}\n\n{self.text}" if self.description else self.text


def as_documents(corpus: Any) -> list[Document]:
    """Documents from a text, several texts, or rows with a `text` column (a `datasets.Dataset`, a list of dicts);
    columns `id` (or `title`) and `description` are used where there are any.

    Raises:
        ValueError: the corpus is empty, a document is empty, or the rows have no `text` column.
    """
    rows: Iterable[Any] = [corpus] if isinstance(corpus, (str, Document)) else corpus
    documents = [_as_document(number, row) for number, row in enumerate(rows)]
    if not documents:
        raise ValueError("The corpus is empty: give at least one document with text.")
    for number, document in enumerate(documents):
        if not document.text.strip():
            raise ValueError(f"Document {number} of the corpus (`{document.id}`) is empty: leave it out or fill it.")
    return documents


def _as_document(number: int, row: Any) -> Document:
    if isinstance(row, Document):
        return row
    if isinstance(row, str):
        return Document(f"doc{number}", row)
    if not isinstance(row, Mapping) or "text" not in row:
        columns = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"rows of type {type(row).__name__}"
        raise ValueError(f"The corpus has no `text` column but {columns}: rename the column with the texts to `text`.")
    name = row.get("id") or row.get("title") or f"doc{number}"
    return Document(str(name), row["text"], row.get("description") or "")


def chunk_corpus(
    documents: Iterable[Document], processing_class: Any, *, min_tokens: int, max_tokens: int, seed: int
) -> Iterator[Chunk]:
    """Chunks without end: tiling after tiling of the whole corpus, each with new random borders.

    A tiling cuts every document into spans of `min_tokens` to `max_tokens` tokens, so after any whole number of
    tilings all of the corpus is covered alike (the paper draws spans independently, which leaves gaps). A document
    shorter than `min_tokens` is one chunk; the last span of a document overlaps the one before where it would be too
    short.

    Args:
        documents: See `as_documents`.
        processing_class: A fast tokenizer, or a processor with one.
        min_tokens, max_tokens: Bounds of a chunk's length (paper: 512 and 4096).
        seed: The same seed gives the same chunks.

    Raises:
        ValueError: the bounds are out of order, or the tokenizer tells no character offsets.
    """
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(
            f"`min_chunk_tokens` ({min_tokens}) must be at least 1 and at most `max_chunk_tokens` ({max_tokens})."
        )
    tokenizer = get_tokenizer(processing_class)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "`processing_class` is a slow tokenizer without character offsets: load it with `use_fast=True`."
        )
    encoded = [
        (document, tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
        for document in documents
    ]
    rng = random.Random(seed)
    while True:
        spans = [
            (document, offsets, start, end)
            for document, offsets in encoded
            for start, end in _tile(len(offsets), min_tokens, max_tokens, rng)
        ]
        rng.shuffle(spans)
        for document, offsets, start, end in spans:
            text = document.text[offsets[start][0] : offsets[end - 1][1]]
            yield Chunk(f"{document.id}:{start}-{end}", document.id, start, end, text, document.description)


def _tile(num_tokens: int, min_tokens: int, max_tokens: int, rng: random.Random) -> list[tuple[int, int]]:
    if num_tokens <= min_tokens:
        return [(0, num_tokens)]
    spans, start = [], 0
    while start < num_tokens:
        end = start + rng.randint(min_tokens, max_tokens)
        if end >= num_tokens:
            spans.append((min(start, num_tokens - min_tokens), num_tokens))
            break
        spans.append((start, end))
        start = end
    return spans
