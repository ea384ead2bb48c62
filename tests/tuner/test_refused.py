"""Models that cannot hold a prefix at all: refused before anything is changed, by the module and the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, UnsupportedModelError

_SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}

# model -> (its configuration's own fields, what the error says)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama4": (
        {"head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2, "attention_chunk_size": 8},
        "chunked-attention layers.*tokens of a later chunk never see an earlier one",
    ),
    "Bloom": ({"n_layer": 2, "n_head": 2}, r"transformer.h.0, transformer.h.1 have no causal attention"),
    "Mpt": ({"d_model": 16, "n_layers": 2, "n_heads": 2}, r"transformer.blocks.0, transformer.blocks.1 have no causal"),
    "GPTJ": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}, r"transformer.h.0.* have no causal attention"),
    "DeepseekV32": (
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "n_routed_experts": 2, "num_experts_per_tok": 1,
         "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8},
        r"`model.layers.0.self_attn` \(DeepseekV32Attention\) cannot hold a prefix: it keeps more of a text than keys and values \(DynamicIndexedLayer\)",
    ),
    "DiffLlama": ({}, r"attends several times in one layer \(model.layers.0.self_attn\)"),
    "Doge": ({}, r"`model.layers.0.self_attn` .* it makes a mask of its own for each head"),
    "Phimoe": (
        {"sliding_window": 8, "num_local_experts": 2},
        r"`model.layers.0.self_attn` .* does not tell its sliding window \(8\).*model.config.sliding_window = None",
    ),
}  # fmt: skip


@pytest.mark.supports("Refused architectures", "by an error that names the module", on="{name}", refused=True)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fields, message = REFUSED[name]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**_SMALL, **fields}))
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, CartridgeConfig(num_tokens=4))
    assert {name: type(module) for name, module in model.named_modules()} == modules
