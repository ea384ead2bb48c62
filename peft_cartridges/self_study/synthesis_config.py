"""`SynthesisConfig`: how conversations about a corpus are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..chat.codec import THOUGHTS, parse_template_kwargs
from .chunk_borders import MODES
from .quality import DEFAULT_FILTERS, check_filters
from .seed_prompts import PAPER_TYPES, check_seed_types
from .teacher_targets import KINDS


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
    chunking: str = field(
        default="tokens",
        metadata={
            "help": "Where chunks are cut: `tokens` (anywhere, as in the paper), `sentences`, `sections` (Markdown "
            "headings), `files` (blocks of source code) or `auto` (by the file's ending)."
        },
    )
    seed_types: list[str] = field(
        default_factory=lambda: list(PAPER_TYPES),
        metadata={"help": "Kinds of seed prompts, used alike often (the paper's five by default)."},
    )
    seed_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Seed prompts of your own, used instead of `seed_types`; write them for any part of the text."
        },
    )
    recitation_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of conversations that ask for a passage of the chunk word for word (not in the paper). They "
            "cost no generation and teach the text itself, facts most of all; nothing but them harms free conversation."
        },
    )
    num_rounds: int = field(
        default=1,
        metadata={"help": "Questions and answers in a conversation: 2 gives A, B, A, B. All answers are learned."},
    )
    chain_of_thought_share: float = field(
        default=0.0,
        metadata={"help": "Share of questions that end by asking for the reasoning; give answers more tokens then."},
    )
    system_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "System prompts that users will have: one is drawn per chunk and stands in front of it, and of the "
            "student's turns."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the chat template, as JSON: thinking modes and tools, e.g. "
            '`{"enable_thinking": false}`. Use the same when you talk to the cartridge.'
        },
    )
    thoughts: str = field(
        default="skip",
        metadata={
            "help": "What becomes of a thinking model's thoughts: `skip` (it asks and answers at once), `drop` (it "
            "thinks, and the answer is learned without the thought; give answers more tokens then) or `learn` (the "
            "thought is learned as a part of the answer). `chat_template_kwargs` that turn thinking on make `skip` a "
            "`drop`."
        },
    )
    default_system_prompt: bool = field(
        default=False,
        metadata={
            "help": "Whether the student's conversations begin with what the chat template puts in front of one that "
            "has no system message (a default system prompt, a date). Without it they are what they are behind a "
            "document; the tokenizer that is saved with the cartridge then leaves it out too."
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
    refill_finished_rows: bool = field(
        default=True,
        metadata={
            "help": "Whether the next prompt takes a finished row's place, so that the batch stays full. Off: a batch "
            "runs to its longest row, as `generate` does."
        },
    )
    quality_filters: list[str] = field(
        default_factory=lambda: list(DEFAULT_FILTERS),
        metadata={
            "help": "What is dropped: `empty`, `truncated_question`, `truncated_answer`, `refusal`, `duplicate`, "
            "`near_duplicate`, `vague_question` (says nothing of the chunk), and filters that you registered."
        },
    )
    max_similarity: float = field(
        default=0.8,
        metadata={"help": "Jaccard similarity of three-word runs from which `near_duplicate` calls two alike."},
    )
    min_usefulness: float = field(
        default=0.0,
        metadata={
            "help": "Drop answers that the model gives without the chunk anyway: KL of the teacher from itself without "
            "the chunk, nats per answer token. 0 keeps all, and saves measuring it."
        },
    )
    oversampling: float = field(
        default=1.0,
        metadata={"help": "Make so many times the conversations that are wanted and keep the most useful ones."},
    )
    max_attempts: int = field(
        default=3,
        metadata={"help": "How often conversations that were dropped are made anew, before a chunk goes with fewer."},
    )
    teacher_targets: str = field(
        default="hidden_states",
        metadata={
            "help": "How the teacher's distribution is kept: `hidden_states` (exact: hidden_size * 2 bytes a token) or "
            "`top_k` (teacher_top_k * 8 bytes a token; the only kind that engines give)."
        },
    )
    teacher_top_k: int = field(default=20, metadata={"help": "Tokens kept per position; most engines give at most 20."})
    teacher_top_k_mass: float = field(
        default=1.0,
        metadata={"help": "Keep no more tokens than it takes to reach this probability mass (the paper's code: 0.99)."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of all random choices of the synthesis."})

    def __post_init__(self) -> None:
        for name in (
            "num_conversations",
            "conversations_per_chunk",
            "min_chunk_tokens",
            "max_question_tokens",
            "max_answer_tokens",
            "generation_batch_size",
            "num_rounds",
            "max_attempts",
            "teacher_top_k",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.max_chunk_tokens < self.min_chunk_tokens:
            raise ValueError(
                f"`max_chunk_tokens` ({self.max_chunk_tokens}) is below `min_chunk_tokens` ({self.min_chunk_tokens})."
            )
        for name in (
            "recitation_share",
            "focus_share",
            "chain_of_thought_share",
            "max_similarity",
            "teacher_top_k_mass",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for name in ("question_temperature", "answer_temperature", "min_usefulness"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.oversampling < 1:
            raise ValueError(f"`oversampling` must be at least 1, got {self.oversampling}.")
        for name, choices in (("chunking", MODES), ("teacher_targets", KINDS), ("thoughts", THOUGHTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; there are: {', '.join(choices)}.")
        for name in ("seed_prompts", "system_prompts"):
            if any(not isinstance(prompt, str) or not prompt.strip() for prompt in getattr(self, name)):
                raise ValueError(f"`{name}` has an empty prompt.")
        parse_template_kwargs(self.chat_template_kwargs)
        check_seed_types(self.seed_types)
        check_filters(self.quality_filters)
