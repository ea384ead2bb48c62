"""Cutting a corpus into chunks: random spans that together cover every document evenly."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..chat import get_tokenizer
from .borders import MODES, choose_border, find_borders, resolve_mode


@dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Args:
        id: Names the document in chunk ids.
        text: The text.
        description: A sentence on what the text is; it is shown to the model in front of each chunk.
        title: Its title, shown in front of the description.
    """

    id: str
    text: str
    description: str = ""
    title: str = ""

    @property
    def heading(self) -> str:
        """What stands in front of each of its chunks: title and description."""
        return "\n".join(part for part in (self.title, self.description) if part)


@dataclass(frozen=True)
class Chunk:
    """A span of a document.

    Args:
        id: `document:start-end`.
        document_id: The document that it comes from.
        start, end: The span in tokens of the document, end excluded.
        text: The text of the span.
        description: What the document's title and description say of it.
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
    columns `id`, `title` and `description` are used where there are any. An id that occurs again gets a number.

    Raises:
        ValueError: the corpus is empty, a document is empty, or the rows have no `text` column.
    """
    return list(iter_documents(corpus))


def iter_documents(corpus: Any) -> Iterator[Document]:
    """As `as_documents`, one at a time: of a stream (a `datasets.IterableDataset`, a generator) no more is held."""
    rows: Iterable[Any] = [corpus] if isinstance(corpus, (str, Document)) else corpus
    seen: set[str] = set()
    for number, row in enumerate(rows):
        document = _as_document(number, row)
        if not document.text.strip():
            raise ValueError(f"Document {number} of the corpus (`{document.id}`) is empty: leave it out or fill it.")
        if document.id in seen:
            document = replace(document, id=f"{document.id}#{number}")
        seen.add(document.id)
        yield document
    if not seen:
        raise ValueError("The corpus is empty: give at least one document with text.")


def _as_document(number: int, row: Any) -> Document:
    if isinstance(row, Document):
        return row
    if isinstance(row, str):
        return Document(f"doc{number}", row)
    if not isinstance(row, Mapping) or "text" not in row:
        columns = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"rows of type {type(row).__name__}"
        raise ValueError(f"The corpus has no `text` column but {columns}: rename the column with the texts to `text`.")
    if not isinstance(row["text"], str):
        raise ValueError(f"Row {number} of the corpus has a `text` of type {type(row['text']).__name__}, not a string.")
    name = row.get("id") or row.get("title") or f"doc{number}"
    title = row.get("title") if row.get("id") else None
    return Document(str(name), row["text"], row.get("description") or "", title or "")


class _Spool:
    """Arrays in a temporary file, so that a corpus of any length takes no memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="cartridges-corpus-")  # noqa: SIM115 (gone with the chunker)

    def add(self, array: np.ndarray) -> int:
        """Appends an array; gives its place."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(array.tobytes())
        return place

    def read(self, place: int, dtype: Any, number: int, first: int = 0) -> np.ndarray:
        """`number` entries of the array at `place`, from its entry `first` on."""
        size = np.dtype(dtype).itemsize
        self._file.seek(place + first * size)
        return np.frombuffer(self._file.read(number * size), dtype=dtype)


@dataclass(frozen=True)
class _Spooled:
    """Where a document lies in the spool: its text in UTF-32 (a character is one entry), `[tokens, 2]` character spans,
    and its borders, each as (place, number)."""

    id: str
    heading: str
    num_tokens: int
    text: int
    spans: int
    borders: tuple[tuple[int, int], ...]


