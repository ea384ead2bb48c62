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

    Gives `input_ids` `[batch, longest]`, `labels` `[batch, longest]` (the learned tokens, -100 elsewhere) and
    `teacher_hidden_states` `[learned tokens, hidden_size]`, row after row.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [
            [
                token if learned else -100
                for token, learned in zip(row["input_ids"], row["completion_mask"], strict=True)
            ]
            for row in rows
        ]
        hidden = [np.asarray(row["teacher_hidden_states"], dtype=np.float16) for row in rows]
        flat = torch.from_numpy(np.concatenate(hidden))
        num_learned = sum(sum(row["completion_mask"]) for row in rows)
        return {
            "input_ids": pad_right([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": pad_right(labels, -100),
            "teacher_hidden_states": flat.reshape(num_learned, -1),
        }
