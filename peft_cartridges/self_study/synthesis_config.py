"""`SynthesisConfig`: how conversations about a corpus are made."""

# ruff: noqa: RUF009 (`_decides` and `_carries` make fields)

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..chat.codec import THOUGHTS, parse_template_kwargs
from ..conversations.targets import TARGETS
from ..corpus import Chunker
from ..corpus.borders import MODES
from .engines import ENGINES
from .prompts import PAPER_TYPES, check_seed_types
from .quality import DEFAULT_FILTERS, check_filters


class _Deciding(str):
    """The help of a setting that decides what conversations say. Parsers of the command line take all of a field's
    metadata for their own, so it says so by its type."""


def _decides(help: str, default: Any = MISSING, *, factory: Callable[[], Any] | None = None) -> Any:
    """A setting that decides what the conversations say: it is a part of the set's address."""
    chosen: dict[str, Any] = {"default": default} if factory is None else {"default_factory": factory}
    return field(metadata={"help": _Deciding(help)}, **chosen)


def _carries(help: str, default: Any = MISSING, *, factory: Callable[[], Any] | None = None) -> Any:
    """A setting of how much is made, by what, and what is kept with it: a set may be carried on with another value."""
    chosen: dict[str, Any] = {"default": default} if factory is None else {"default_factory": factory}
    return field(metadata={"help": help}, **chosen)


