"""The thoughts of thinking models: what opens and closes them, and where they end in what was sampled."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

# What the templates and the models of the field write around a thought.
_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # GPT-OSS: an answer has a channel of its own
)
# By these arguments chat templates are told whether the model is to think.
SWITCHES = ("enable_thinking", "thinking")


def opened_thought(prompt: str) -> tuple[str, str] | None:
    """The marks of the thought that a prompt ends with the opening of."""
    return next((marks for marks in _MARKS if prompt.rstrip().endswith(marks[0])), None)


def close_thought(prompt: str) -> str:
    """The prompt with the thought that it opens closed without a word, so that the model goes on with its answer (as
    Qwen 3's template does; on models that were not taught it: arXiv 2504.09858)."""
    marks = opened_thought(prompt)
    return prompt if marks is None else f"{prompt.rstrip()}\n\n{marks[1]}\n\n"


def find_answer(ids: Sequence[int], decode: Callable[[Sequence[int]], str], *, opened: bool) -> int | None:
    """Where the answer begins in what was sampled: behind a thought, if there is one.

    Args:
        ids: The sampled token ids.
        decode: Gives their text, special tokens included.
        opened: Whether the prompt has opened a thought.

    Returns:
        An index into `ids`; `None` where the thought does not end in them, or ends within a token of the answer.
    """
    text = decode(ids)
    closing = [mark for _, mark in _MARKS if mark in text]
    if not closing:
        unfinished = opened or any(text.lstrip().startswith(mark) for mark, _ in _MARKS)
        return None if unfinished else 0
    mark = min(closing, key=text.index)
    end = bisect.bisect_left(range(len(ids)), True, key=lambda end: mark in decode(ids[:end]))
    if decode(ids[:end]).partition(mark)[2].strip():
        return None
    while end < len(ids) and decode([ids[end]]).isspace():
        end += 1
    return end
