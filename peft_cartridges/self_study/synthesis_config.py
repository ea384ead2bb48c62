"""`SynthesisConfig`: how conversations about a corpus are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from .seed_prompts import PAPER_TYPES, check_seed_types


@dataclass
class SynthesisConfig:
    """Settings of `SelfStudySynthesizer`; `SelfStudyConfig` has them too.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    num_conversations: int = field(
        default=512, metadata={"help": "How many conversations to make. The paper uses tens of thousands, each once."}
    )
    conversations_per_chunk: int = field(
        default=32,
        metadata={"help": "Conversations about one chunk. It is prefilled once for all of them: more are cheaper."},
    )
    min_chunk_tokens: int = field(default=512, metadata={"help": "Shortest chunk in tokens (paper: 512)."})
    max_chunk_tokens: int = field(
        default=1024,
        metadata={
            "help": "Longest chunk in tokens (paper: 4096). Small models answer better from short chunks, and decode "
            "faster; with a strong model and a text whose parts depend on each other, use more."
        },
    )
    seed_types: list[str] = field(
        default_factory=lambda: list(PAPER_TYPES),
        metadata={"help": "Kinds of seed prompts, used alike often (the paper's five by default)."},
    )
    recitation_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of conversations that ask for a passage of the chunk word for word (not in the paper). They "
            "cost no generation and teach the text itself."
        },
    )
    max_question_tokens: int = field(default=48, metadata={"help": "Longest question in tokens."})
    max_answer_tokens: int = field(default=96, metadata={"help": "Longest answer in tokens; a longer one is cut."})
    focus_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of seed prompts that quote a random sentence of the chunk to ask about: questions then "
            "spread over the whole chunk, where a model left alone keeps asking about its beginning."
        },
    )
    question_temperature: float = field(
        default=0.7,
        metadata={"help": "Sampling temperature of questions; a strong model stands 1.0, and asks more diversely."},
    )
    answer_temperature: float = field(
        default=0.3,
        metadata={"help": "Sampling temperature of answers: low, so that they stay with the text. 0 is greedy."},
    )
    generation_batch_size: int = field(default=64, metadata={"help": "Conversations decoded together."})
    seed: int = field(default=42, metadata={"help": "Seed of all random choices of the synthesis."})

    def __post_init__(self) -> None:
        for name in (
            "num_conversations",
            "conversations_per_chunk",
            "min_chunk_tokens",
            "max_question_tokens",
            "max_answer_tokens",
            "generation_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_chunk_tokens < self.min_chunk_tokens:
            raise ValueError(
                f"`max_chunk_tokens` ({self.max_chunk_tokens}) is below `min_chunk_tokens` ({self.min_chunk_tokens})."
            )
        for name in ("recitation_share", "focus_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for name in ("question_temperature", "answer_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        check_seed_types(self.seed_types)
