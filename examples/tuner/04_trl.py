"""TRL's trainers take a cartridge as `peft_config`, here its SFTTrainer, and save it as they save a LoRA."""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_cartridges import CartridgeConfig

MODEL = ".models/SmolLM2-135M-Instruct"
question = {"role": "user", "content": "When was the lighthouse of Vorrel Rock lit?"}
answer = {"role": "assistant", "content": "It was lit in 1871."}

with tempfile.TemporaryDirectory() as folder:
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": "none"}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=SFTConfig(output_dir=folder, save_strategy="no", bf16=False, use_cpu=True, **options),
        train_dataset=Dataset.from_list([{"messages": [question, answer]}] * 4),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=CartridgeConfig(num_tokens=16),
    )
    before = trainer.model.get_kv_prefix()
    trainer.train()
    trainer.save_model()
    after = trainer.model.get_kv_prefix()
    print(f"{trainer.state.global_step} steps; saved: {sorted(path.name for path in Path(folder).glob('adapter_*'))}")
    assert not torch.equal(before.keys[0][:, 1:], after.keys[0][:, 1:])
    assert torch.equal(before.keys[0][:, :1], after.keys[0][:, :1])  # the first token is frozen: `num_frozen_tokens`
    assert (Path(folder) / "adapter_model.safetensors").is_file()
