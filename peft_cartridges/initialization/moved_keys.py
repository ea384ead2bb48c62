"""Moving a prefix to other positions: what its keys would be if the text had stood there.

Rotary position embeddings turn pairs of a key's dimensions by angles that are proportional to the position. Which pairs,
and by how much, differs between architectures and layers (halves or neighbours, all dimensions or some, scaled
frequencies, none at all), so the model itself is asked: some tokens are read at both positions, the angles are
measured, and what is left over tells whether the keys are only turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.probe import UnsupportedModelError
from ..attention.reading import read_prefix
from ..kv_prefix import KVPrefix

# Of how many tokens a turn of the keys is measured.
PROBE_TOKENS = 64
# Shares of a head's dimensions that architectures turn; the rest of the dimensions carries no position.
_ROTARY_SHARES = (1.0, 0.75, 0.5, 0.25)
# Of the keys' norm: far above what bfloat16 leaves over, far below what any other change would.
_LEFT_OVER = 0.1


def move_prefix(model: nn.Module, prefix: KVPrefix, distance: int, probe: Sequence[int]) -> KVPrefix:
    """`prefix` with its keys as they would be `distance` positions later (earlier, if negative).

    Args:
        model: The model that made it, without an active cartridge.
        prefix: Keys and values of a text.
        distance: Positions.
        probe: Some tens of token ids of the text, on which the turn is measured.

    Raises:
        UnsupportedModelError: the model's keys change in another way than by a rotation (learned positions, for example).
    """
    if distance == 0:
        return prefix
    start = max(0, -distance)
    before, after = (read_prefix(model, probe, position=at) for at in (start, start + distance))
    moved = []
    # Latent attention keeps the part of the keys that has positions where others have their values.
    for tensors, old, new in ((prefix.keys, before.keys, after.keys), (prefix.values, before.values, after.values)):
        for layer, (tensor, here, there) in enumerate(zip(tensors, old, new, strict=True)):
            moved.append(_measure(here.float(), there.float(), layer)(tensor))
    return KVPrefix(tuple(moved[: prefix.num_layers]), tuple(moved[prefix.num_layers :]))


@dataclass(frozen=True)
class _Turn:
    """A rotation of pairs of dimensions: `cos`, `sin` `[pairs]`, `first` and `second` the pairs' dimensions."""

    first: Tensor
    second: Tensor
    cos: Tensor
    sin: Tensor

    def __call__(self, key: Tensor) -> Tensor:
        turned, exact = key.clone(), key.float()
        one, other = exact[..., self.first], exact[..., self.second]
        turned[..., self.first] = (one * self.cos - other * self.sin).to(key.dtype)
        turned[..., self.second] = (other * self.cos + one * self.sin).to(key.dtype)
        return turned


def _measure(before: Tensor, after: Tensor, layer: int) -> _Turn:
    """The turn that best takes `before` to `after` (`[heads, tokens, dim]`), in the least squares of each pair."""
    best, least = None, float("inf")
    for first, second in _pairings(before.shape[-1], before.device):
        one, other, new_one, new_other = (t[..., d] for t in (before, after) for d in (first, second))
        real = (one * new_one + other * new_other).sum((0, 1))
        imaginary = (one * new_other - other * new_one).sum((0, 1))
        angle = torch.atan2(imaginary, real)
        turn = _Turn(first, second, angle.cos(), angle.sin())
        left_over = ((turn(before) - after).norm() / after.norm().clamp_min(1e-9)).item()
        if left_over < least:
            best, least = turn, left_over
    if best is None or not least < _LEFT_OVER:
        raise UnsupportedModelError(
            f"The keys of layer {layer} do not only turn with their position ({least:.0%} of them is left over): this "
            "model's prefixes cannot be moved. Use the initialization `first_tokens`."
        )
    return best


def _pairings(dim: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    indices = torch.arange(dim, device=device)
    sizes = dict.fromkeys(int(dim * share) // 2 * 2 for share in _ROTARY_SHARES)
    halves = [(indices[: size // 2], indices[size // 2 : size]) for size in sizes if size]
    return [*halves, (indices[: dim // 2 * 2 : 2], indices[1 : dim // 2 * 2 : 2])]
