"""Corpora: read from files and data sets, cut into chunks that cover them evenly."""

from .borders import split_sentences
from .chunking import Chunk, Chunker, Document, as_documents, chunk_corpus, iter_documents
from .coverage import measure_coverage
from .loading import load_corpus

__all__ = [
    "Chunk",
    "Chunker",
    "Document",
    "as_documents",
    "chunk_corpus",
    "iter_documents",
    "load_corpus",
    "measure_coverage",
    "split_sentences",
]
