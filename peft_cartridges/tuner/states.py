"""How the states of several cartridges become one, which recurrent layers can begin from.

A linear recurrence adds what it reads to its state, so that the sum of two texts' states is nearly that of both: what a
text in front has left by then, decays. The inputs of a convolution are those just before, of which neither text's are the
right ones: their mean. Other rules were measured (`benchmarks/hybrid.py --join`, in `docs/hybrids.md`): the state of one of
them alone is worse for the others than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def join_states(states: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """One state of those of several cartridges; each part of it by name.

    Raises:
        ValueError: the parts are no linear recurrence's and no convolution's.
    """
    if len(states) == 1:
        return states[0]
    joined = {}
    for name in states[0]:
        parts = torch.stack([state[name] for state in states])
        if name.startswith("conv"):
            joined[name] = parts.mean(0)
        elif name.startswith("recurrent"):
            joined[name] = parts.sum(0)
        else:
            raise ValueError(
                f"The states of several cartridges cannot be joined into one: `{name}` is neither that of a linear recurrence "
                "nor of a convolution. Make one cartridge of all texts."
            )
    return joined
