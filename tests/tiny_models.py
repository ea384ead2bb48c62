"""Tiny random models of every architecture that the tests name, and a tokenizer for them, all made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128
WINDOW = 8

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def _causal_lm(name: str, **options: Any) -> Callable[..., Any]:
    """Makes `{name}ForCausalLM` from `{name}Config`."""

    def config(**changes: Any) -> Any:
        return getattr(transformers, f"{name}Config")(**{**_COMMON, **options, **changes})

    return config


def _vision_language(name: str, text_name: str, vision: dict[str, Any], **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        text_config = getattr(transformers, f"{text_name}Config")(**{**_COMMON, **options.get("text", {})})
        rest = {key: value for key, value in options.items() if key != "text"}
        return getattr(transformers, f"{name}Config")(
            text_config=text_config.to_dict(), vision_config=vision, pad_token_id=0, **rest
        )

    return config


_LAYERS_OF_GEMMA_3 = ["sliding_attention", "full_attention", "sliding_attention"]

# The last two layers attend to the keys and values of the two before.
_SHARING = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}

# name -> (class of the model, its configuration)
ARCHITECTURES: dict[str, tuple[str, Callable[..., Any]]] = {
    "llama": ("LlamaForCausalLM", _causal_lm("Llama")),
    "mistral": ("MistralForCausalLM", _causal_lm("Mistral", sliding_window=WINDOW, head_dim=8)),
    "qwen2": ("Qwen2ForCausalLM", _causal_lm("Qwen2")),
    "qwen3": ("Qwen3ForCausalLM", _causal_lm("Qwen3", head_dim=16)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _causal_lm("Qwen3Moe", head_dim=8, **_MOE)),
    "gemma2": (
        "Gemma2ForCausalLM",
        _causal_lm(
            "Gemma2", head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        _causal_lm(
            "Gemma3Text", head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, num_hidden_layers=3,
            layer_types=_LAYERS_OF_GEMMA_3,
        ),
    ),
    "phi3": ("Phi3ForCausalLM", _causal_lm("Phi3", original_max_position_embeddings=512)),
    "olmo2": ("Olmo2ForCausalLM", _causal_lm("Olmo2")),
    "smollm3": ("SmolLM3ForCausalLM", _causal_lm("SmolLM3", no_rope_layers=[1, 0])),
    "granite": ("GraniteForCausalLM", _causal_lm("Granite", attention_multiplier=0.3, residual_multiplier=0.8)),
    "gpt_oss": (
        "GptOssForCausalLM",
        _causal_lm(
            "GptOss", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _causal_lm("GPTNeoX", num_key_value_heads=4)),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        _vision_language(
            "Qwen2_5_VL", "Qwen2_5_VLText",
            {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
             "patch_size": 4, "fullatt_block_indexes": [0], "window_size": 16},
            image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
            text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        ),
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        _vision_language("SmolVLM", "Llama", {**_VISION, "num_hidden_layers": 1}, image_token_id=3, scale_factor=1),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _causal_lm(
            "DeepseekV3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
        ),
    ),
    "gemma3n": ("Gemma3nForCausalLM", _causal_lm("Gemma3nText", altup_num_inputs=2, laurel_rank=4, **_SHARING)),
    "gemma4": ("Gemma4ForCausalLM", _causal_lm("Gemma4Text", global_head_dim=16, **_SHARING)),
}  # fmt: skip


# Layers with another memory than keys and values: a cartridge goes into the attention layers if the config says so.
HYBRIDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _causal_lm(
            "Qwen3Next", head_dim=8, num_hidden_layers=4, shared_expert_intermediate_size=16, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, **_MOE,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
    ),
    "lfm2": ("Lfm2ForCausalLM", _causal_lm("Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)),
    "jamba": (
        "JambaForCausalLM",
        _causal_lm(
            "Jamba", num_hidden_layers=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
            use_mamba_kernels=False, mamba_dt_rank=4,
        ),
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        _causal_lm("FalconH1", head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    ),
}  # fmt: skip

# These do not implement sdpa (soft caps, sinks).
_EAGER_ONLY = ("gemma2", "gpt_oss")


def tiny_model(
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode, with `changes` in its configuration; the same weights for the same seed.

    Weights are drawn wide, so that attention is far from uniform and an error in it shows.
    """
    class_name, make_config = {**ARCHITECTURES, **HYBRIDS}[name]
    config = make_config(**changes)
    attn = attn or ("eager" if name in _EAGER_ONLY else "sdpa")
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)._from_config(config, attn_implementation=attn)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            elif parameter_name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
    return model.to(dtype).eval()


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids of ordinary tokens (no padding, no special tokens)."""
    return torch.randint(8, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


_WORDS = [
    "<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", "<end>", "the", "a", "of", "is", "what",
    "who", "where", "when", "tells", "sky", "sea", "ship", "captain", "blue", "red", "old", "new", "seven", "eight",
    "days", "nights", "harbor", "light", "keeper", "says", "yes", "no", "this", "text", "about", "question", "answer",
    ".", "?",
]  # fmt: skip

_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <end>{% endgeneration %}"
    "{% else %}{{ message['content'] }} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words (`_WORDS`, then `w42`, … up to the models' vocabulary), with a chat template."""
    words = _WORDS + [f"w{index}" for index in range(len(_WORDS), VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_WORDS[:8])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
