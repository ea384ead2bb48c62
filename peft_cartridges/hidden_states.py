"""Final hidden states of a causal LM, and its output head apart from the rest.

A next-token distribution over the whole vocabulary is hidden_size numbers and the model's own head: that is what a
teacher's target is kept as, and what lets a loss over the vocabulary be computed in pieces.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .attention import get_decoder


@torch.no_grad()
def predicting_states(
    model: nn.Module, rows: Sequence[Sequence[int]], num_predicted: Sequence[int], *, batch_size: int = 16
) -> list[Tensor]:
    """Final hidden states that predict the last tokens of each row.

    Args:
        model: A causal LM, with whatever prefix or cartridge is active on it.
        rows: Token ids.
        num_predicted: How many last tokens of each row; fewer than the row has.
        batch_size: Rows computed together.

    Returns:
        One tensor `[num_predicted[i], hidden_size]` per row, in the order of `rows`.
    """
    decoder = get_decoder(model)
    device = next(model.parameters()).device
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        hidden = decoder(input_ids=pad_right([rows[i] for i in batch]).to(device), use_cache=False).last_hidden_state
        for row, index in enumerate(batch):
            end = len(rows[index]) - 1
            results[index] = hidden[row, end - num_predicted[index] : end].clone()
    return results


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """`[len(rows), longest]`. In a causal model no real token sees padding behind it, so no mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


@dataclass
class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder gives, as any causal LM around it reads it: mixtures of experts ask for router logits too."""

    router_logits: Any = None


class OutputHead:
    """The part of a causal LM behind its final hidden states, with the soft caps and scales that some models have.

    Args:
        model: A transformers causal LM or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = get_decoder(self.model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of final hidden states `[..., hidden_size]`."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        with _answering(self.decoder, _DecoderOutput(last_hidden_state=rows)):
            logits = self.model(inputs_embeds=rows, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the output embeddings that want a gradient (none, unless they are in `modules_to_save`)."""
        embeddings = self.model.get_output_embeddings()
        return [] if embeddings is None else [p for p in embeddings.parameters() if p.requires_grad]


@contextlib.contextmanager
def _answering(module: Any, output: Any) -> Iterator[None]:
    """The module gives `output` whatever it is called with."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward


def forward_hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Final hidden states `[batch, q_len, hidden_size]` by a forward of the whole `model` (which may be wrapped for
    distributed training), with logits for one position of one row only."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    captured: list[Tensor] = []

    def keep_one(module: nn.Module, args: Any, output: Any) -> Any:
        captured.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:1, -1:].contiguous()
        return output

    handle = get_decoder(inner).register_forward_hook(keep_one)
    try:
        model(**inputs, **keep_last_logit(inner), use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def keep_last_logit(model: Any) -> dict[str, int]:
    """The argument that spares a causal LM the logits nobody asks for, where it knows one."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters else {}
