"""Shifting a model's positions past its prefix: the first real token after `p` prefix tokens sits at position `p`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Offset = int | Tensor


class PositionShift:
    """A forward pre-hook (with kwargs) for the module that is given `position_ids`.

    Args:
        decoder: The module that the hook is for; see `find_decoder`.
        offset: Tells, given the batch size, how many prefix tokens stand in front: one number, or one per row
            (`[batch]`).
    """

    def __init__(self, decoder: nn.Module, offset: Callable[[int], Offset]) -> None:
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.offset = offset

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if tokens is None:
            return None
        offset = self.offset(tokens.shape[0])
        if isinstance(offset, int) and offset == 0:
            return None
        positions = inputs.get("position_ids")
        if positions is None:
            cache = inputs.get("past_key_values")
            seen = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + seen)[None]
        if isinstance(offset, Tensor):
            # [batch] against [batch | 1, q_len], or [axes, batch, q_len] where a model has several position axes
            offset = offset.to(positions.device)[:, None]
        positions = positions + offset
        if "position_ids" in self.parameters[: len(args)]:
            index = self.parameters.index("position_ids")
            return (*args[:index], positions, *args[index + 1 :]), kwargs
        return args, {**kwargs, "position_ids": positions}
