"""A LoRA of as many bytes as the cartridge, trained on the same conversations."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback

from ...kv_prefix import KVPrefix
from ..system import NotApplicable, System, bare
from .bench import Bench


def lora(bench: Bench) -> System:
    """Weights of all linear layers, of the rank that comes nearest to the cartridge's bytes (the rank of at least 1 may be
    more), trained by TRL's `SFTTrainer` on the answers of the self-study conversations, with nothing in context.

    Raises:
        NotApplicable: there are no conversations.
    """
    if bench.conversations is None:
        raise NotApplicable("it needs the self-study conversations that the cartridge was trained on")
    from trl import SFTConfig, SFTTrainer

    start = time.perf_counter()
    with bare(bench.model) as base:
        budget = KVPrefix.from_input_ids(base, bench.text_ids[:1]).nbytes * bench.num_tokens
    copied: Any = copy.deepcopy(bench.model)
    model = copied.unload() if isinstance(copied, PeftModel) else copied
    rank = equal_rank(model, budget)
    torch.manual_seed(bench.seed)
    adapter: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    rows = bench.conversations.select_columns(["input_ids", "completion_mask"])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=bench.steps, per_device_train_batch_size=bench.batch_size, learning_rate=1e-3,
            lr_scheduler_type="cosine", warmup_steps=min(10, bench.steps // 4), completion_only_loss=True, max_length=None,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True, seed=bench.seed,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, bf16=False, fp16=False,
        )  # fmt: skip
        trainer = SFTTrainer(adapter, args, train_dataset=rows, processing_class=bench.codec.tokenizer)
        trainer.remove_callback(PrinterCallback)  # reports go to stdout
        trainer.train()
    # Trained in float32, served in the model's own dtype, as the cartridge is.
    width = next(model.parameters()).element_size()
    size = sum(p.numel() * width for name, p in adapter.named_parameters() if "lora_" in name)
    trained: nn.Module = adapter.eval()
    return System(
        "LoRA", trained, bench.codec, lambda: contextlib.nullcontext(trained), bench.codec.preamble,
        kv_bytes=size, seconds=time.perf_counter() - start, note=f"rank {rank}, {bench.steps} steps of SFT",
    )  # fmt: skip


def equal_rank(model: nn.Module, num_bytes: int) -> int:
    """The LoRA rank on all linear layers but the output head that takes nearest to `num_bytes` in the model's dtype; at
    least 1."""
    owner: Any = model
    head = owner.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    per_rank = sum((m.in_features + m.out_features) * m.weight.element_size() for m in linear)
    return max(1, round(num_bytes / per_rank))
