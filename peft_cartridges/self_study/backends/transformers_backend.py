"""Generation in process, by the model that is trained: prompts of a batch share the prefix that is active."""

from __future__ import annotations

from typing import Any

import torch

from ...chat import get_tokenizer
from ..conversation import end_of_turn_ids


class TransformersBackend:
    """Samples continuations with `model.generate`.

    Args:
        model: A transformers causal LM; whatever `shared_prefix` is active on it stands in front of every prompt.
        processing_class: Its tokenizer or processor.
        batch_size: Prompts decoded together.
    """

    def __init__(self, model: Any, processing_class: Any, *, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self.end_ids = end_of_turn_ids(processing_class, model)
        pad = get_tokenizer(processing_class).pad_token_id
        self.pad_id = next(iter(self.end_ids)) if pad is None else pad

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float) -> list[list[int]]:
        """New token ids of each prompt, up to and including the end-of-turn token; `temperature=0` is greedy."""
        answers: list[list[int]] = [[] for _ in prompts]
        # Prompts of like length together: less padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, answer in zip(
                batch, self._generate([prompts[i] for i in batch], max_new_tokens, temperature), strict=True
            ):
                answers[index] = answer
        return answers

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float) -> list[list[int]]:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.end_ids),
            **sampling,
        )
        return [self._cut(row[width:].tolist()) for row in output]

    def _cut(self, tokens: list[int]) -> list[int]:
        for position, token in enumerate(tokens):
            if token in self.end_ids:
                return tokens[: position + 1]
        return tokens
