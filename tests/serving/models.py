"""Tiny base models that vLLM serves, cartridges for them, and what transformers answers with these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_cartridges import CartridgeConfig, KVPrefix
from peft_cartridges.adapter_folder import write_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

# Engines have kernels for certain head sizes only.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 128, "head_dim": 64},
    "gemma3": {
        "hidden_size": 256,
        "intermediate_size": 128,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": False,
    },
}


def save_base(folder: Path, architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    model = tiny_model(architecture, **{**SHAPES[architecture], **changes})
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return tiny_model(architecture, **{**SHAPES[architecture], **changes})


def save_cartridge(folder: Path, model: PreTrainedModel, num_tokens: int, seed: int, *, base: str = "base") -> Path:
    """The cache of a random text, shaken, so that no text has it."""
    prefix = KVPrefix.from_input_ids(model, token_ids(num_tokens, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    parts = [
        tuple(part + 0.3 * torch.randn(part.shape, generator=generator) for part in parts)
        for parts in (prefix.keys, prefix.values)
    ]
    heads, _, head_dim = prefix.keys[0].shape
    config = CartridgeConfig(
        num_tokens=num_tokens,
        token_dim=heads * head_dim,
        num_layers=prefix.num_layers,
        num_attention_heads=heads,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    write_cartridge(folder, config, KVPrefix(*parts))
    return folder


@torch.no_grad()
def answers(model: PreTrainedModel, folder: Path | None, prompt: list[int], num_tokens: int) -> tuple[list[int], Any]:
    """Greedy tokens of transformers, one whole forward for each, and the log-probabilities `[num_tokens, vocab]`."""
    peft_model = model if folder is None else PeftModel.from_pretrained(model, folder)
    ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        logits = peft_model(input_ids=torch.tensor([ids])).logits[0, -1]
        logprobs.append(logits.float().log_softmax(-1))
        ids.append(int(logits.argmax()))
    if folder is not None:
        peft_model.unload()
    return ids[len(prompt) :], torch.stack(logprobs)
