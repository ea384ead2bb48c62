"""Rows of a batch that are not one text each: padded rows, and rows that several texts are packed into.

A recurrence goes over whatever it is given. Behind a state, padding in front of a row would decay it and shift the
convolution's window, and a packed text would begin from the one before; so tokens are sorted into texts, and texts of one
length are run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What a kernel is told of packed texts; a text by itself needs none of it.
_OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Texts:
    """Texts of one length in a batch.

    Args:
        rows: Which row each is in, `[num_texts]`.
        columns: Where its tokens are, `[num_texts, length]`.
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class RowPlan:
    """How the tokens of a batch are to be run.

    Args:
        texts: Texts, those of one length together.
        packed: Whether a row has several.
        padded_behind: Whether all padding is behind the texts, where it changes the final state alone.
    """

    texts: Sequence[Texts]
    packed: bool = False
    padded_behind: bool = False


def plan_rows(
    mask: Any, batch_size: int, q_len: int, positions: Tensor | None, cu_seq_lens: Tensor | None
) -> RowPlan | None:
    """`None` where each row is one text without padding.

    Args:
        mask: The decoder's `attention_mask`: `[batch, length]`, whose last `q_len` columns are those of the tokens, or one
            for each kind of layer, of which a recurrent one's has that form; any other says nothing of padding.
        batch_size, q_len: Of the tokens.
        positions: `[1, q_len]`; in a batch of one row, positions that restart tell packed texts apart.
        cu_seq_lens: Where packed texts begin and end, `[num_texts + 1]`.
    """
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if isinstance(one, Tensor) and one.ndim == 2), None)
    if q_len == 1 and cu_seq_lens is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= q_len:
        real = mask[:, -q_len:].bool()
        if bool(real.all()):
            return None
        spans = [(row, columns.nonzero()[:, 0]) for row, columns in enumerate(real)]
        behind = all(len(columns) == 0 or int(columns[-1]) == len(columns) - 1 for _, columns in spans)
        return RowPlan(_by_length(spans), padded_behind=behind)
    if batch_size > 1:
        return None
    starts = _starts(positions, cu_seq_lens, q_len)
    if len(starts) < 2:
        return None
    ends = [*starts[1:], q_len]
    device = None if positions is None else positions.device
    spans = [(0, torch.arange(start, end, device=device)) for start, end in zip(starts, ends, strict=True)]
    return RowPlan(_by_length(spans), packed=True)


def _starts(positions: Tensor | None, cu_seq_lens: Tensor | None, q_len: int) -> list[int]:
    if cu_seq_lens is not None:
        return [int(start) for start in cu_seq_lens[:-1] if int(start) < q_len]
    if positions is None or positions.shape[-1] != q_len:
        return [0]
    first_axis = positions.reshape(-1, q_len)[0]
    return [0, *((first_axis.diff() != 1).nonzero()[:, 0] + 1).tolist()]


def _by_length(spans: Sequence[tuple[int, Tensor]]) -> list[Texts]:
    lengths: dict[int, list[tuple[int, Tensor]]] = {}
    for row, columns in spans:
        lengths.setdefault(len(columns), []).append((row, columns))
    return [
        Texts(
            torch.tensor([row for row, _ in group], device=group[0][1].device),
            torch.stack([columns for _, columns in group]),
        )
        for length, group in lengths.items()
        if length
    ]


def take(arguments: dict[str, Any], texts: Texts, batch_size: int, q_len: int) -> dict[str, Any]:
    """A call's arguments for some texts: of every tensor `[batch | 1, q_len, …]` their tokens."""

    def tokens(value: Any) -> Any:
        if (
            not isinstance(value, Tensor)
            or value.ndim < 2
            or value.shape[1] != q_len
            or value.shape[0] not in (1, batch_size)
        ):
            return value
        rows, columns = texts.rows.to(value.device), texts.columns.to(value.device)
        return value[rows[:, None] if value.shape[0] == batch_size else torch.zeros_like(rows[:, None]), columns]

    return {name: tree_map(tokens, value) for name, value in arguments.items() if name not in _OF_PACKING}


def put(outputs: Sequence[Any], plan: RowPlan, batch_size: int, q_len: int) -> Any:
    """The outputs for the texts of a plan as one for the whole batch; zeros where a token is padding."""

    def whole(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        result = parts[0].new_zeros(batch_size, q_len, *parts[0].shape[2:])
        for texts, part in zip(plan.texts, parts, strict=True):
            if part.shape[:2] != texts.columns.shape:
                return None  # something else than one vector for each token: a state, that only the cache is asked for
            result = result.index_put((texts.rows.to(part.device)[:, None], texts.columns.to(part.device)), part)
        return result

    return tree_map(whole, *outputs)