@dataclass
class SynthesisConfig:
    """Settings of `SelfStudySynthesizer`; `SelfStudyConfig` has them too.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    # > How much is made, and about what

    num_conversations: int | None = _carries(
        "How many conversations about the corpus to make; by default one for 10 of its tokens, and at least 512 (paper: "
        "one for 7, each used once). A set may be extended later.",
        None,
    )
    conversations_per_chunk: int = _decides(
        "Conversations about one chunk, at most: it is prefilled once for all of them. Chunks get fewer where the corpus "
        "would not be covered twice.",
        32,
    )
    min_chunk_tokens: int = _decides("Shortest chunk in tokens (paper: 512).", 512)
    max_chunk_tokens: int = _decides(
        "Longest chunk in tokens (paper: 4096). Small models answer better from short chunks, and decode faster; with a "
        "strong model and a text whose parts depend on each other, use more.",
        1024,
    )
    chunking: str = _decides(
        "Where chunks are cut: `tokens` (anywhere, as in the paper), `sentences`, `sections` (Markdown headings), "
        "`files` (blocks of source code) or `auto` (by the file's ending).",
        "tokens",
    )

    # > What is asked

    seed_types: list[str] = _decides(
        "Kinds of seed prompts, used alike often (the paper's five by default).", factory=lambda: list(PAPER_TYPES)
    )
    seed_prompts: list[str] = _decides(
        "Seed prompts of your own, used instead of `seed_types`; write them for any part of the text.", factory=list
    )
    recitation_share: float = _decides(
        "Share of conversations that ask for a passage of the chunk word for word (not in the paper). They cost no "
        "generation and teach the text itself, facts most of all; nothing but them harms free conversation.",
        0.5,
    )
    off_context_share: float = _carries(
        "Share of each training batch that is general conversation, whose teacher has no text in its context (not in the "
        "paper): it keeps the cartridge from changing what has nothing to do with its text. They are made beside "
        "`num_conversations`. 0 mixes in none.",
        0.1,
    )
    off_context_dataset: str | None = _decides(
        "General conversations or prompts of your own (`messages`, or `prompt` and `completion`): a file of JSON lines, or "
        "a data set's name on the Hub. By default the model answers requests of this package's own, and then asks itself.",
        None,
    )
    num_rounds: int = _decides(
        "Questions and answers in a conversation: 2 gives A, B, A, B. All answers are learned.", 1
    )
    chain_of_thought_share: float = _decides(
        "Share of questions that end by asking for the reasoning; give answers more tokens then.", 0.0
    )
    focus_share: float = _decides(
        "Share of seed prompts that quote a random sentence of the chunk to ask about: questions then spread over the "
        "whole chunk, where a model left alone keeps asking about its beginning.",
        0.5,
    )

    # > How it is put to the model

    system_prompts: list[str] = _decides(
        "System prompts that users will have: one is drawn per chunk and stands in front of it, and of the student's "
        "turns.",
        factory=list,
    )
    chat_template_kwargs: dict[str, Any] | str | None = _decides(
        'Further arguments of the chat template, as JSON: thinking modes and tools, e.g. `{"enable_thinking": false}`. '
        "Use the same when you talk to the cartridge.",
        None,
    )
    thoughts: str = _decides(
        "What becomes of a thinking model's thoughts: `skip` (it asks and answers at once), `drop` (it thinks, and the "
        "answer is learned without the thought; give answers more tokens then) or `learn` (the thought is learned as a "
        "part of the answer). `chat_template_kwargs` that turn thinking on make `skip` a `drop`.",
        "skip",
    )
    default_system_prompt: bool = _decides(
        "Whether the student's conversations begin with what the chat template puts in front of one that has no system "
        "message (a default system prompt, a date). Without it they are what they are behind a document; the tokenizer "
        "that is saved with the cartridge then leaves it out too.",
        False,
    )
    max_question_tokens: int = _decides("Longest question in tokens.", 48)
    max_answer_tokens: int = _decides("Longest answer in tokens; a longer one is cut.", 96)
    question_temperature: float = _decides(
        "Sampling temperature of questions; a strong model stands 1.0, and asks more diversely.", 0.7
    )
    answer_temperature: float = _decides(
        "Sampling temperature of answers: low, so that they stay with the text. 0 is greedy.", 0.3
    )
    synthesis_seed: int = _decides("Seed of all random choices of the synthesis; the training has its own.", 42)

    # > What is kept

    quality_filters: list[str] = _decides(
        "What is dropped: `empty`, `truncated_question`, `truncated_answer`, `refusal`, `duplicate`, `near_duplicate`, "
        "`vague_question` (says nothing of the chunk), and filters that you registered.",
        factory=lambda: list(DEFAULT_FILTERS),
    )
    max_similarity: float = _decides(
        "Jaccard similarity of three-word runs from which `near_duplicate` calls two alike.", 0.8
    )
    max_attempts: int = _decides(
        "How often conversations that a filter dropped are made anew, before a chunk goes with fewer.", 3
    )
    min_usefulness: float = _decides(
        "Drop answers that the model gives without the chunk anyway: KL of the teacher from itself without the chunk, "
        "nats per answer token, measured with the teacher's targets. 0 keeps all, and saves measuring it.",
        0.0,
    )
    oversampling: float = _decides(
        "Make so many times the conversations that are wanted and keep the most useful ones.", 1.0
    )

    # > What the teacher says of it

    teacher_targets: str = _carries(
        "How the teacher's distribution is kept: `hidden_states` (exact: hidden_size * 2 bytes a token), `top_k` "
        "(teacher_top_k * 8 bytes a token; the only kind that engines give) or `live` (nothing is kept: the teacher is "
        "computed in the training step).",
        "hidden_states",
    )
    teacher_top_k: int = _carries("Tokens kept per position; most engines give at most 20.", 20)
    teacher_top_k_mass: float = _carries(
        "Keep no more tokens than it takes to reach this probability mass (the paper's code: 0.99).", 1.0
    )

    # > What generates

    engine: str = _carries(
        "What writes the conversations: `transformers` (the model itself, in process), `vllm` (in process) or `openai` "
        "(servers that speak OpenAI's completions protocol).",
        "transformers",
    )
    engine_model: str | None = _carries(
        "The model's name or path for an engine that is not `transformers`, if it is another than the model's own.",
        None,
    )
    engine_options: dict[str, Any] | str | None = _carries(
        'Further arguments of the engine, as JSON: of `vllm.LLM`, e.g. `{"tensor_parallel_size": 2}`, or of '
        '`OpenAIEngine`, e.g. `{"timeout": 60}`.',
        None,
    )
    base_url: list[str] = _carries(
        "Servers of the engine `openai`, e.g. http://localhost:8000/v1; work goes to whoever is free.", factory=list
    )
    concurrency: int = _carries("Requests that are under way at a server at a time.", 16)
    max_retries: int = _carries("How often an ill server is tried again before the run ends without it.", 6)
    server_token_ids: bool = _carries(
        "Whether servers are asked for token ids. For those that refuse unknown fields set it to false: token texts are "
        "then looked up in the tokenizer.",
        True,
    )
    generation_batch_size: int = _carries("Conversations decoded together by the engine `transformers`.", 64)
    refill_finished_rows: bool = _carries(
        "Whether the next prompt takes a finished row's place, so that the batch stays full. Off: a batch runs to its "
        "longest row, as `generate` does.",
        True,
    )

    def __post_init__(self) -> None:
        if self.num_conversations is not None and self.num_conversations < 1:
            raise ValueError(f"`num_conversations` must be at least 1, got {self.num_conversations}.")
        for name in (
            "conversations_per_chunk",
            "min_chunk_tokens",
            "max_question_tokens",
            "max_answer_tokens",
            "generation_batch_size",
            "concurrency",
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
        for name in ("question_temperature", "answer_temperature", "min_usefulness", "max_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.off_context_share < 1:
            raise ValueError(f"`off_context_share` must be at least 0 and below 1, got {self.off_context_share}.")
        if self.oversampling < 1:
            raise ValueError(f"`oversampling` must be at least 1, got {self.oversampling}.")
        for name, choices in (
            ("chunking", MODES),
            ("teacher_targets", TARGETS),
            ("engine", ENGINES),
            ("thoughts", THOUGHTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; there are: {', '.join(choices)}.")
        for name in ("seed_prompts", "system_prompts"):
            if any(not isinstance(prompt, str) or not prompt.strip() for prompt in getattr(self, name)):
                raise ValueError(f"`{name}` has an empty prompt.")
        parse_template_kwargs(self.chat_template_kwargs)
        self.get_engine_options()
        if self.engine == "openai" and not self.base_url:
            raise ValueError('`base_url` is missing: with `engine="openai"` say where the servers are.')
        check_seed_types(self.seed_types)
        check_filters(self.quality_filters)

    @classmethod
    def from_args(cls, args: Any, **changes: Any) -> SynthesisConfig:
        """The settings of the synthesis in a larger configuration, with `changes`."""
        return cls(**{**{field.name: getattr(args, field.name) for field in fields(cls)}, **changes})

    @classmethod
    def content_settings(cls) -> list[str]:
        """Names of the settings that decide what the conversations say."""
        return [field.name for field in fields(cls) if isinstance(field.metadata["help"], _Deciding)]

    def make_chunker(self, documents: Iterable[Any], processing_class: Any) -> Chunker:
        """Cuts documents as the settings say; see `Chunker`."""
        return Chunker(
            documents,
            processing_class,
            min_tokens=self.min_chunk_tokens,
            max_tokens=self.max_chunk_tokens,
            mode=self.chunking,
        )

    def get_engine_options(self) -> dict[str, Any]:
        """`engine_options` as a mapping."""
        options: Any = self.engine_options or {}
        if isinstance(options, str):
            try:
                options = json.loads(options)
            except json.JSONDecodeError as error:
                raise ValueError(f"`engine_options` is not JSON ({error}): {options!r}.") from None
        if not isinstance(options, dict):
            raise ValueError(f"`engine_options` must be a mapping (a JSON object), got {options!r}.")
        return dict(options)

    @property
    def measures_usefulness(self) -> bool:
        return self.min_usefulness > 0 or self.oversampling > 1
