"""Corpora: read from files and data sets, cut into chunks that cover them evenly."""

from .chunking import Chunk, Chunker, Document, as_documents, chunk_corpus, iter_documents
from .coverage import measure_coverage
from .loading import load_corpus
from .sentences import split_sentences

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
