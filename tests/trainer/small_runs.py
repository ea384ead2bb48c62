"""Training runs of a second, shared by the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudySynthesizer, SelfStudyTrainer, SynthesisConfig
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = " ".join(f"the captain of w{number} says no . the sea is w{number + 1} ." for number in range(50, 80))
CORPUS = Dataset.from_dict({"text": [TEXT]})
GOLD = [{"question": "what is the sea ?", "answer": "the sea is w60 ."}, {"question": "who ?", "answer": "w55 ."}]

_SYNTHESIS = {
    "num_conversations": 16, "conversations_per_chunk": 8, "min_chunk_tokens": 30, "max_chunk_tokens": 40,
    "max_question_tokens": 6, "max_answer_tokens": 8, "quality_filters": [], "off_context_share": 0.0,
}  # fmt: skip


def make_config(folder: Path, **options: Any) -> SelfStudyConfig:
    defaults = {
        **_SYNTHESIS, "per_device_train_batch_size": 8, "max_steps": 4, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0, "plot": False,
        "learning_rate": 0.04,
    }  # fmt: skip
    return SelfStudyConfig(output_dir=str(folder), **{**defaults, **options})


def make_trainer(
    folder: Path,
    model: Any = None,
    dataset: Dataset | None = None,
    *,
    arguments: dict[str, Any] | None = None,
    num_frozen_tokens: int = 2,
    **options: Any,
) -> SelfStudyTrainer:
    """A trainer with `options` in its configuration and `arguments` of its own; on the corpus if no data set is given."""
    model = tiny_model() if model is None else model
    config = CartridgeConfig(num_tokens=8, num_frozen_tokens=num_frozen_tokens)
    return SelfStudyTrainer(
        model=model,
        args=make_config(folder, **options),
        train_dataset=CORPUS if dataset is None else dataset,
        processing_class=TOKENIZER,
        peft_config=None if isinstance(model, PeftModel) else config,
        **(arguments or {}),
    )


def make_conversations(**options: Any) -> Dataset:
    return SelfStudySynthesizer(tiny_model(), TOKENIZER, SynthesisConfig(**{**_SYNTHESIS, **options})).synthesize(TEXT)


def losses(trainer: SelfStudyTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
