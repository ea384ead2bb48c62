"""One model holds many cartridges: one at a time, composed, one for each row of a batch, and beside a LoRA."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge

MODEL = ".models/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
texts = {"lighthouse": "The lighthouse of Vorrel Rock was lit in 1871.", "orchard": "The orchard sells pears in May."}
ids = tokenizer("The lighthouse was lit in", return_tensors="pt")["input_ids"]
torch.set_grad_enabled(False)

with tempfile.TemporaryDirectory() as folder:
    prefixes = {}
    for (name, text), num_tokens in zip(texts.items(), (12, 8), strict=True):
        model = get_peft_model(base_model, CartridgeConfig(num_tokens=num_tokens))
        prefixes[name] = initialize_cartridge(model, tokenizer, text=text)
        model.save_pretrained(f"{folder}/{name}")
        base_model = model.unload()
    none = base_model(ids).logits
    expected = {name: base_model(ids, past_key_values=p.to_cache()).logits for name, p in prefixes.items()}
    joined = KVPrefix.concatenate(list(prefixes.values()))
    expected["both"] = base_model(ids, past_key_values=joined.to_cache()).logits

    lora = get_peft_model(base_model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora_only = lora(ids).logits
    beside = PeftModel.from_pretrained(lora, f"{folder}/lighthouse").eval()
    with_both = beside(ids).logits
    assert not torch.allclose(with_both, lora_only) and not torch.allclose(with_both, expected["lighthouse"])
    torch.testing.assert_close(beside.unload()(ids).logits, lora_only)  # the LoRA stays
    base_model = lora.unload()

    model = PeftModel.from_pretrained(base_model, f"{folder}/lighthouse", adapter_name="lighthouse").eval()
    model.load_adapter(f"{folder}/orchard", adapter_name="orchard")

model.set_adapter(["lighthouse", "orchard"])
composed = model(ids).logits
rows = model(ids.repeat(3, 1), adapter_names=["lighthouse", "__base__", "orchard"]).logits
torch.testing.assert_close(composed, expected["both"], atol=1e-3, rtol=1e-3)
wanted = torch.cat([expected["lighthouse"], none, expected["orchard"]])
torch.testing.assert_close(rows, wanted, atol=1e-3, rtol=1e-3)
print("Composed, and one for each row: the logits are those of past_key_values")
assert not torch.allclose(rows[0], rows[1], atol=0.1)
