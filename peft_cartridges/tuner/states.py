"""How the states of several cartridges become one, which recurrent layers can begin from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def join_states(states: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """One state of those of several cartridges, in their order; each part of it by name."""
    if len(states) == 1:
        return states[0]
    return {
        name: states[-1][name] if name.startswith("conv") else sum(state[name] for state in states)
        for name in states[0]
    }
