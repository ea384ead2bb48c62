"""Batches of self-study conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hidden_states import pad_right


@dataclass
class SelfStudyCollator:
    """Pads rows on the right, where no real token of a causal model sees it, so a batch needs no attention mask.

    Gives `input_ids` `[batch, longest]`, `labels` `[batch, longest]` (the learned tokens, -100 elsewhere) and the
    teacher's targets, row after row: `teacher_hidden_states` `[learned tokens, hidden_size]`, or `teacher_top_k_ids`
    and `teacher_top_k_logprobs` `[learned tokens, k]`, whichever the rows have (neither, if `targets` is false).

    Args:
        pad_token_id: Stands behind short rows.
        targets: Whether the teacher's targets are wanted.
        contexts: Whether to give `contexts` too, a list of the texts in the teacher's context, and `questions`, the
            first of each conversation (`None` where there are no `messages`).
    """

    pad_token_id: int = 0
    targets: bool = True
    contexts: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [
            [
                token if learned else -100
                for token, learned in zip(row["input_ids"], row["completion_mask"], strict=True)
            ]
            for row in rows
        ]
        batch: dict[str, Any] = {
            "input_ids": pad_right([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": pad_right(labels, -100),
        }
        if self.targets:
            num_learned = sum(sum(row["completion_mask"]) for row in rows)
            batch |= _join_targets(rows, num_learned)
        if self.contexts:
            batch["contexts"] = [row["context"] for row in rows]
            batch["questions"] = [_first_question(row) for row in rows]
        return batch


def _join_targets(rows: list[dict[str, Any]], num_learned: int) -> dict[str, Tensor]:
    columns: dict[str, Any]
    if rows[0].get("teacher_hidden_states") is not None:
        columns = {"teacher_hidden_states": np.float16}
    else:
        columns = {"teacher_top_k_ids": np.int64, "teacher_top_k_logprobs": np.float32}
    return {
        name: torch.from_numpy(np.concatenate([np.asarray(row[name], dtype=dtype) for row in rows])).reshape(
            num_learned, -1
        )
        for name, dtype in columns.items()
    }


def _first_question(row: dict[str, Any]) -> str | None:
    messages = row.get("messages") or []
    return next((message["content"] for message in messages if message["role"] == "user"), None)
