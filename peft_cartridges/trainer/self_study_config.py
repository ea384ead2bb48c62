"""`SelfStudyConfig`: `transformers.TrainingArguments` with defaults that fit cartridges, and the synthesis settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..self_study import SynthesisConfig


@dataclass
class SelfStudyConfig(SynthesisConfig, TrainingArguments):
    """Settings of `SelfStudyTrainer`: all of `TrainingArguments`, all of `SynthesisConfig`, and those below.

    Defaults that differ from `TrainingArguments`: a learning rate that would wreck weights but that a KV cache needs,
    Adam's betas as in the paper, no weight decay (it would pull keys and values to zero), and batches of rows of like
    length.
    """

    learning_rate: float = field(
        default=2e-2,
        metadata={"help": "Peak learning rate (paper: 2e-2). Keys and values need far more than weights do."},
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second beta (paper: 0.95)."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay; 0 leaves keys and values their size."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps of linear warm-up (below 1: a share of all)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Conversations per step and device."})
    num_train_epochs: float = field(
        default=3.0,
        metadata={"help": "Passes over the conversations (the paper uses each once, and makes many more)."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Rows of like length share a batch, so little is padded."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator picks the columns itself."})
    report_to: str | list[str] = field(default="none", metadata={"help": "Trackers to report to, as in Trainer."})
    loss_chunk_size: int = field(
        default=512,
        metadata={"help": "Positions whose logits exist at a time while the loss over the vocabulary is computed."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, where `model` is given by name."},
    )
    initialization: str = field(
        default="first_tokens",
        metadata={
            "help": "How a new cartridge is initialized from a corpus with a `text` column; see `list_strategies()`. "
            "`none` leaves it as it is."
        },
    )

    def __post_init__(self) -> None:
        SynthesisConfig.__post_init__(self)
        TrainingArguments.__post_init__(self)
        if self.loss_chunk_size < 1:
            raise ValueError(f"`loss_chunk_size` must be at least 1, got {self.loss_chunk_size}.")
