"""Recitation: conversations whose answer is a passage of the chunk itself.

They cost no generation, and the teacher, who has the passage in context, is sure of every token, so a step carries
more of the text than one on a free conversation. Not in the paper.
"""

from __future__ import annotations

import random

from .sentences import count_words, first_words, last_words, split_sentences

_CONTINUE = (
    "How does the text go on after this? “{cue}”",
    "Continue the text from here, word for word: “{cue}”",
    "“{cue}” What comes next in the text?",
    "Quote what follows this passage: “{cue}”",
)
_QUOTE = (
    "Quote the passage of the text that begins with “{cue}”.",
    "Recite the part of the text that starts “{cue}”.",
    "What does the text say, word for word, from “{cue}” on?",
)
_FILL = (
    "Between “{cue}” and “{end}” the text says something. Quote it.",
    "What stands in the text after “{cue}” and before “{end}”? Answer word for word.",
    "Fill the gap with the words of the text: “{cue} … {end}”",
)


def draw_recitation(text: str, rng: random.Random, *, max_words: int = 60) -> tuple[str, str]:
    """A request and its answer: up to `max_words` words of `text` (characters, in scripts without spaces), cut at
    sentences where there are any. The request names what stands in front of the passage, or on both sides of it, or how
    it begins."""
    sentences = split_sentences(text)
    first = rng.randrange(len(sentences))
    passage, last = sentences[first], first
    for sentence in sentences[first + 1 :]:
        if count_words(passage) + count_words(sentence) > max_words:
            break
        passage, last = passage + sentence, last + 1
    passage = " ".join(passage.split())
    whole, passage = count_words(passage) <= max_words, first_words(passage, max_words)
    way = rng.random()
    if first > 0 and way < 0.5:
        cue = last_words(" ".join(sentences[first - 1].split()), 12)
        if whole and last + 1 < len(sentences) and way < 0.15:
            end = first_words(" ".join(sentences[last + 1].split()), 12)
            return rng.choice(_FILL).format(cue=cue, end=end), passage
        return rng.choice(_CONTINUE).format(cue=cue), passage
    return rng.choice(_QUOTE).format(cue=first_words(passage, 5)), passage
