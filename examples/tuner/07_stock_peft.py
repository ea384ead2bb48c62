"""A cartridge and stock PEFT share a process and a file: what one saves, the other loads, and the logits are equal."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.cartridge.config import CartridgeConfig as StockConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, CartridgeModel, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
document = "The lighthouse of Vorrel Rock was lit in 1871, and its keeper counts the ships that pass in the night."
batch = tokenizer("The lighthouse was lit in", return_tensors="pt")


def load_base_model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


ours = get_peft_model(load_base_model(), CartridgeConfig(num_tokens=16)).eval()
initialize_cartridge(ours, tokenizer, text=document)
stock_config = StockConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, inference_mode=True)
with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
    ours.save_pretrained(first)
    stock = PeftModel.from_pretrained(load_base_model(), first, config=stock_config).eval()  # PEFT's own prompt encoder
    stock.save_pretrained(second)
    again = PeftModel.from_pretrained(load_base_model(), second).eval()

assert isinstance(again.base_model, CartridgeModel) and not isinstance(stock.base_model, CartridgeModel)
with torch.no_grad():
    logits = [model(**batch).logits for model in (ours, stock, again)]
difference = max((other - logits[0]).abs().max().item() for other in logits[1:])
print(f"Ours, stock PEFT and ours again: logits differ by {difference:.1e}")
assert difference < 1e-3
