"""A model with a cartridge generates for padded batches, with beams and in a pipeline, as the base model does."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peft_cartridges import CartridgeConfig, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
base_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
model = get_peft_model(base_model, CartridgeConfig(num_tokens=16)).eval()
document = "The lighthouse of Vorrel Rock was lit in 1871, and its keeper counts the ships that pass in the night."
initialize_cartridge(model, tokenizer, text=document)

prompts = ["The keeper", "The lighthouse of Vorrel Rock was lit in"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
for beams in (1, 3):
    options = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False}
    together = tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
    rows = [model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0] for prompt in prompts]
    assert together == tokenizer.batch_decode(rows, skip_special_tokens=True)

generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
output = generator(prompts[1], max_new_tokens=8, do_sample=False, num_beams=3)
print(output[0]["generated_text"])
assert output[0]["generated_text"] == together[1]
