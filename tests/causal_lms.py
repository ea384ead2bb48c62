"""A tiny random model of every causal LM type of the installed transformers, from one set of small numbers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 8

# What configurations of all families call their sizes; each takes those that it knows.
_SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "sliding_window": WINDOW, "n_embd": 32, "n_layer": 4, "n_head": 4, "d_model": 32, "n_layers": 4,
    "n_heads": 4, "n_positions": 512, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_num_experts": 4,
    "moe_topk": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "mamba_d_ssm": 32,
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_headdim": 8, "num_logits_to_keep": 1,
    "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "use_mamba_kernels": False,
}  # fmt: skip

_LATENT: dict[str, Any] = {"num_key_value_heads": 4}
# What some families need beside that, to be consistent.
_MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu", "dots3_note_text"),
        _LATENT,
    ),
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": WINDOW},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 2},
    "kimi_linear": {**_LATENT, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 4, "num_heads": 4, "chunk_size": 8, "autocast_kernel_dtype": "float32"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "mamba_dt_rank": 4, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NotBuiltError(Exception):
    """The numbers above make no model of that type; the message says why."""


def tiny_causal_lm(name: str) -> Any:
    """A model in evaluation mode, with weights drawn wide, so that an error in attention shows.

    Raises:
        NotBuiltError: no small model could be made.
    """
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    model_class = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])
    if set(getattr(config_class, "sub_configs", None) or {}) & {"text_config", "decoder", "decoder_config"}:
        raise NotBuiltError("a model of several parts, whose language model has a type of its own")
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    aliases = getattr(config_class, "attribute_map", {})
    values = {key: value for key, value in _SMALL.items() if key in known or key in aliases}
    for alias, own in aliases.items():
        if own in values:
            values.pop(alias, None)
    values |= _MORE.get(name, {})
    try:
        config = config_class(**values)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > 3e7:
            raise NotBuiltError(f"{size:,} parameters at the smallest numbers tried")
        torch.manual_seed(0)
        try:
            model = model_class._from_config(config, attn_implementation="sdpa")
        except ValueError:
            model = model_class._from_config(config, attn_implementation="eager")
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"its configuration refuses small numbers: {type(error).__name__}") from error
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            elif parameter_name.endswith("qk_norm.temp"):  # zero would hide all keys
                parameter.fill_(1.0)
    return model.eval()
