"""What the teacher says about each learned token, as it is kept: final hidden states, top-k log-probabilities, or nothing.

Hidden states are exact: with the model's own head they are the whole distribution. The k likeliest tokens are what an
engine gives, and smaller where k is small. Nothing is kept where the teacher is computed in the training step (`live`):
the row has the text that stood in its context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor

from ..objectives import PADDED_LOGPROB

# Kind of targets -> the columns it is kept in. A new kind is one row here and one in `self_study.scoring.ENCODERS`.
TARGETS: dict[str, dict[str, Any]] = {
    "hidden_states": {"teacher_hidden_states": List(Value("float16"))},
    "top_k": {"teacher_top_k_ids": List(Value("int32")), "teacher_top_k_logprobs": List(Value("float32"))},
    "live": {},
}


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Final hidden states `[learned, hidden_size]` that predict the learned tokens."""

    states: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def select(self, positions: Sequence[int]) -> HiddenStates:
        return HiddenStates(self.states[torch.as_tensor(positions, device=self.states.device, dtype=torch.long)])

    def columns(self) -> dict[str, Any]:
        """`teacher_hidden_states`, flat `[learned * hidden_size]` in float16.

        Raises:
            ValueError: a state is not finite, or does not fit into float16.
        """
        flat = self.states.float().cpu().numpy().reshape(-1)
        largest = np.abs(flat).max(initial=0.0)
        if not largest <= np.finfo(np.float16).max:
            raise ValueError(
                f"The teacher's hidden states reach {largest:g}, which float16, in which they are kept, cannot hold: "
                'use `teacher_targets="top_k"`.'
            )
        return {"teacher_hidden_states": flat.astype(np.float16)}


@dataclass(frozen=True, eq=False)
class TopK:
    """The k likeliest next tokens at each learned position, likeliest first.

    Args:
        token_ids: `[learned, k]`, int32; 0 where padded.
        logprobs: `[learned, k]`, float32, of the full softmax (they do not sum to one); `PADDED_LOGPROB` where padded.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, positions: Sequence[int]) -> TopK:
        return TopK(
            self.token_ids[np.asarray(positions, dtype=np.int64)], self.logprobs[np.asarray(positions, np.int64)]
        )

    def columns(self) -> dict[str, Any]:
        """`teacher_top_k_ids` and `teacher_top_k_logprobs`, each flat `[learned * k]`."""
        return {
            "teacher_top_k_ids": self.token_ids.astype(np.int32).reshape(-1),
            "teacher_top_k_logprobs": self.logprobs.astype(np.float32).reshape(-1),
        }

    def cut(self, k: int, mass: float = 1.0) -> TopK:
        """At most k tokens, and no more than it takes to reach a probability mass of `mass`; padded to k."""
        ids, logprobs = self.token_ids[:, :k], self.logprobs[:, :k]
        if missing := k - ids.shape[1]:
            ids = np.pad(ids, ((0, 0), (0, missing)))
            logprobs = np.pad(logprobs, ((0, 0), (0, missing)), constant_values=PADDED_LOGPROB)
        if mass < 1:
            probabilities = np.exp(logprobs)
            enough = np.cumsum(probabilities, axis=1) - probabilities >= mass  # reached before this token
            ids, logprobs = np.where(enough, 0, ids), np.where(enough, PADDED_LOGPROB, logprobs)
        return TopK(ids.astype(np.int32), logprobs.astype(np.float32))

    @staticmethod
    def concatenate(parts: Sequence[TopK]) -> TopK:
        """Joins positions; all parts have one k."""
        return TopK(np.concatenate([p.token_ids for p in parts]), np.concatenate([p.logprobs for p in parts]))


def top_k_of_tables(tables: Sequence[Mapping[int, float]], k: int) -> TopK:
    """The k likeliest of each position's `{token id: log-probability}`, as engines give them."""
    token_ids = np.zeros((len(tables), k), dtype=np.int32)
    logprobs = np.full((len(tables), k), PADDED_LOGPROB, dtype=np.float32)
    for row, table in enumerate(tables):
        best = sorted(table.items(), key=lambda entry: -entry[1])[:k]
        for column, (token, logprob) in enumerate(best):
            token_ids[row, column], logprobs[row, column] = token, max(logprob, PADDED_LOGPROB)
    return TopK(token_ids, logprobs)


Targets = HiddenStates | TopK


def top_k_of_logits(logits: Tensor, k: int) -> TopK:
    """The k likeliest tokens of logits `[positions, vocab_size]`."""
    logprobs, ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(ids.to(torch.int32).cpu().numpy(), logprobs.cpu().numpy())


def top_k_divergence(teacher: TopK, other: TopK) -> float:
    """Mean KL(teacher || other) in nats per position, over the teacher's listed tokens.

    A token that `other` does not list is taken to be as likely as the least likely that it lists, so the result is
    rather too small than too large.
    """
    total = 0.0
    for ids, logprobs, other_ids, other_logprobs in zip(
        teacher.token_ids, teacher.logprobs, other.token_ids, other.logprobs, strict=True
    ):
        listed = other_logprobs > PADDED_LOGPROB / 2
        known = dict(zip(other_ids[listed].tolist(), other_logprobs[listed].tolist(), strict=True))
        floor = min(known.values(), default=0.0)
        for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            if logprob > PADDED_LOGPROB / 2:
                total += np.exp(logprob) * (logprob - known.get(token, floor))
    return float(total / max(len(teacher), 1))
