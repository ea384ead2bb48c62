"""How much of a corpus the chunks of a run cover, and how evenly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from .chunking import Chunk


@dataclass(frozen=True)
class DocumentCoverage:
    """Coverage of one document.

    Args:
        num_tokens: Its length.
        num_chunks: Chunks that are about it.
        covered: Share of its tokens that are in at least one chunk.
        fewest, mean, most: How many chunks a token is in.
    """

    num_tokens: int
    num_chunks: int
    covered: float
    fewest: int
    mean: float
    most: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def measure_coverage(chunks: Iterable[Chunk], lengths: Mapping[str, int]) -> dict[str, DocumentCoverage]:
    """Coverage per document.

    Args:
        chunks: The chunks that conversations were made about.
        lengths: Tokens of each document, by its id.
    """
    counts = {name: np.zeros(max(length, 1), dtype=np.int64) for name, length in lengths.items()}
    num_chunks = dict.fromkeys(lengths, 0)
    for chunk in chunks:
        counts[chunk.document_id][chunk.start : chunk.end] += 1
        num_chunks[chunk.document_id] += 1
    return {
        name: DocumentCoverage(
            num_tokens=lengths[name],
            num_chunks=num_chunks[name],
            covered=round(float((count > 0).mean()), 4),
            fewest=int(count.min()),
            mean=round(float(count.mean()), 3),
            most=int(count.max()),
        )
        for name, count in counts.items()
    }
