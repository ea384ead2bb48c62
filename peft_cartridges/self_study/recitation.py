"""Recitation: conversations whose answer is a passage of the chunk itself.

They cost no generation, and the teacher, who has the passage in context, is sure of every token, so a step carries
more of the text than one on a free conversation. Not in the paper.
"""

from __future__ import annotations

import random
import re

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")

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
_LOOK_UP = (
    "What does the text say about {words}?",
    "Which sentence of the text speaks of {words}?",
    "Find {words} in the text, and quote the sentence.",
    "What do we learn from the text about {words}? Quote it.",
    "Tell me, in the words of the text, about {words}.",
)
_WORD = re.compile(r"\w[\w’'-]*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, cut at full stops and the like; at least one."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def draw_recitation(
    text: str, rng: random.Random, *, max_words: int = 60, look_up_share: float = 0.5
) -> tuple[str, str]:
    """A request and its answer: up to `max_words` words of `text`, cut at sentences where there are any.

    The request names what stands in front of the passage, or on both sides of it, or how it begins; or, for
    `look_up_share` of them, words of one sentence, which is the answer: what people ask about a text is found by its
    words, not by its place.
    """
    sentences = split_sentences(text)
    first = rng.randrange(len(sentences))
    if rng.random() < look_up_share and (looked_up := _look_up(sentences[first], rng, max_words)):
        return looked_up
    passage, last = sentences[first], first
    for sentence in sentences[first + 1 :]:
        if len(passage.split()) + len(sentence.split()) > max_words:
            break
        passage, last = f"{passage} {sentence}", last + 1
    words = passage.split()
    whole = len(words) <= max_words
    words = words[:max_words]
    passage = " ".join(words)
    way = rng.random()
    if first > 0 and way < 0.5:
        cue = " ".join(sentences[first - 1].split()[-12:])
        if whole and last + 1 < len(sentences) and way < 0.15:
            end = " ".join(sentences[last + 1].split()[:12])
            return rng.choice(_FILL).format(cue=cue, end=end), passage
        return rng.choice(_CONTINUE).format(cue=cue), passage
    return rng.choice(_QUOTE).format(cue=" ".join(words[: min(5, len(words))])), passage


def _look_up(sentence: str, rng: random.Random, max_words: int) -> tuple[str, str] | None:
    """A request that names one or two longer words of the sentence, or a pair of neighbours; `None` if it has none."""
    words = _WORD.findall(sentence)
    telling = [number for number, word in enumerate(words) if len(word) > 3]
    if len(words) > max_words or len(telling) < 2:
        return None
    one, other = rng.sample(telling, 2)
    named = {0: f"“{words[one]}”", 1: f"“{words[one]}” and “{words[other]}”"}
    pair = " ".join(words[one : one + 2])
    subject = named.get(rng.randrange(3), f"“{pair}”")
    return rng.choice(_LOOK_UP).format(words=subject), " ".join(sentence.split())
