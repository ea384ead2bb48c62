"""The half of the kvpress baseline that runs in kvpress's own environment: reads a text, compresses its cache, and answers
for rows behind it. A script that imports nothing of this package, since kvpress's pins exclude its versions.

One JSON object a line on stdin asks, one on stdout answers; tensors go through safetensors files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

# Presses whose kept tokens stand one behind the other, so that what follows comes right behind them.
_MOVED = ("KeyRerotationPress", "FinchPress", "RestoreKVPress")


def make_press(name: str, options: dict[str, Any], ratio: float) -> Any:
    if name == "AdaKVPress":
        return kvpress.AdaKVPress(getattr(kvpress, options["press"])(compression_ratio=ratio))
    if name == "DuoAttentionPress":
        return kvpress.DuoAttentionPress(head_compression_ratio=ratio, **options)
    return getattr(kvpress, name)(compression_ratio=ratio, **options)


class Pressed:
    """A model behind the compressed cache of a text."""

    def __init__(self, model: Any, press: Any, context_ids: list[int]) -> None:
        self.model = model
        self.cache: Any = DynamicCache()
        with torch.no_grad(), press(model):
            model.model(input_ids=torch.tensor([context_ids], device=model.device), past_key_values=self.cache)
        self.lengths = [self.cache.get_seq_length(layer) for layer in range(len(self.cache))]
        moved = type(press).__name__ in _MOVED
        self.position = self.lengths[0] if moved else len(context_ids)
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        first: Any = self.cache.layers[0]
        heads = first.keys.shape[1]
        evicted = sum(len(indices[0]) / heads for indices in masked if indices is not None)
        self.kept = (sum(self.lengths) - evicted) / len(self.lengths)

    @torch.no_grad()
    def forward(self, ids: list[int], start: int) -> torch.Tensor:
        """Final hidden states of tokens behind the text and `start` others. kvpress holds tokens that only some heads keep
        as masks, and finds none for too many queries at once: then the tokens are read in smaller pieces."""
        before = [self.cache.get_seq_length(layer) for layer in range(len(self.cache))]
        positions = torch.arange(self.position + start, self.position + start + len(ids), device=self.model.device)
        try:
            hidden: torch.Tensor = self.model.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=self.cache,
                position_ids=positions[None],
            ).last_hidden_state[0]
        except ValueError:
            if len(ids) == 1:
                raise
            self.crop(before)
            half = len(ids) // 2
            return torch.cat([self.forward(ids[:half], start), self.forward(ids[half:], start + half)])
        return hidden

    def crop(self, lengths: list[int]) -> None:
        """Takes away what was read behind the first tokens of each layer."""
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def states(self, row: list[int], length: int) -> torch.Tensor:
        hidden = self.forward(row, 0)
        self.crop(self.lengths)
        return hidden[len(row) - 1 - length : len(row) - 1].clone()

    def generate(self, row: list[int], max_new_tokens: int, ends: list[int]) -> list[int]:
        answer: list[int] = []
        read, start = row, 0
        while len(answer) < max_new_tokens:
            hidden = self.forward(read, start)
            start += len(read)
            token = int(self.model.lm_head(hidden[-1]).argmax())
            if token in ends:
                break
            answer.append(token)
            read = [token]
        self.crop(self.lengths)
        return answer


def main() -> None:
    # Libraries may print: only answers go where they are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    model = model.to(settings["device"]).eval()
    press = make_press(settings["press"], settings["options"], settings["ratio"])
    if hasattr(press, "update_model_and_tokenizer"):
        press.update_model_and_tokenizer(model, AutoTokenizer.from_pretrained(settings["model"]))
    pressed = Pressed(model, press, settings["context_ids"])
    print(json.dumps({"kept": pressed.kept}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rows = request["rows"]
        if request["op"] == "states":
            states = [pressed.states(row, length) for row, length in zip(rows, request["lengths"], strict=True)]
            save_file({str(i): state.contiguous().cpu() for i, state in enumerate(states)}, request["file"])
            reply: dict[str, Any] = {}
        else:
            reply = {"ids": [pressed.generate(row, request["max_new_tokens"], request["ends"]) for row in rows]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
