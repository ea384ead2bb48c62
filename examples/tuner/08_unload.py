"""`unload` takes a cartridge off and leaves the base model bit for bit as it was; a deep copy keeps its own."""

import copy

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
document = "The lighthouse of Vorrel Rock was lit in 1871, and its keeper counts the ships that pass in the night."
batch = tokenizer("The lighthouse was lit in", return_tensors="pt")
torch.set_grad_enabled(False)

logits = base_model(**batch).logits
weights = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
model = get_peft_model(base_model, CartridgeConfig(num_tokens=16)).eval()
initialize_cartridge(model, tokenizer, text=document)
with_cartridge = model(**batch).logits
clone = copy.deepcopy(model)
unloaded = model.unload()

same = all(torch.equal(tensor, weights[name]) for name, tensor in unloaded.state_dict().items())
print(f"{len(weights)} tensors and the logits are as before: {same and torch.equal(unloaded(**batch).logits, logits)}")
assert unloaded is base_model and unloaded.state_dict().keys() == weights.keys() and same
assert torch.equal(unloaded(**batch).logits, logits) and not torch.equal(with_cartridge, logits)
assert torch.equal(clone(**batch).logits, with_cartridge)
