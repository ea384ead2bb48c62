"""What is minimized: divergences between next-token distributions, summed over a vocabulary in pieces."""

from .chunked_sum import chunked_sum
from .divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from .objective import OBJECTIVES, Objective, ObjectiveKind, check_objective, register_objective
from .top_k import PADDED_LOGPROB, reduce_to_top_k

__all__ = [
    "OBJECTIVES",
    "PADDED_LOGPROB",
    "Divergence",
    "Objective",
    "ObjectiveKind",
    "check_objective",
    "chunked_sum",
    "forward_kl",
    "jensen_shannon",
    "reduce_to_top_k",
    "register_objective",
    "reverse_kl",
]
