"""One cartridge configuration fits every decoder: its layers are found in the model, and hold what a KV cache holds."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge

sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
grouped = {**sizes, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
document, question = torch.randint(3, 128, (1, 12)), torch.randint(3, 128, (1, 6))

configs = [LlamaConfig(**grouped), Gemma3TextConfig(**grouped, **windows), GPT2Config(**sizes), Qwen3Config(**grouped)]
for config in configs:
    base_model = AutoModelForCausalLM.from_config(config).eval()
    prefix = KVPrefix.from_input_ids(base_model, document[0])
    with torch.no_grad():
        expected = base_model(question, past_key_values=prefix.to_cache()).logits
        without = base_model(question).logits
        model = get_peft_model(base_model, CartridgeConfig(num_tokens=12)).eval()
        initialize_cartridge(model, prefix=prefix)
        difference = (model(question).logits - expected).abs().max().item()
    print(f"{config.model_type}: logits differ from past_key_values by {difference:.1e}")
    assert difference < 1e-4 < (without - expected).abs().max()
