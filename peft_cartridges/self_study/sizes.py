"""How much is made of a corpus where nothing is said: by its length alone, so that all of it is studied alike."""

from __future__ import annotations

from collections.abc import Mapping

from .synthesis_config import SynthesisConfig

# One conversation for so many tokens of the corpus (paper: 65,536 about 484,000 tokens, one for 7), and no fewer than
# what a short text wants.
TOKENS_PER_CONVERSATION, FEWEST_CONVERSATIONS = 10, 512
# How often chunks cover the corpus before any gets all of its conversations, and how many each gets before that: a
# chunk is prefilled once for them, and they are decoded together.
_TILINGS, _FEWEST_PER_CHUNK = 2, 16


def default_conversations(tokens: int) -> int:
    """How many conversations a corpus of so many tokens gets."""
    return max(FEWEST_CONVERSATIONS, -(-tokens // TOKENS_PER_CONVERSATION))


def num_conversations(args: SynthesisConfig, lengths: Mapping[str, int]) -> int:
    """How many conversations about the corpus: as it is said, or by its length."""
    return args.num_conversations or default_conversations(sum(lengths.values()))


def chunks_in_a_tiling(args: SynthesisConfig, lengths: Mapping[str, int]) -> float:
    """About how many chunks cover the corpus once. A document makes at least one, however short it is."""
    middle = (args.min_chunk_tokens + args.max_chunk_tokens) / 2
    return sum(max(1.0, length / middle) for length in lengths.values())


def conversations_of_chunks(args: SynthesisConfig, lengths: Mapping[str, int]) -> list[int]:
    """How many conversations each chunk gets, first to last.

    A larger set has every chunk with no fewer, so that it extends the smaller one: chunks get a few conversations each
    until the corpus is covered, then these chunks get more, and then further chunks get `conversations_per_chunk`.
    """
    total, most = num_conversations(args, lengths), args.conversations_per_chunk
    fewest = min(_FEWEST_PER_CHUNK, most)
    cover = max(1, round(_TILINGS * chunks_in_a_tiling(args, lengths)))
    if fewest * cover < total < most * cover:
        each, rest = divmod(total, cover)
        return [each + (chunk < rest) for chunk in range(cover)]
    each = fewest if total <= fewest * cover else most
    return [min(each, total - first) for first in range(0, total, each)]
