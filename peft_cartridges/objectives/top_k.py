"""Distributions of which only the `k` likeliest tokens are known.

What a teacher said of its `k` likeliest tokens is kept as their log-probabilities; the rest of its mass is known in
sum and not in detail. Both distributions are therefore reduced to `k + 1` outcomes, the `k` tokens and "any other", and
compared there. By the data-processing inequality every divergence of the reduced distributions is at most that of the
full ones, and it is 0 where they agree on those outcomes; nothing is renormalized, so mass that the student puts on
other tokens is not free of charge (the paper's recipe, arXiv 2506.06266, sums over the stored tokens alone).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Stands where fewer than `k` tokens are known: as good as minus infinity, and safe in every float type.
PADDED_LOGPROB = -1e4


def reduce_to_top_k(logits: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[positions, k + 1]` of student and teacher.

    Args:
        logits: The student's, `[positions, vocab_size]`.
        ids: The teacher's likeliest tokens `[positions, k]`, the first of each row the likeliest.
        log_probs: What the teacher gives them `[positions, k]`; `PADDED_LOGPROB` where fewer than `k` are known.
    """
    logits = logits.float() if logits.element_size() < 4 else logits
    log_probs = log_probs.to(logits.dtype)
    padded = log_probs < PADDED_LOGPROB / 2
    ids = torch.where(padded, ids[:, :1], ids)  # no token of its own, so it must not be taken from the others
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True) - total
    known = (logits.gather(-1, ids) - total).masked_fill(padded, PADDED_LOGPROB)
    # Stored numbers are rounded, so their sum may reach 1: what is left then counts as the smallest there is.
    rest = 1 - log_probs.exp().sum(-1, keepdim=True)
    rest = rest.clamp_min(torch.finfo(logits.dtype).eps).log()
    return torch.cat([known, others], dim=-1), torch.cat([log_probs, rest], dim=-1)
