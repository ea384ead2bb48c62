"""Parts of one attention merged by their log-sum-exp: the softmax over all of their keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plain_attention import accumulation_dtype


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merged output, in the dtype that sums are held in, and merged log-sum-exp.

    Args:
        outputs: Each `[batch, heads, q_len, value_dim]`.
        lses: Each `[batch, heads, q_len]`; `-inf` where a part has no key for a query, but not in all parts.
        sinks: Scores that carry no value, broadcastable to a log-sum-exp.
    """
    if len(outputs) == 1 and sinks is None:
        return outputs[0], lses[0]
    wide = [output.to(accumulation_dtype(output)) for output in outputs]
    if len(wide) == 2 and sinks is None:
        # The second part's weight is exp(lse2) / (exp(lse1) + exp(lse2)).
        weight = (lses[1] - lses[0]).sigmoid_()[..., None]
        return torch.lerp(wide[0], wide[1], weight), torch.logaddexp(lses[0], lses[1])
    scores = list(lses) if sinks is None else [*lses, sinks.to(lses[0].dtype).expand_as(lses[0])]
    lse = torch.stack(scores).logsumexp(0)
    merged = torch.zeros_like(wide[0])
    for output, part_lse in zip(wide, lses, strict=True):
        merged.addcmul_(output, (part_lse - lse).exp_()[..., None])
    return merged, lse
