"""Batches of self-study conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.trainer_pt_utils import IterableDatasetShard

from ..hidden_states import pad_right

STATES = "teacher_hidden_states"
TOP_K = ("teacher_top_k_ids", "teacher_top_k_logprobs")
_DTYPES = {STATES: np.float16, TOP_K[0]: np.int64, TOP_K[1]: np.float32}


def has_targets(columns: Any) -> bool:
    """Whether rows with these columns carry what the teacher said."""
    return STATES in columns or all(name in columns for name in TOP_K)


@dataclass
class SelfStudyCollator:
    """Makes a batch of rows with `input_ids`, `completion_mask` and whichever of the teacher's targets they have.

    Gives `input_ids` `[batch, longest]`, padded on the right, where no real token of a causal model sees it, so a batch
    needs no attention mask; `labels` `[batch, longest]` (the learned tokens, -100 elsewhere); the teacher's targets, row
    after row: `teacher_hidden_states` `[learned tokens, hidden_size]`, or `teacher_top_k_ids` and
    `teacher_top_k_logprobs` `[learned tokens, k]`; where rows have targets of both kinds, `exact_tokens`
    `[learned tokens]`, which tells the tokens with hidden states; and `loss_weights` `[batch, longest]` if rows have any.

    Args:
        pad_token_id: Stands behind short rows.
        padding_free: Lay all rows end to end in one: `[1, tokens of all rows]`, with `position_ids` that begin anew at
            each row, by which attention tells them apart.
    """

    pad_token_id: int = 0
    padding_free: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        columns: dict[str, tuple[list[list[Any]], Any]] = {
            "input_ids": ([list(row["input_ids"]) for row in rows], self.pad_token_id),
            "labels": ([_labels(row) for row in rows], -100),
        }
        if any("loss_weights" in row for row in rows):
            weights = [row.get("loss_weights") or [1.0] * len(row["input_ids"]) for row in rows]
            columns["loss_weights"] = (weights, 0.0)
        if self.padding_free:
            lengths = [len(row["input_ids"]) for row in rows]
            batch = {name: torch.tensor([list(itertools.chain(*parts))]) for name, (parts, _) in columns.items()}
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        else:
            batch = {name: pad_right(parts, value) for name, (parts, value) in columns.items()}
        return batch | _join_targets(rows)


def keep_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator for rows that are finished later, in the step."""
    return {"rows": rows}


def _labels(row: dict[str, Any]) -> list[int]:
    return [token if learned else -100 for token, learned in zip(row["input_ids"], row["completion_mask"], strict=True)]


def _join_targets(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    exact = [row.get(STATES) is not None for row in rows]
    if not any(exact) and any(row.get(TOP_K[0]) is None for row in rows):
        return {}
    counts = [int(sum(row["completion_mask"])) for row in rows]
    result: dict[str, Tensor] = {}
    for names, chosen in (((STATES,), exact), (TOP_K, [not one for one in exact])):
        wanted = [(row, count) for row, count, one in zip(rows, counts, chosen, strict=True) if one]
        for name in names if wanted else ():
            parts = [_as_tensor(row[name], _DTYPES[name], count) for row, count in wanted if count]
            result[name] = _concatenated(parts) if parts else torch.zeros(0, 1)
    if any(exact) and not all(exact):
        flags = [flag for flag, count in zip(exact, counts, strict=True) for _ in range(count)]
        result["exact_tokens"] = torch.tensor(flags, dtype=torch.bool, device=result[STATES].device)
    return result


def _as_tensor(values: Any, dtype: Any, count: int) -> Tensor:
    """`[count, …]` of a row's flat column."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values, dtype=dtype))
    return tensor.long().reshape(count, -1) if dtype is np.int64 else tensor.reshape(count, -1)


def _concatenated(parts: list[Tensor]) -> Tensor:
    """One tensor of parts that may lie on different devices and be of different precision."""
    device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
    dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.float32
    return torch.cat([part.to(device=device, dtype=dtype) for part in parts])


# -- every process has the same number of batches, and no row counts twice ---------------------------------------------


class EvenRows(TorchDataset[dict[str, Any]]):
    """A data set filled up to whole batches of all processes with rows in which nothing is learned.

    accelerate fills up with rows that were seen already, which then count twice in a sum over processes.

    Args:
        dataset: Rows, with a length.
        multiple: Rows of one batch, over all processes.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index] if index < len(self.dataset) else _blank(self.dataset[0])


class EvenStream(TorchIterableDataset[dict[str, Any]]):
    """As `EvenRows`, for rows that come one by one.

    Args:
        dataset: An iterable of rows.
        multiple: Rows of one batch, over all processes.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, row = 0, None
        for number, row in enumerate(self.dataset, start=1):  # noqa: B007
            yield row
        if row is not None:
            yield from (_blank(row) for _ in range(-number % self.multiple))


def source_of(dataset: Any) -> Any:
    """The data set that a data loader's rows come from."""
    while isinstance(dataset, EvenRows | EvenStream | IterableDatasetShard):
        dataset = dataset.dataset
    return dataset


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "input_ids": list(row["input_ids"][:1]), "completion_mask": [0]}
