"""A cartridge trains in a plain loop, with gradient checkpointing and a base model in bfloat16, and nothing else does."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
document = "The lighthouse of Vorrel Rock was lit in 1871, and its keeper counts the ships that pass in the night."

model = get_peft_model(base_model, CartridgeConfig(num_tokens=16))
initialize_cartridge(model, tokenizer, text=document)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.train()
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=0.02)
batch = tokenizer(document, return_tensors="pt")
losses = []
for _ in range(4):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

print(f"{model.get_nb_trainable_parameters()[0]:,} trained parameters, loss {losses[0]:.2f} to {losses[-1]:.2f}")
assert losses[-1] < losses[0]
assert all(parameter.dtype == torch.float32 for parameter in trainable)  # `autocast_adapter_dtype`, as for a LoRA
assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "kv_prefix_" not in name)
