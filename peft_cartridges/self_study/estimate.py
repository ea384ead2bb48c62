"""What a run will cost, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .off_context import num_off_context
from .sizes import chunks_in_a_tiling, conversations_of_chunks, num_conversations
from .synthesis_config import SynthesisConfig

# A recitation is up to 60 words; English has about 1.4 tokens a word.
_RECITATION_TOKENS = 85


@dataclass(frozen=True)
class SynthesisEstimate:
    """Sizes of a run. Turns count at their longest, so generated tokens and bytes are upper bounds; conversations that
    are dropped and made anew come on top.

    Args:
        chunks: Prefilled once each.
        tilings: How often they cover the corpus.
        prefill_tokens: Of all chunks.
        conversations: Of which `recitations` cost no generation, and `off_context` are about no chunk.
        generated_tokens: Questions and answers.
        learned_tokens: Answers, recited ones too.
        target_bytes: Of the teacher's targets.
    """

    chunks: int
    tilings: float
    prefill_tokens: int
    conversations: int
    recitations: int
    generated_tokens: int
    learned_tokens: int
    target_bytes: int
    off_context: int = 0

    def seconds(self, tokens_per_second: float) -> float:
        """Time at a speed that a preview measured."""
        return self.generated_tokens / max(tokens_per_second, 1e-9)

    def __str__(self) -> str:
        beside = f"{self.off_context:,} general conversations beside them\n" if self.off_context else ""
        return (
            f"{self.conversations - self.off_context:,} conversations ({self.recitations:,} of them recitations) about "
            f"{self.chunks:,} chunks, which cover the corpus {self.tilings:.1f} times\n"
            f"{beside}"
            f"{self.prefill_tokens:,} tokens to prefill, at most {self.generated_tokens:,} to generate\n"
            f"at most {self.learned_tokens:,} tokens to learn from, whose targets take {format_bytes(self.target_bytes)}"
        )


def estimate_run(
    args: SynthesisConfig, lengths: Mapping[str, int], *, hidden_size: int | None = None
) -> SynthesisEstimate:
    """The estimate of a run.

    Args:
        args: Its settings.
        lengths: Tokens of each document; see `Chunker.lengths`.
        hidden_size: Of the model, for targets that are hidden states.

    Raises:
        ValueError: `hidden_size` is needed and missing.
    """
    if args.teacher_targets == "hidden_states" and hidden_size is None:
        raise ValueError('`hidden_size` is missing: with `teacher_targets="hidden_states"` the size depends on it.')
    chunks = len(conversations_of_chunks(args, lengths))
    tokens = max(sum(lengths.values()), 1)
    per_tiling = chunks_in_a_tiling(args, lengths)
    number = num_conversations(args, lengths)
    off_context = num_off_context(number, args.off_context_share)
    recitations = round(number * args.recitation_share)
    dialogues = number - recitations + off_context
    answers = dialogues * args.num_rounds * args.max_answer_tokens
    questions = dialogues * args.num_rounds * args.max_question_tokens
    learned = answers + recitations * _RECITATION_TOKENS
    sizes = {"hidden_states": 2 * (hidden_size or 0), "top_k": 8 * args.teacher_top_k, "live": 0}
    each = sizes[args.teacher_targets]
    return SynthesisEstimate(
        chunks=chunks,
        tilings=round(chunks / per_tiling, 2),
        prefill_tokens=round(chunks * tokens / per_tiling),
        conversations=number + off_context,
        recitations=recitations,
        generated_tokens=round((questions + answers) * args.oversampling),
        learned_tokens=learned,
        target_bytes=learned * each,
        off_context=off_context,
    )


def format_bytes(number: float) -> str:
    """A size for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
