"""Conversations that say nearly what an earlier one says."""

from __future__ import annotations

from typing import Any

from .base import Candidate, QualityFilter
from .duplicate import words

_PERMUTATIONS = 128


class NearDuplicate(QualityFilter):
    """Drops a conversation whose three-word runs are those of an earlier one to a share of `max_similarity`.

    MinHash with locality-sensitive hashing, by `datasketch`: an estimate, with an error of about 0.05.

    Raises:
        ValueError: `datasketch` is not installed.
    """

    compares = True

    def __init__(self, max_similarity: float = 0.8) -> None:
        try:
            from datasketch import MinHashLSH
        except ImportError:
            raise ValueError(
                "The filter `near_duplicate` needs `datasketch`: pip install 'peft-cartridges[quality]'."
            ) from None
        # The index proposes, the sketches decide: its threshold is set so that it misses few.
        threshold = min(max(max_similarity, 0.1), 0.9)
        self._index: Any = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.2, 0.8))
        self._sketches: list[Any] = []
        self.max_similarity = max_similarity

    def drops(self, candidate: Candidate) -> bool:
        from datasketch import MinHash

        found = words(" ".join(message["content"] for message in candidate.messages))
        runs = {" ".join(found[i : i + 3]) for i in range(max(1, len(found) - 2))}
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([run.encode() for run in sorted(runs)])
        if any(sketch.jaccard(self._sketches[like]) >= self.max_similarity for like in self._index.query(sketch)):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False
