"""A cartridge gives the same logits with every attention back end that the base model can be loaded with."""

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
document = "The lighthouse of Vorrel Rock was lit in 1871, and its keeper counts the ships that pass in the night."
batch = tokenizer("The lighthouse was lit in", return_tensors="pt")

cartridge = None
logits = {}
for attention in ("eager", "sdpa", "flex_attention"):  # on a GPU also "flash_attention_2" and "flash_attention_3"
    base_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=attention)
    model = get_peft_model(base_model, CartridgeConfig(num_tokens=16)).eval()
    if cartridge is None:
        initialize_cartridge(model, tokenizer, text=document)
        cartridge = get_peft_model_state_dict(model)
    else:
        set_peft_model_state_dict(model, cartridge)
    with torch.no_grad():
        logits[attention] = model(**batch).logits
    difference = (logits[attention] - logits["eager"]).abs().max().item()
    print(f"{attention}: logits differ from eager by {difference:.1e}")
    assert difference < 1e-3
