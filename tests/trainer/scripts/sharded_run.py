"""A whole run of the trainer in one process or, with its weights split over them, in several; prints what came of it
and, in bytes, the weights in this process and the most memory that it took for others."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_cartridges import CartridgeConfig, SelfStudyTrainer
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.trainer.small_runs import GOLD, TEXT, TOKENIZER, losses, make_config

WIDTH, LAYERS = 512, 24  # a layer, which every process gathers for a moment, is small beside half of the model


def prepare(folder: Path) -> int:
    """A model that is large beside what a run needs anyway; gives its bytes."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def conversations(seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB_SIZE, (16, 12), generator=generator)
    logprobs, tokens = torch.randn(16, 5, VOCAB_SIZE, generator=generator).log_softmax(-1).topk(3)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "completion_mask": [[0] * 7 + [1] * 5] * 16,
            "teacher_top_k_ids": tokens.reshape(16, -1).tolist(),
            "teacher_top_k_logprobs": logprobs.reshape(16, -1).tolist(),
            "context": [TEXT] * 16,
        }
    )


class OwnMemory(threading.Thread):
    """Watches this process's memory, but for files that it has mapped, such as those of weights on a CPU.

    Args:
        peak: The most there was so far, in bytes; write to it to begin anew.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def own_weights(model: torch.nn.Module) -> int:
    """Bytes of a model's weights in this process."""
    weights = [parameter.detach() for parameter in model.parameters()]
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)


def warm_up(folder: Path, processes: int) -> None:
    """A run of a model without any size: what a run needs anyway is then there."""
    args = make_config(folder / "warm-up", max_steps=1, per_device_train_batch_size=8 // processes)
    trainer = SelfStudyTrainer(
        tiny_model(), args, conversations(), conversations(1), processing_class=TOKENIZER,
        peft_config=CartridgeConfig(num_tokens=8),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()


def main() -> None:
    folder, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    args = make_config(
        folder / f"of-{processes}", max_steps=3, per_device_train_batch_size=8 // processes, shard_model=processes > 1,
        save_strategy="steps", save_steps=2, learning_rate=0.01,
    )  # fmt: skip
    warm_up(folder, processes)
    memory = OwnMemory()
    before = memory.peak
    trainer = SelfStudyTrainer(
        str(folder / "model"), args, conversations(), conversations(1).select(range(13)), peft_config=CartridgeConfig(num_tokens=8),
        gold_questions=GOLD,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    found = {"losses": losses(trainer), "kl": metrics["eval_loss"], "gold": metrics["eval_gold_nll"]}
    sizes = {"weights": own_weights(trainer.model), "others": memory.peak - before}
    print(json.dumps({**found, **sizes}), flush=True)


if __name__ == "__main__":
    main()
