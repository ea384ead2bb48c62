"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from .answers import ANSWER_METRICS


@dataclass
class EvaluationConfig:
    """What is measured, and how much of it. Each field's help text is its documentation.

    Raises:
        ValueError: a value is out of range or unknown.
    """

    max_questions: int = field(default=0, metadata={"help": "Of the corpus; 0 takes all."})
    max_general_prompts: int = field(default=48, metadata={"help": "Prompts off the corpus; 0 takes all."})
    generate: bool = field(default=True, metadata={"help": "Also generate answers (the slowest part)."})
    max_new_tokens: int = field(default=48, metadata={"help": "Length of generated answers."})
    answer_metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "token_f1", "rouge_l", "chrf"],
        metadata={"help": "Of generated answers: exact_match, token_f1, rouge_l, chrf."},
    )
    abstention: bool = field(
        default=True, metadata={"help": "Also measure abstention, where there are unanswerable questions."}
    )
    speed: bool = field(default=True, metadata={"help": "Also time decoding on this machine."})
    batch_size: int = field(default=16, metadata={"help": "Rows at a time."})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Draws behind each interval; 0 gives none."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap's draws, and of methods that draw."})

    def __post_init__(self) -> None:
        for name in ("max_questions", "max_general_prompts", "bootstrap_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if unknown := sorted(set(self.answer_metrics) - set(ANSWER_METRICS)):
            raise ValueError(
                f"`answer_metrics`: {', '.join(unknown)} is unknown; there are: {', '.join(ANSWER_METRICS)}."
            )