class Chunker:
    """Cuts the documents of a corpus, which is read once, and from then on lies in a temporary file.

    Args:
        documents: See `as_documents` and `iter_documents`.
        processing_class: A fast tokenizer, or a processor with one.
        min_tokens, max_tokens: Bounds of a chunk's length (paper: 512 and 4096).
        mode: Where cuts are made: `tokens` (anywhere, as in the paper), `sentences`, `sections` (headings), `files`
            (blocks of source code) or `auto` (by file ending).

    Raises:
        ValueError: the bounds are out of order, the mode is unknown, two documents have one id, or the tokenizer tells
            no character offsets.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        processing_class: Any,
        *,
        min_tokens: int,
        max_tokens: int,
        mode: str = "tokens",
    ) -> None:
        if not 1 <= min_tokens <= max_tokens:
            raise ValueError(
                f"`min_chunk_tokens` ({min_tokens}) must be at least 1 and at most `max_chunk_tokens` ({max_tokens})."
            )
        if mode not in MODES:
            raise ValueError(f"`chunking` is {mode!r}; there are: {', '.join(MODES)}.")
        tokenizer = get_tokenizer(processing_class)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "`processing_class` is a slow tokenizer without character offsets: load it with `use_fast=True`."
            )
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self._spool = _Spool()
        self._documents: list[_Spooled] = []
        seen: set[str] = set()
        # The bar shows itself only where reading takes longer than two seconds.
        for document in tqdm(documents, desc="Reading the corpus", unit=" documents", delay=2, leave=False):
            if document.id in seen:
                raise ValueError(f"Two documents of the corpus have the id `{document.id}`: ids must differ.")
            seen.add(document.id)
            # verbose: a corpus may be longer than the model's window, it is about to be cut
            encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
            borders = find_borders(document.text, offsets, resolve_mode(mode, document.id))
            self._documents.append(
                _Spooled(
                    document.id,
                    document.heading,
                    len(offsets),
                    self._spool.add(np.frombuffer(document.text.encode("utf-32-le", "surrogatepass"), dtype=np.uint8)),
                    self._spool.add(np.asarray(offsets, dtype=np.int64).reshape(-1, 2)),
                    tuple((self._spool.add(np.asarray(kind, dtype=np.int64)), len(kind)) for kind in borders),
                )
            )

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each document, by its id."""
        return {document.id: document.num_tokens for document in self._documents}

    def chunks(self, seed: int) -> Iterator[Chunk]:
        """Chunks without end: tiling after tiling of the whole corpus, each with new random borders.

        A tiling cuts every document into spans of `min_tokens` to `max_tokens` tokens, so after any whole number of
        tilings all of the corpus is covered alike (the paper draws spans independently, which leaves gaps). A document
        shorter than `min_tokens` is one chunk; the last span of a document overlaps the one before where it would be
        too short. The same seed gives the same chunks.
        """
        rng = random.Random(seed)
        while True:
            spans = [
                (number, start, end)
                for number, document in enumerate(self._documents)
                for start, end in _tile(
                    document.num_tokens, self.min_tokens, self.max_tokens, self._borders(document), rng
                )
            ]
            rng.shuffle(spans)
            for number, start, end in spans:
                document = self._documents[number]
                text = self._text(document, start, end)
                yield Chunk(f"{document.id}:{start}-{end}", document.id, start, end, text, document.heading)

    def _borders(self, document: _Spooled) -> list[list[int]]:
        return [self._spool.read(place, np.int64, number).tolist() for place, number in document.borders]

    def _text(self, document: _Spooled, start: int, end: int) -> str:
        first = int(self._spool.read(document.spans, np.int64, 1, 2 * start)[0])
        last = int(self._spool.read(document.spans, np.int64, 1, 2 * (end - 1) + 1)[0])
        return (
            self._spool.read(document.text, np.uint32, last - first, first)
            .tobytes()
            .decode("utf-32-le", "surrogatepass")
        )


def chunk_corpus(
    documents: Iterable[Document],
    processing_class: Any,
    *,
    min_tokens: int,
    max_tokens: int,
    seed: int,
    mode: str = "tokens",
) -> Iterator[Chunk]:
    """`Chunker.chunks` of a new `Chunker`."""
    chunker = Chunker(documents, processing_class, min_tokens=min_tokens, max_tokens=max_tokens, mode=mode)
    return chunker.chunks(seed)


def _tile(
    num_tokens: int, min_tokens: int, max_tokens: int, borders: Sequence[Sequence[int]], rng: random.Random
) -> list[tuple[int, int]]:
    if num_tokens <= min_tokens:
        return [(0, num_tokens)]
    spans, start = [], 0
    while start < num_tokens:
        end = start + rng.randint(min_tokens, max_tokens)
        if end >= num_tokens:
            # moved back to a border that keeps it long enough, or as far as it takes
            first = min(start, num_tokens - min_tokens)
            if first < start:
                first = choose_border(borders, max(0, num_tokens - max_tokens), first, first)
            spans.append((first, num_tokens))
            break
        end = choose_border(borders, start + min_tokens, min(start + max_tokens, num_tokens), end)
        spans.append((start, end))
        start = end
    return spans
